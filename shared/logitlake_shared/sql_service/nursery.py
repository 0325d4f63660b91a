"""The program of a nursery: a process that is ready to answer, never does, and forks the workers that do.

    python -c 'from logitlake_shared.sql_service.nursery import main; main()' <the lake and its limits, as JSON>

Importing DuckDB, Arrow and the lake's reader takes a second of processor time, forking some milliseconds. A process
must have one thread when it forks, and no question may ever have touched it: so the nursery holds an engine without
threads, reads no lake and no SQL, and only hears which pipes a new worker shall have.

Standard input is a socket to the pool; each message is `<kind: 1 byte> <number: 4 bytes> <number: 4 bytes>`:

    from the pool   F  fork a worker with the two descriptors that come along
    to the pool     R  ready, once
                    P  the worker's process, or 0 and the error number
                    X  a process that ended, and how: its code, or minus the signal

It ends when the pool does.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import duckdb

from logitlake_shared.sql_service.gate import Gate
from logitlake_shared.sql_service.records import MESSAGE, is_remote
from logitlake_shared.sql_service.sandbox import enter_early
from logitlake_shared.sql_service.worker import serve

__all__ = ["connect", "main"]

# What others import on the way, when no file of Python's can be read any longer.
_IMPORTED_BEFORE = ("numpy.ma", "pyarrow.acero")


def main() -> NoReturn:
    """The program."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    pool = socket.socket(fileno=0)
    layers = enter_early(network=is_remote(given["lake"]))
    for module in _IMPORTED_BEFORE:
        import_module(module)
    connection = connect(given)
    Gate(connection).judge("SELECT 1")
    _silence()
    wake, woken = os.pipe()
    for handle in (wake, woken):
        os.set_blocking(handle, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Workers share the memory of what is never written again.
    gc.collect()
    gc.freeze()
    pool.send(MESSAGE.pack(b"R", 0, 0))
    while True:
        handles = _next(pool, wake)
        if handles is None:
            os._exit(0)
        pid = _fork(pool, handles)
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(handles[0], 0)
            os.dup2(handles[1], 1)
            serve(connection, given, layers)
        for handle in handles:
            os.close(handle)


def connect(given: dict[str, Any]) -> duckdb.DuckDBPyConnection:
    """An empty database: no spilling, no extensions, no secrets, a share of the memory.

    DuckDB looks for its cgroup when it starts, and ends the process where it must not; so it starts before the sandbox,
    and without a thread of its own, which a fork would lose and Landlock would not bind.
    """
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": 1,
        "async_threads": 0,
        "memory_limit": f"{given['memory_mib'] // 2}MiB",
        "temp_directory": "",
        "max_temp_directory_size": "0B",
        "allow_community_extensions": False,
        "allow_persistent_secrets": False,
        "enable_external_file_cache": False,
    }
    return duckdb.connect(":memory:", config=settings)


def _fork(pool: socket.socket, handles: list[int]) -> int:
    """As `os.fork`; -1 where there is none. The pool is told."""
    if len(handles) != 2:
        pool.send(MESSAGE.pack(b"P", 0, 0))
        return -1
    try:
        pid = os.fork()
    except OSError as error:
        pool.send(MESSAGE.pack(b"P", 0, error.errno or 0))
        return -1
    if pid:
        pool.send(MESSAGE.pack(b"P", pid, 0))
    return pid


def _next(pool: socket.socket, wake: int) -> list[int] | None:
    """The descriptors of the next worker; None when the pool is gone. Tells of processes that end meanwhile."""
    poll = select.poll()
    poll.register(pool, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        ready = {handle for handle, _ in poll.poll()}
        if wake in ready:
            os.read(wake, 4096)
            _tell_ended(pool)
        if pool.fileno() in ready:
            message, handles, _, _ = socket.recv_fds(pool, MESSAGE.size, 2)
            return handles if message else None


def _tell_ended(pool: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        pool.send(MESSAGE.pack(b"X", pid, os.waitstatus_to_exitcode(status)))


def _silence() -> None:
    """Standard output and error go nowhere: nobody reads them from now on."""
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
