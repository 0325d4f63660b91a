"""What the folder of a run says of it, whether it is finished or goes on: stages, metrics, checkpoints.

Reads and never writes; a file that a trainer is just writing is read up to its last whole line. A file of another shape
than a trainer writes is a `RunFilesError` of its run and of no other, and what is no plain file is never followed or
waited for: a folder of runs is written by many, and who looks at it is to see the rest.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from logitlake_schemas import layout
from logitlake_shared.errors import RunFilesError
from logitlake_student.checkpoints import numbered_checkpoints
from logitlake_student.config import STAGE_ORDER
from logitlake_student.report_training import StageCurves
from logitlake_student.run import CACHED_MASS, DONE, METRICS, SNAPSHOTS, STARTED

__all__ = ["SavedStep", "StageFiles", "find_run", "find_runs", "read_stages", "snapshots_of", "thinned"]

T = TypeVar("T")


def _finite(value: Any) -> Any:
    """The value with None for what is no number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What is counted fits 64 bits.
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Document = Annotated[dict[str, Any], AfterValidator(_finite)]


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class _OfStage(_Read):
    steps: _Count


class _Identity(_Read):
    stage: _OfStage


class _Started(_Read):
    identity: _Identity


class _Done(_Read):
    figures: _Document


class _CachedMass(_Read):
    samples_by_mass: tuple[_Count, ...]


class _Layer(_Read):
    load: Annotated[list[float], Field(min_length=1)]


class _Line(_Read):
    step: _Count
    experts: list[_Layer] = []


_SNAPSHOTS = TypeAdapter(dict[str, _Count], config=ConfigDict(strict=True))


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
    steps: int
    """that it is to have"""
    figures: dict[str, Any] | None
    """its closing figures; none before it is done"""

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its metrics until now; what is no line yet is left out. Raises `RunFilesError`."""
        path = self.folder / METRICS
        data = _bytes_of(path) or b""
        return [_line(path, number, line) for number, line in enumerate(data.split(b"\n")[:-1], start=1)]

    def saved(self) -> Iterator[SavedStep]:
        """Its checkpoints, the oldest first, and its model."""
        for step, folder in numbered_checkpoints(self.folder):
            yield SavedStep(self.name, step, "checkpoint", _size(folder))
        if self.figures is not None:
            yield SavedStep(self.name, self.steps, "model", _size(self.folder / "model"))

    def curves(self) -> StageCurves:
        """For the charts. Raises `RunFilesError`."""
        metrics = self.metrics
        mass = _parsed(TypeAdapter(_CachedMass), self.folder / CACHED_MASS)
        return StageCurves(
            self.name, metrics[-1]["step"] if metrics else 0, metrics, () if mass is None else mass.samples_by_mass
        )


def find_runs(folder: Path) -> list[str]:
    """The names of the runs in a folder, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if find_run(folder, path.name) is not None)


def find_run(folder: Path, name: str) -> Path | None:
    """The folder of the run of this name, if there is one."""
    path = folder / name
    if not layout.valid_name(name) or not _is_folder(path):
        return None
    return path if any(_is_begun(path, stage) for stage in STAGE_ORDER) else None


def read_stages(run: Path) -> list[StageFiles]:
    """The stages that were begun, in their order. Raises `RunFilesError`."""
    found = []
    for name in STAGE_ORDER:
        if _is_begun(run, name):
            folder = run / name
            started, done = _parsed(TypeAdapter(_Started), folder / STARTED), _parsed(TypeAdapter(_Done), folder / DONE)
            if started is not None:  # else removed meanwhile
                steps = started.identity.stage.steps
                found.append(StageFiles(name, folder, steps, None if done is None else done.figures))
    return found


def snapshots_of(run: Path) -> dict[str, int]:
    """The snapshot of each cache that the run is pinned to. Raises `RunFilesError`."""
    return _parsed(_SNAPSHOTS, run / SNAPSHOTS) or {}


def thinned(lines: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of the lines, evenly apart, with the first and the last."""
    if len(lines) <= most:
        return lines
    return [lines[round(place * (len(lines) - 1) / max(most - 1, 1))] for place in range(most)]


def _is_begun(run: Path, stage: str) -> bool:
    return _is_folder(run / stage) and os.path.lexists(run / stage / STARTED)


def _is_folder(path: Path) -> bool:
    """No link, which may lead into another's run."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _bytes_of(path: Path) -> bytes | None:
    """None where there is no such file."""
    try:
        # A pipe would have its reader wait for somebody who writes.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RunFilesError(f"{_shown(path)}: not a plain file; restore it, or train the stage again")
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFilesError(
            f"{_shown(path)}: cannot be read: {error.strerror}; restore it, and let it be read"
        ) from error


def _parsed(shape: TypeAdapter[T], path: Path) -> T | None:
    """The document, None where there is no such file."""
    data = _bytes_of(path)
    if data is None:
        return None
    try:
        return shape.validate_json(data)
    except ValidationError as error:
        raise RunFilesError(_other_shape(_shown(path), error)) from error


def _line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        # Refuses what no answer could hold: half a surrogate, a hundred levels.
        record: dict[str, Any] = _finite(from_json(line))
        _Line.model_validate(record)
    except ValueError as error:
        raise RunFilesError(_other_shape(f"{_shown(path)}, line {number}", error)) from error
    return record


def _shown(path: Path) -> str:
    """A file of a stage or run, from the folder of runs on; nothing of where that is."""
    return "/".join(path.parts[-3:] if path.parent.name in STAGE_ORDER else path.parts[-2:])


def _other_shape(where: str, error: ValueError) -> str:
    why = str(error)
    if isinstance(error, ValidationError):
        problem = error.errors(include_input=False)[0]
        why = f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg']}"
    return f"{where}: not what a trainer writes: {why}; restore the file, or train the stage again"


def _size(path: Path) -> int:
    """Of the files in a folder, which a trainer may be removing."""
    total = 0
    for folder, _, names in [] if path.is_symlink() else os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(folder, name).lstat().st_size
    return total
