"""A process in a worker's sandbox, which then tries what a worker never does. Run by `test_sandbox.py`.

    python prisoner.py <lake> <pid of somebody else> <SQL that is run without gate and lock, as a JSON list>

Prints one JSON object: the layers, and for each attempt what came of it: "done", or the name of the error.
"""

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb

from logitlake_shared.sql_service.nursery import connect
from logitlake_shared.sql_service.records import SqlLimits
from logitlake_shared.sql_service.sandbox import enter_early, enter_own
from logitlake_shared.sql_service.worker import _restrict

_MEMORY_MIB = 256


def main() -> None:
    """The program."""
    lake, other, statements = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    given: dict[str, Any] = SqlLimits().model_dump() | {"memory_mib": _MEMORY_MIB}
    library = ctypes.CDLL(None, use_errno=True)
    layers = enter_early(network=False)
    connection = connect(given)
    layers += enter_own() + _restrict(str(lake), ("main",), given, cpu_s=60)

    def in_thread(attempt: Callable[[], object]) -> object:
        failed: list[BaseException] = []

        def run() -> None:
            try:
                attempt()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return None

    def system_call(name: str, *arguments: Any) -> None:
        if getattr(library, name)(*arguments) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def allocate() -> None:
        bytes((_MEMORY_MIB + 64) << 20)

    def many_files() -> None:
        for _ in range(300):
            os.open(lake / "lake.json", os.O_RDONLY)

    spec = lake / "caches/main/spec.json"
    attempts: dict[str, Callable[[], object]] = {
        # what a worker does
        "read the manifest": (lake / "lake.json").read_bytes,
        "read its cache": spec.read_bytes,
        "list its cache": lambda: list((lake / "caches/main/shards").iterdir()),
        "start a thread": lambda: in_thread(lambda: None),
        "look at a descriptor": lambda: (fcntl.fcntl(0, fcntl.F_GETFL), os.set_blocking(1, True)),
        "ask DuckDB": lambda: connection.execute("SELECT 1").fetchall(),
        # reading
        "read another cache": (lake / "caches/hidden/spec.json").read_bytes,
        "list the caches": lambda: list((lake / "caches").iterdir()),
        "read a file": Path("/etc/passwd").read_bytes,
        "read a file in a thread": lambda: in_thread(Path("/etc/passwd").read_bytes),
        "read a module": Path(os.__file__).read_bytes,
        "read its environment": Path("/proc/self/environ").read_bytes,
        "read another's environment": Path(f"/proc/{other}/environ").read_bytes,
        "read another's memory": Path(f"/proc/{other}/mem").read_bytes,
        # writing
        "write into the lake": lambda: (lake / "new").write_bytes(b"x"),
        "write over a file": lambda: spec.write_bytes(b""),
        "append to a file": lambda: os.open(spec, os.O_RDONLY | os.O_APPEND),
        "truncate a file": lambda: os.truncate(spec, 0),
        "write elsewhere": lambda: Path("/tmp/stolen").write_bytes(b"x"),
        "make an unnamed file": lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR),
        "make a folder": lambda: (lake / "folder").mkdir(),
        "remove a file": spec.unlink,
        "rename a file": lambda: spec.rename(spec.with_name("other")),
        "link a file": lambda: os.link(spec, lake / "linked"),
        "make a symbolic link": lambda: (lake / "symbolic").symlink_to(spec),
        "change rights": lambda: spec.chmod(0o777),
        "change times": lambda: os.utime(spec, (0, 0)),
        "make a pipe with a name": lambda: os.mkfifo(lake / "pipe"),
        "make a file in memory": lambda: os.memfd_create("x"),
        # the network
        "open a socket": lambda: socket.socket(socket.AF_INET),
        "open a local socket": lambda: socket.socket(socket.AF_UNIX),
        "open a pair of sockets": socket.socketpair,
        # processes and rights
        "fork": os.fork,
        "start a program": lambda: subprocess.run(["/bin/true"], check=True),
        "replace itself": lambda: os.execv("/bin/true", ["/bin/true"]),
        "ask whether another is there": lambda: os.kill(other, 0),
        "end another": lambda: os.kill(other, signal.SIGTERM),
        "have another signalled": lambda: fcntl.fcntl(0, fcntl.F_SETOWN, other),
        "choose the signal": lambda: fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL),
        "have another signalled in an older way": lambda: fcntl.ioctl(0, 0x8901, struct.pack("i", other)),
        "trace another": lambda: system_call("ptrace", 16, other, 0, 0),
        "leave its session": os.setsid,
        "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)),
        "raise a limit in DuckDB's way": lambda: system_call(
            "prlimit", 0, resource.RLIMIT_NOFILE, ctypes.byref((ctypes.c_ulong * 2)(1 << 20, 1 << 20)), None
        ),
        "become another user": lambda: os.setuid(1),
        "get a namespace": lambda: system_call("unshare", 0x10000000),
        "mount": lambda: system_call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
        # how much
        "take memory": allocate,
        "open many files": many_files,
    }
    outcome = {name: _outcome(attempt) for name, attempt in attempts.items()}
    answers = {sql: _answer(connection, sql) for sql in statements}
    layers_said = [vars(layer) for layer in layers]
    os.write(1, json.dumps({"layers": layers_said, "attempts": outcome, "answers": answers}).encode())
    os._exit(0)


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except BaseException as error:
        return type(error).__name__
    return "done"


def _answer(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    try:
        rows = connection.execute(sql).fetchall()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return f"answered: {str(rows)[:2000]}"


main()
