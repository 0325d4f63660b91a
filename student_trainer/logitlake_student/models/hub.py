"""Checkpoints by their name on the Hugging Face hub, as well as by their folder."""

import re
from pathlib import Path

from logitlake_shared.errors import ConfigError

__all__ = ["local_folder"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
# Weights, configurations, tokenizers, processors. Never code: a student is a stock class.
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def local_folder(checkpoint: Path) -> Path:
    """The folder of a checkpoint: itself, or where the hub's `organisation/name` or `organisation/name@revision` lies.

    What was downloaded once is not asked for again; under `HF_HUB_OFFLINE=1` nothing is. Raises `ConfigError` where
    there is neither a folder nor such a repository within reach.
    """
    name = checkpoint.as_posix()
    if checkpoint.is_dir() or not _REPOSITORY.fullmatch(name):
        return checkpoint
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigError(
            f"{name}: no such folder, and no repository of that name within reach of the hub "
            f"({str(error).strip().splitlines()[0]}); give a folder, or download it once"
        ) from None
