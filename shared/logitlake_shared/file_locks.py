"""Locks on files: a process holds one for as long as it has the file open, and the kernel lets go however it ends."""

import fcntl
import os
from pathlib import Path
from typing import IO, Any

__all__ = ["is_named", "try_lock"]


def try_lock(file: int | IO[Any]) -> bool:
    """Takes the lock of an open file; returns False, at once, where another has it. Raises `OSError`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_named(file: IO[Any], path: Path) -> bool:
    """Whether the open file is still the one of this name: who had the lock before may have removed or renamed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
