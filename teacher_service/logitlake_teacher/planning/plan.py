"""A plan on disk: made once, read a unit at a time, used again while its inputs are the same.

A plan's folder is named by everything that determines it, data files by their size and time of change. It appears
under that name when it is whole, so a command that is killed while planning leaves nothing that another would trust.
Images are looked at again before a plan is used again: one that changed makes another plan.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from logitlake_schemas import CacheKind, DatasetIdentity, fingerprint
from logitlake_shared.errors import DataError
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import ImagesConfig, PlanConfig, Source
from logitlake_teacher.engines.facts import EngineFacts
from logitlake_teacher.items import Unit
from logitlake_teacher.planning.build import OnProgress, build
from logitlake_teacher.planning.figures import PlanFigures
from logitlake_teacher.planning.pictures import images_unchanged
from logitlake_teacher.planning.sources import file_stamps
from logitlake_teacher.planning.units_file import UnitsFile

__all__ = ["Plan", "Remaining", "check_plan", "make_plan"]

# The rule by which a plan is made; another rule is another plan.
_RULE = 1
_UNUSED_S = 30 * 24 * 3600
_MANIFEST = "plan.json"


class _Manifest(BaseModel):
    """`plan.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: DatasetIdentity
    figures: PlanFigures


@dataclass(frozen=True)
class Plan:
    """All units of a dataset, in order, and the dataset's identity."""

    units: Sequence[Unit]
    unit_ids: Sequence[str]
    num_items: Sequence[int]
    """of each unit"""
    num_tokens: Sequence[int]
    """of each unit, images expanded"""
    dataset: DatasetIdentity
    figures: PlanFigures

    def remaining(self, committed: set[str], shard: tuple[int, int]) -> "Remaining":
        """The units of shard `(i, n)` (from 1) that are not committed."""
        number, num_shards = shard
        places = [
            place
            for place, unit_id in enumerate(self.unit_ids)
            if place % num_shards == number - 1 and unit_id not in committed
        ]
        return Remaining(self, tuple(places))


@dataclass(frozen=True)
class Remaining:
    """Units that are left to do; each is read when its turn comes."""

    plan: Plan
    places: tuple[int, ...]

    def __iter__(self) -> Iterator[Unit]:
        return (self.plan.units[place] for place in self.places)

    def __len__(self) -> int:
        return len(self.places)

    def items_of(self, unit_id: str) -> int:
        """Samples or pairs in a unit."""
        # A unit's id begins with its place.
        return self.plan.num_items[int(unit_id.partition("-")[0])]

    @property
    def num_items(self) -> int:
        """Samples or pairs in them."""
        return sum(self.plan.num_items[place] for place in self.places)

    @property
    def num_tokens(self) -> int:
        """Tokens that the teacher sees for them, images expanded."""
        return sum(self.plan.num_tokens[place] for place in self.places)


def check_plan(plan: Plan) -> None:
    """Raises `DataError` with the first problems of sources that tolerate none (`on_bad_record = "fail"`)."""
    figures = plan.figures
    if figures.fatal:
        codes = ", ".join(f"{count} {code}" for code, count in figures.problems.items())
        raise DataError(
            f"{sum(figures.problems.values())} of {figures.items} items cannot be used ({codes}):\n  "
            + "\n  ".join(figures.examples)
            + '\nMend the data, or set on_bad_record = "skip" to have them counted as errors and all others captured'
        )


def make_plan(
    kind: CacheKind,
    sources: Sequence[Source],
    renderer: Renderer,
    facts: EngineFacts,
    config: PlanConfig,
    images: ImagesConfig,
    on_progress: OnProgress = lambda _: None,
    *,
    open_end: bool = False,
) -> Plan:
    """The plan of these sources, from disk if it was made before.

    With `open_end` a conversation may end with a question, for a teacher that is to answer it. Raises `DataError` for
    a source that cannot be read, and for ids that are not unique. Other faults of the data are in the plan's figures:
    see `check_plan`.
    """
    stamps = [stamp for source in sources for stamp in file_stamps(source)]
    key = fingerprint(
        {
            "rule": _RULE,
            "kind": kind,
            "open_end": open_end,
            "sources": [source.model_dump(mode="json") for source in sources],
            "stamps": stamps,
            "tokenizer": renderer.identity().model_dump(mode="json"),
            "image_rule": facts.image_rule,
            "context_length": facts.context_length,
            "images": images.model_dump(mode="json"),
            "unit_tokens": config.unit_tokens,
            "limit": config.limit,
        }
    )
    root = Path(config.folder).expanduser()
    folder = root / key[:32]
    found = _open(folder, kind)
    if found is not None:
        os.utime(folder)
        return found
    _remove_unused(root)
    draft = root / f"{folder.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        dataset, figures = build(kind, sources, renderer, facts, config, images, draft, on_progress, open_end=open_end)
        manifest = _Manifest(dataset=dataset, figures=figures)
        (draft / _MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # of images that have changed since
        try:
            draft.rename(folder)
        except OSError as error:
            # Another command made the same plan meanwhile: its is as good.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise DataError(f"{folder}: the plan cannot be kept there: {error}; set plan.folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    made = _open(folder, kind)
    if made is None:
        raise DataError(f"{folder}: images changed while the plan was made; run the command again when they are still")
    return made


def _open(folder: Path, kind: CacheKind) -> Plan | None:
    """The plan in the folder, if there is one and its images are as they were."""
    path = folder / _MANIFEST
    if not path.is_file() or not images_unchanged(folder):
        return None
    manifest = _Manifest.model_validate_json(path.read_bytes())
    units = UnitsFile(folder, kind)
    return Plan(units, units.ids, units.num_items, units.num_tokens, manifest.dataset, manifest.figures)


def _remove_unused(root: Path) -> None:
    """Plans that nobody used for a month, and what killed commands left."""
    if not root.is_dir():
        return
    for folder in root.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _UNUSED_S:
            shutil.rmtree(folder, ignore_errors=True)
