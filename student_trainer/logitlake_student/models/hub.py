"""Checkpoints by their name on the Hugging Face hub, as well as by their folder."""

import json
import re
from pathlib import Path

from logitlake_shared.errors import ConfigError

__all__ = ["local_folder", "pin", "pinned"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
# Weights, configurations, tokenizers, processors. Never code: a student is a stock class.
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def local_folder(checkpoint: Path, *, download: bool = True) -> Path:
    """The folder of a checkpoint: itself, or where the hub's `organisation/name` or `organisation/name@revision` lies.

    Files that were downloaded once are not downloaded again; under `HF_HUB_OFFLINE=1`, or without `download`, nothing
    is. Without it the answer to a name that is not here yet is the name, and there is no such folder.

    Raises:
        ConfigError: there is neither a folder nor such a repository within reach.
    """
    name = checkpoint.as_posix()
    if checkpoint.is_dir() or not _REPOSITORY.fullmatch(name):
        return checkpoint
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=_FILES, local_files_only=not download
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if not download and isinstance(error, LocalEntryNotFoundError):
            return checkpoint
        raise ConfigError(
            f"{name}: no such folder, and no repository of that name within reach of the hub "
            f"({str(error).strip().splitlines()[0]}); give a folder, or download it once where there is a network: "
            f"hf download {repository}"
        ) from None


def pinned(checkpoint: Path, pins: Path) -> Path:
    """The checkpoint at the revision that the file `pins` holds for its name; the same where it holds none.

    A branch on the hub moves; a run that goes on must begin with the weights that it began with.
    """
    known = json.loads(pins.read_text(encoding="utf-8")) if pins.is_file() else {}
    return Path(known.get(checkpoint.as_posix(), checkpoint))


def pin(checkpoint: Path, folder: Path, pins: Path) -> None:
    """Writes down the revision of a checkpoint that was found by its name, in `folder`; nothing for a folder."""
    if folder == checkpoint or pins.is_file():
        return
    pins.parent.mkdir(parents=True, exist_ok=True)
    building = pins.with_name(f".{pins.name}")
    # A snapshot's folder is named by its commit.
    revision = {checkpoint.as_posix(): f"{checkpoint.as_posix().partition('@')[0]}@{folder.name}"}
    building.write_text(json.dumps(revision) + "\n", encoding="utf-8")
    building.replace(pins)
