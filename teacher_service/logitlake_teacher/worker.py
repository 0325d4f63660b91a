"""What an executor runs: one engine and one open cache, in this process or in another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from logitlake_schemas import CacheKind, CommitRecord
from logitlake_shared.lake import Lake
from logitlake_teacher.capture import capture_unit
from logitlake_teacher.config import EngineConfig
from logitlake_teacher.engines import EngineSetup, build_engine
from logitlake_teacher.items import Item, Unit
from logitlake_teacher.pairs import capture_pairs_unit
from logitlake_teacher.unit_work import load_images, requests_of

__all__ = ["CaptureJob", "UnitWorker"]


@dataclass(frozen=True)
class CaptureJob:
    """Everything a worker needs to know, wherever it runs; picklable."""

    kind: CacheKind
    lake_uri: str
    cache: str
    engine: EngineConfig
    setup: EngineSetup


class UnitWorker:
    """Captures unit after unit; each commits itself. Implements `executors.base.Worker`."""

    def __init__(self, job: CaptureJob) -> None:
        self._capture = capture_pairs_unit if job.kind == "pairs" else capture_unit
        self._cache = Lake.open(job.lake_uri).cache(job.cache)
        self._engine = build_engine(job.engine, job.setup)

    def run(self, unit: Unit, crashed: Mapping[str, str]) -> CommitRecord:
        """Captures and commits the unit; `crashed` maps ids that are known to kill the teacher to what happened."""
        return self._capture(self._engine, unit, self._cache, crashed)

    def probe(self, items: Sequence[Item]) -> None:
        """Scores the items and forgets the answers: does the teacher survive them?"""
        images = load_images(items)
        sound = [item for item in items if item.item_id not in images.errors]
        self._engine.score([request for item in sound for request in requests_of(item, images.decoded)])

    def close(self) -> None:
        """Frees the engine."""
        self._engine.close()
