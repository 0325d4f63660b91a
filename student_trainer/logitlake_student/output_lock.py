"""One trainer at a time in an output folder.

The lock is a hidden file beside the folder. The kernel holds it for the process and lets go when the process ends,
however it ends: a lock cannot be left behind. Over a network file system that is so where it passes `flock` on to its
server (NFS 4 does).
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from logitlake_shared.errors import ConfigError
from logitlake_shared.file_locks import is_named, try_lock

__all__ = ["output_lock"]


@contextmanager
def output_lock(folder: Path) -> Iterator[None]:
    """Holds the folder, which need not be there yet. Raises `ConfigError` naming who holds it now."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with _locked(path, folder) as file:
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": started}, file)
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # it is let go of in any case
                path.unlink()


def _locked(path: Path, folder: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        if not try_lock(file):
            file.close()
            raise ConfigError(
                f"{folder}: another trainer works in this folder: {_owner(path)}; wait for it, stop it, or choose "
                "another `output`"
            )
        # One that ended in between has removed what we opened: whoever comes next would open another file.
        if is_named(file, path):
            return file
        file.close()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, KeyError, ValueError):
        return "a process that has just begun"
