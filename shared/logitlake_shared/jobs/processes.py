"""Attempts as processes of this machine, which a restart of the service leaves alone.

Each has a folder: `config.toml`, `log`, `lock`, `end.json`. The lock is taken before the process exists and handed down
to it; the kernel lets go of it when the process is gone. So there is no time at which an attempt runs and looks dead,
and no process id that another process got in the meantime is ever sent a signal.
"""

import fcntl
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from logitlake_shared.config import to_toml
from logitlake_shared.file_locks import try_lock
from logitlake_shared.jobs.progress import VARIABLE
from logitlake_shared.jobs.records import Job
from logitlake_shared.jobs.runner import CommandOf, Look

__all__ = ["ProcessRunner"]

_LOOK_BYTES = 2**20
# The lock's number in an attempt's process.
_LOCK = 3


class ProcessRunner:
    """Implements `Runner` below `folder`."""

    def __init__(self, folder: Path, command_of: CommandOf) -> None:
        self._folder, self._command_of = folder.resolve(), command_of

    def start(self, job: Job, number: int) -> None:
        """See `Runner.start`."""
        folder = self._attempt(job, number)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = folder / "config.toml"
        config.write_text(to_toml(job.config), encoding="utf-8")
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            command = [sys.executable, "-m", "logitlake_shared.jobs.attempt", str(_LOCK), str(folder)]
            process = os.posix_spawn(
                sys.executable,
                [*command, *self._command_of(job, config)],
                os.environ | {VARIABLE: "1", "PYTHONUNBUFFERED": "1"},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                    (os.POSIX_SPAWN_DUP2, lock, _LOCK),
                ],
                setsid=True,  # a Ctrl-C in the service's terminal is not for it
            )
            os.pwrite(lock, str(process).encode(), 0)
            threading.Thread(target=_reap, args=(process,), name=f"waits for {process}", daemon=True).start()
        finally:
            os.close(log)
            os.close(lock)

    def look(self, job: Job, number: int, log_offset: int) -> Look:
        """See `Runner.look`."""
        folder = self._attempt(job, number)
        is_alive = _is_locked(folder / "lock")  # before the log is read: what it says last must not be missed
        code = None
        with suppress(FileNotFoundError):
            code = json.loads((folder / "end.json").read_bytes())["exit_code"]
        return Look(is_alive, None if is_alive else code, _read(folder / "log", log_offset, _LOOK_BYTES))

    def stop(self, job: Job, number: int, *, now: bool) -> None:
        """See `Runner.stop`."""
        folder = self._attempt(job, number)
        with suppress(FileNotFoundError, ValueError, ProcessLookupError):
            process = int((folder / "lock").read_bytes())
            handle = os.pidfd_open(process)
            try:
                if not _is_locked(folder / "lock"):
                    return  # the id may be another's by now
                if now:
                    os.killpg(process, signal.SIGKILL)
                else:
                    signal.pidfd_send_signal(handle, signal.SIGTERM)
            finally:
                os.close(handle)

    def log_tail(self, job: Job, number: int, num_bytes: int) -> bytes:
        """See `Runner.log_tail`."""
        path = self._attempt(job, number) / "log"
        with suppress(FileNotFoundError):
            return _read(path, max(0, path.stat().st_size - num_bytes), num_bytes)
        return b""

    def _attempt(self, job: Job, number: int) -> Path:
        return self._folder / job.id / str(number)


def _reap(process: int) -> None:
    """Waits for a child to end: whatever is looked at afterwards, it does not stay behind as a zombie."""
    with suppress(ChildProcessError):  # where children are reaped by themselves (SIGCHLD is ignored)
        os.waitpid(process, 0)


def _is_locked(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(lock)
    finally:
        os.close(lock)


def _read(path: Path, offset: int, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(num_bytes)
    except FileNotFoundError:
        return b""
