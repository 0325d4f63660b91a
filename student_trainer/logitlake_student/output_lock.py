"""One trainer at a time in an output folder.

The kernel holds the lock for the process and lets go of it when the process ends, however it ends: a lock cannot be
left behind. Over a network file system that is so where it passes `flock` on to its server (NFS 4 does).
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logitlake_shared.errors import ConfigError

__all__ = ["output_lock"]

_NAME = ".lock"


@contextmanager
def output_lock(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made. Raises `ConfigError` naming who holds it now."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another trainer works in this folder: {_owner(file.name)}; wait for it, stop it, or choose "
                "another `output`"
            ) from None
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": started}, file)
        file.flush()
        yield


def _owner(path: str) -> str:
    try:
        owner = json.loads(Path(path).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (KeyError, ValueError):
        return "a process that has just begun"
