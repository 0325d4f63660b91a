"""What torch and the system say when something runs out, said again so that it helps."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from logitlake_shared.errors import MemoryExhaustedError, TrainingError
from logitlake_student.config import TrainConfig

__all__ = ["memory_explained", "room_explained", "writing_explained"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What is left of an errno in torch's writer: it finds itself at another place in the file than it should be.
_WRITER_FAILED = ("inline_container", "iostream error")
_GO_ON = "what was saved before is whole, and the same command goes on from it once there is room"


@contextmanager
def memory_explained(config: TrainConfig) -> Iterator[None]:
    """Says what to change where a step does not fit. Raises `MemoryExhaustedError`."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA; on a CPU the allocator's own words
        import torch

        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        checkpoints = "" if config.gradient_checkpointing else ", set `gradient_checkpointing = true`"
        raise MemoryExhaustedError(
            f"a step does not fit the memory of {config.device}: {str(error).splitlines()[0]} Lower "
            f"`micro_batch_size`, then `chunk_rows`{checkpoints}; the same command goes on from the newest checkpoint"
        ) from error


@contextmanager
def writing_explained(what: Path) -> Iterator[None]:
    """Around the writing of a checkpoint, whatever writes it. Raises `TrainingError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{what}: cannot be written: {error}; {_GO_ON}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _WRITER_FAILED):
            raise
        raise TrainingError(f"{what}: cannot be written ({str(error).strip()}): is the disk full? {_GO_ON}") from error


@contextmanager
def room_explained(output: Path) -> Iterator[None]:
    """Around everything else that is written into a run's folder. Raises `TrainingError` where there is no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise TrainingError(f"{error.filename or output}: cannot be written: {error.strerror}; {_GO_ON}") from error
