"""What the folder of a run says of it, whether it is finished or goes on: stages, metrics, checkpoints.

Reads and never writes; a file that a trainer is just writing is read up to its last whole line.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from logitlake_schemas import layout
from logitlake_student.checkpoints import numbered_checkpoints
from logitlake_student.config import STAGE_ORDER
from logitlake_student.report_training import StageCurves
from logitlake_student.run import CACHED_MASS, DONE, METRICS, SNAPSHOTS, STARTED

__all__ = ["SavedStep", "StageFiles", "find_run", "find_runs", "read_stages", "snapshots_of", "thinned"]


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint, or a finished model."""

    stage: str
    step: int
    kind: Literal["checkpoint", "model"]
    bytes: int


@dataclass(frozen=True)
class StageFiles:
    """One stage of a run."""

    name: str
    folder: Path
    identity: dict[str, Any]
    """of all that determines its result"""
    figures: dict[str, Any] | None
    """its closing figures; none before it is done"""

    @property
    def steps(self) -> int:
        """That it is to have."""
        return int(self.identity["stage"]["steps"])

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its metrics until now; what is no line yet is left out."""
        try:
            data = (self.folder / METRICS).read_bytes()
        except FileNotFoundError:
            return []
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        return [_finite(json.loads(line)) for line in lines]

    def saved(self) -> Iterator[SavedStep]:
        """Its checkpoints, the oldest first, and its model."""
        for step, folder in numbered_checkpoints(self.folder):
            yield SavedStep(self.name, step, "checkpoint", _size(folder))
        if self.figures is not None:
            yield SavedStep(self.name, self.steps, "model", _size(self.folder / "model"))

    def curves(self) -> StageCurves:
        """For the charts."""
        metrics = self.metrics
        mass: tuple[int, ...] = ()
        if (self.folder / CACHED_MASS).is_file():
            mass = tuple(json.loads((self.folder / CACHED_MASS).read_bytes())["samples_by_mass"])
        return StageCurves(self.name, metrics[-1]["step"] if metrics else 0, metrics, mass)


def find_runs(folder: Path) -> list[str]:
    """The names of the runs in a folder, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if find_run(folder, path.name) is not None)


def find_run(folder: Path, name: str) -> Path | None:
    """The folder of the run of this name, if there is one."""
    path = folder / name
    if not layout.valid_name(name) or path.is_symlink() or not path.is_dir():
        return None
    return path if read_stages(path) else None


def read_stages(run: Path) -> list[StageFiles]:
    """The stages that were begun, in their order."""
    return [
        StageFiles(
            name,
            run / name,
            json.loads((run / name / STARTED).read_bytes())["identity"],
            json.loads((run / name / DONE).read_bytes())["figures"] if (run / name / DONE).is_file() else None,
        )
        for name in STAGE_ORDER
        if (run / name / STARTED).is_file()
    ]


def snapshots_of(run: Path) -> dict[str, int]:
    """The snapshot of each cache that the run is pinned to."""
    path = run / SNAPSHOTS
    pinned: dict[str, int] = json.loads(path.read_bytes()) if path.is_file() else {}
    return pinned


def thinned(lines: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of the lines, evenly apart, with the first and the last."""
    if len(lines) <= most:
        return lines
    return [lines[round(place * (len(lines) - 1) / max(most - 1, 1))] for place in range(most)]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _finite(value: Any) -> Any:
    """The value with None for what is no number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
