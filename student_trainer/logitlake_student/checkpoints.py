"""Checkpoints that survive SIGKILL: complete or not there.

A checkpoint is written into a hidden folder, every file synced, then `digests.json` (sha256 of each file) as the last
one, then the folder is renamed; one that goes is hidden again before it is removed. What is found again is the newest
folder whose every digest holds; anything else is left alone with a warning, so that a damaged checkpoint costs the
steps since the one before it and nothing more.
"""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from logitlake_schemas import canonical_json
from logitlake_shared import durable
from logitlake_shared.errors import CheckpointError

__all__ = ["first_difference", "newest_checkpoint", "numbered_checkpoints", "prune_checkpoints", "publish_folder"]

DIGESTS = "digests.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def publish_folder(built: Path, name: Path) -> None:
    """Gives a finished folder its name: digests written last, everything synced, one rename. Replaces what is there."""
    digests = {str(file.relative_to(built)): _sha256(file) for file in _files(built)}
    (built / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    durable.publish_folder(built, name)


def newest_checkpoint(stage_dir: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest complete checkpoint, None where there is none.

    Warns of each damaged one that it passes over. Raises `CheckpointError` where all of them are damaged: days of work
    are not begun again without being asked.
    """
    found = numbered_checkpoints(stage_dir)
    problem = None
    for step, folder in reversed(found):
        problem = damage(folder)
        if problem is None:
            return step, folder
        warnings.warn(f"{folder}: not used: {problem}; going back to the checkpoint before it", stacklevel=2)
    if found:
        names = ", ".join(folder.name for _, folder in found)
        raise CheckpointError(
            f"{stage_dir}: none of its checkpoints is whole ({names}; the oldest: {problem}); remove them to begin the "
            "stage again"
        )
    return None


def first_difference(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str:
    """The first field in which two identities differ, and both values; empty where they are the same."""
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := first_difference(old, new, f"{prefix}{key}."):
                return inner
        elif old != json.loads(canonical_json(new)):
            return f"`{prefix}{key}` is {old!r} there, {new!r} here"
    return ""


def prune_checkpoints(stage_dir: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what is left of one whose removal was cut short."""
    for folder in stage_dir.glob(".checkpoint-*"):
        shutil.rmtree(folder)
    for _, folder in numbered_checkpoints(stage_dir)[: -keep or None]:
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}")))


def damage(folder: Path) -> str | None:
    """What is wrong with a published folder, or None."""
    path = folder / DIGESTS
    if not path.is_file():
        return f"{DIGESTS} is missing"
    try:
        digests = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        return f"{DIGESTS} is not a JSON object"
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def numbered_checkpoints(stage_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, whole or damaged, the oldest first."""
    found = [(match, folder) for folder in stage_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(folder.name))]
    return sorted((int(match[1]), folder) for match, folder in found)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
