"""What an executor runs: one engine and one open cache, in this process or in another.

Units may run in several threads at once: one is loaded and committed while the teacher works on another. The teacher
itself is asked by one thread at a time, unless its engine says that it can be shared (`concurrent`). What a unit costs
is measured here and told with its commit, so what is never committed is never counted.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

from logitlake_schemas import CacheKind, CommitRecord
from logitlake_schemas.records import EngineIdentity
from logitlake_shared.errors import LakeConflictError
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.rendering import Renderer
from logitlake_teacher.answers import answers_of
from logitlake_teacher.capture import capture_unit
from logitlake_teacher.config import EngineConfig, ImagesConfig
from logitlake_teacher.engines import EngineSetup, build_engine
from logitlake_teacher.engines.base import Engine, Generation, SampleProblem, Sampling, ScoredSample, ScoreRequest
from logitlake_teacher.executors.base import Committed, UnitCost
from logitlake_teacher.items import Item, Unit
from logitlake_teacher.pairs import capture_pairs_unit, pair_producer
from logitlake_teacher.unit_images import GuardedImages

__all__ = ["CaptureJob", "UnitWorker"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureJob:
    """Everything a worker needs to know, wherever it runs; picklable."""

    kind: CacheKind
    lake_uri: str
    cache: str
    engine: EngineConfig
    setup: EngineSetup
    images: ImagesConfig


class UnitWorker:
    """Captures unit after unit; each commits itself. Implements `executors.base.Worker`."""

    def __init__(self, job: CaptureJob) -> None:
        self._cache = Lake.open(job.lake_uri).cache(job.cache)
        self._pairs = pair_producer(self._cache.spec, job.setup.model_dir) if job.kind == "pairs" else None
        self._renderer = Renderer(job.setup.model_dir)
        self._engine = build_engine(job.engine, job.setup)
        # After the teacher: one that cannot be loaded leaves no decoding processes behind.
        self._images = GuardedImages(job.images)
        self._turn: AbstractContextManager[object] = (
            nullcontext() if getattr(self._engine, "concurrent", False) else threading.Lock()
        )

    def run(self, unit: Unit, crashed: Mapping[str, str], pieces: int = 1) -> Committed:
        """Captures and commits the unit; see `executors.base.Worker`."""
        engine = _SharedEngine(self._engine, self._turn, pieces)
        cache, images, publish = self._cache, self._images, _TimedPublish(self._cache)
        try:
            if self._pairs is not None:
                record = capture_pairs_unit(self._pairs, engine, unit, cache, crashed, images, publish)
            else:
                record = capture_unit(engine, unit, cache, crashed, self._renderer, images, publish)
        except LakeConflictError as conflict:
            # Two workers did one unit, and the teacher does not repeat itself bit for bit (bf16, another batch). What
            # is committed is as good as ours.
            _LOG.warning("%s", conflict)
            record = cache.commit(unit.unit_id)
        if publish.seconds is None:
            return Committed(record, cost=None)
        return Committed(record, UnitCost(tuple(engine.batches_s), dict(engine.tokens), publish.seconds))

    def probe(self, items: Sequence[Item]) -> None:
        """Scores the items and forgets the answers: does the teacher survive them?"""
        images = self._images(items)
        sound = [item for item in items if item.item_id not in images.errors]
        engine = _SharedEngine(self._engine, self._turn, 1)
        if self._pairs is not None:
            self._pairs.pairs_of(engine, sound, images.decoded, self._cache.spec)
        else:
            answers_of(engine, sound, images.decoded, self._cache.spec, self._renderer)

    def close(self) -> None:
        """Frees the engine, and what loads and decodes images."""
        self._engine.close()
        self._images.close()


class _TimedPublish:
    """`Cache.publish_unit`, and the seconds that it took once it came to its end."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.seconds: float | None = None

    def __call__(self, result: UnitResult) -> CommitRecord:
        start = time.monotonic()
        record = self._cache.publish_unit(result)
        self.seconds = time.monotonic() - start
        return record


Answer = TypeVar("Answer", ScoredSample | SampleProblem, list[Generation] | SampleProblem)


@dataclass(frozen=True)
class _SharedEngine:
    """An engine as one unit sees it: it waits for its turn, asks in pieces, and keeps count of what that takes."""

    engine: Engine
    turn: AbstractContextManager[object]
    pieces: int
    batches_s: list[float] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredSample | SampleProblem]:
        """See `Engine.score`."""
        return self._ask(self.engine.score, requests)

    def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> list[list[Generation] | SampleProblem]:
        """See `Engine.generate`."""
        return self._ask(lambda piece: self.engine.generate(piece, sampling), requests)

    def describe(self) -> EngineIdentity:
        """See `Engine.describe`."""
        return self.engine.describe()

    def close(self) -> None:
        """Nothing: the engine is the worker's."""

    def _ask(
        self, engine_call: Callable[[Sequence[ScoreRequest]], list[Answer]], requests: Sequence[ScoreRequest]
    ) -> list[Answer]:
        size = max(1, -(-len(requests) // self.pieces))
        answers: list[Answer] = []
        with self.turn:
            for start in range(0, len(requests), size):
                began = time.monotonic()
                answers += engine_call(requests[start : start + size])
                self.batches_s.append(time.monotonic() - began)
        for request, answer in zip(requests, answers, strict=True):
            self.tokens.update(_tokens(request, answer))
        return answers


def _tokens(request: ScoreRequest, answer: ScoredSample | list[Generation] | SampleProblem) -> dict[str, int]:
    """Tokens of an answered request by kind; the prompt of several candidates is one."""
    if isinstance(answer, SampleProblem):
        return {}
    if isinstance(answer, ScoredSample):
        responses, expanded_length = [request.response_ids], answer.expanded_length
    else:
        responses, expanded_length = [one.response_ids for one in answer], answer[0].expanded_length
    # In the prompt an image is one placeholder.
    num_text = len(request.prompt_ids) - len(request.images)
    return {
        "prompt": num_text,
        "image": expanded_length - num_text - len(responses[0]),
        "response": sum(map(len, responses)),
    }
