"""Processes as the pool sees them: a nursery that forks workers, and a worker that is asked, heard, killed.

The pool imports no DuckDB: what can crash is on the other side of two pipes. Nothing that comes through them is
believed: a frame has a kind and a length that it may have, a message is text, an error one of a list.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logitlake_shared import errors
from logitlake_shared.errors import LogitLakeError, QueryCrashedError
from logitlake_shared.pipes import how_it_ended, ready_by, write_by
from logitlake_shared.sql_service.records import FRAME_HEADER, MESSAGE, SqlLimits, is_remote

__all__ = ["Nursery", "TooLateError", "WorkerEndedError", "WorkerProcess", "raised_again"]

# Arrow imports pandas where it is installed; a worker has no use for it, and all is there in two thirds of the time.
_PROGRAM = """
import sys
class NoPandas:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "pandas":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPandas)
from logitlake_shared.sql_service.nursery import main
main()
"""
# A frame holds at most one batch, with what Arrow puts around it.
_FRAME_EXTRA_BYTES = 2**20
# From the signal that nobody can refuse, or from the end of its output, to its end.
_END_TIMEOUT_S = 5.0
_CODES = 4096
# A fork takes milliseconds; a machine that swaps takes its time.
_FORK_TIMEOUT_S = 10.0
_STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_", "OBJECT_STORE_", "SSL_CERT_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_RAISED = frozenset(
    {
        "ConfigError",
        "LakeConflictError",
        "LakeCorruptError",
        "LakeError",
        "LakeFormatError",
        "FingerprintMismatchError",
        "NotInLakeError",
        "QueryCrashedError",
        "QueryError",
        "QueryMemoryError",
        "QueryRefusedError",
        "QueryTooLargeError",
    }
)


class WorkerEndedError(Exception):
    """The worker ended, or said what no worker says; the message continues "the worker …"."""


class TooLateError(Exception):
    """The worker did not say anything by the deadline."""


class Nursery:
    """The process that forks workers.

    `changed` is called by a thread of its own when the process is ready, and when it ended.
    """

    def __init__(self, lake: str, limits: SqlLimits, changed: Callable[[], object]) -> None:
        self._changed = changed
        self._state = threading.Condition()
        self._ready = self._gone = False
        self._forked: list[tuple[int, int]] = []
        self._codes: dict[int, int] = {}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-P", "-c", _PROGRAM, json.dumps(limits.model_dump() | {"lake": lake})],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(remote=is_remote(lake)),
                cwd="/",
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, name="sql-nursery", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return int(self._process.pid)

    @property
    def is_ready(self) -> bool:
        """Whether it can fork workers now."""
        return self._ready and not self._gone

    @property
    def is_gone(self) -> bool:
        """Whether it ended."""
        return self._gone

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether it is ready, at the latest after so long."""
        with self._state:
            self._state.wait_for(lambda: self._ready or self._gone, timeout_s)
            return self.is_ready

    def spawn(self) -> "WorkerProcess":
        """A new worker, in milliseconds. One thread at a time. Raises `WorkerEndedError`."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                requests, to_worker = _pipe(theirs, ours)
                replies, from_worker = reversed(_pipe(ours, theirs))
                socket.send_fds(self._socket, [MESSAGE.pack(b"F", 0, 0)], [requests, replies])
            except OSError as error:
                raise WorkerEndedError(f"could not be forked: {error}") from error
            with self._state:
                if not self._state.wait_for(lambda: self._forked or self._gone, _FORK_TIMEOUT_S) or self._gone:
                    raise WorkerEndedError("could not be forked: the process that does it ended or hangs")
                pid, number = self._forked.pop()
                if not pid:
                    raise WorkerEndedError(f"could not be forked: {os.strerror(number)}")
                self._codes.pop(pid, None)
            ours.pop_all()
            return WorkerProcess(self, pid, to_worker, from_worker)

    def code_of(self, pid: int, timeout_s: float) -> int | None:
        """The code that a worker ended with, or minus the signal; None while it has not, or where nobody knows."""
        with self._state:
            self._state.wait_for(lambda: pid in self._codes or self._gone, timeout_s)
            return self._codes.get(pid)

    def has_ended(self, pid: int) -> bool:
        """Whether it is known that a worker ended."""
        return pid in self._codes

    def close(self) -> None:
        """Ends it. Workers that wait end by themselves when their pipes are closed. Calling it twice is fine."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._listener.join()
        self._socket.close()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def last_words(self) -> str:
        """What it wrote before it was ready, if it ended then: the last line of a traceback."""
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        text = (self._process.stderr.read() or b"").decode(errors="replace").strip()
        return text.rsplit("\n", 1)[-1][:500] or "it ended without a word"

    def _listen(self) -> None:
        while True:
            message = b""
            with contextlib.suppress(OSError):
                message = self._socket.recv(MESSAGE.size)
            with self._state:
                if len(message) == MESSAGE.size:
                    kind, number, more = MESSAGE.unpack(message)
                    if kind == b"R":
                        self._ready = True
                    elif kind == b"P":
                        self._forked.append((number, more))
                    elif kind == b"X":
                        self._codes[number] = more
                        while len(self._codes) > _CODES:  # of workers that nobody asks about any longer
                            del self._codes[next(iter(self._codes))]
                else:
                    self._gone = True
                self._state.notify_all()
            if self._gone or message[:1] == b"R":
                self._changed()
            if self._gone:
                return


class WorkerProcess:
    """One worker and the pipes to it. Killing and closing are safe from any thread; one at a time reads."""

    def __init__(self, nursery: Nursery, pid: int, to_worker: int, from_worker: int) -> None:
        self.pid = pid
        self._nursery, self._in, self._out = nursery, to_worker, from_worker
        self._received = bytearray()
        self._closed = False
        self._life, self._pipes = threading.Lock(), threading.Lock()
        # A number may be another process's one day; this is always the same one. None on kernels before 5.3.
        try:
            self._handle: int | None = os.pidfd_open(pid)
        except (AttributeError, OSError):
            self._handle = None
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)

    @property
    def output(self) -> int:
        """The descriptor that its frames come from."""
        return self._out

    def send(self, data: bytes, deadline: float) -> None:
        """Raises `WorkerEndedError`, `TooLateError`."""
        with self._pipes:
            self._check_open()
            try:
                if not write_by(self._in, data, deadline):
                    raise TooLateError("did not answer")
            except OSError as error:
                raise WorkerEndedError(self._how_it_ended()) from error

    def read_frame(self, deadline: float, max_bytes: int = 0) -> tuple[bytes, bytes]:
        """The next frame: its kind and payload. Raises `WorkerEndedError`, `TooLateError`."""
        with self._pipes:
            kind, size = FRAME_HEADER.unpack(self._read(FRAME_HEADER.size, deadline))
            if size > max_bytes + _FRAME_EXTRA_BYTES:
                raise WorkerEndedError("gave an answer that is none")
            return kind, self._read(size, deadline)

    def kill(self) -> None:
        """Ends it at once. The pipes stay open for who reads them."""
        with self._life, contextlib.suppress(ProcessLookupError, PermissionError):
            if self._closed or self._nursery.has_ended(self.pid):
                return
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        """Waits until it ended, at most so long."""
        if self._handle is None:
            self._nursery.code_of(self.pid, timeout_s)
        elif not self._closed:
            poll = select.poll()
            poll.register(self._handle, select.POLLIN)
            poll.poll(timeout_s * 1000)

    def close(self) -> None:
        """Ends it, waits for its end and closes the pipes. Calling it twice is fine."""
        if self._closed:
            return
        self.kill()
        self.wait(_END_TIMEOUT_S)
        # Whoever reads is at the end of the pipe now; a number must not become another file's while it is read.
        with self._pipes, self._life:
            self._close_pipes()

    def __del__(self) -> None:
        # An answer that nobody read to its end or closed.
        self._close_pipes()

    def _close_pipes(self) -> None:
        if not self._closed:
            self._closed = True
            for handle in (self._in, self._out, self._handle):
                if handle is not None:
                    os.close(handle)

    def _read(self, size: int, deadline: float) -> bytes:
        while len(self._received) < size:
            self._check_open()
            if not ready_by(self._out, select.POLLIN, deadline):
                raise TooLateError("did not answer")
            try:
                part = os.read(self._out, max(65536, size - len(self._received)))
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerEndedError("cannot be heard any longer") from error
            if not part:
                raise WorkerEndedError(self._how_it_ended())
            self._received += part
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerEndedError("was closed")

    def _how_it_ended(self) -> str:
        code = self._nursery.code_of(self.pid, _END_TIMEOUT_S)
        return "ended" if code is None else how_it_ended(code)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose ends are closed with these stacks."""
    read, write = os.pipe()
    reader.callback(os.close, read)
    writer.callback(os.close, write)
    return read, write


def raised_again(payload: bytes) -> LogitLakeError:
    """The error that a worker explained; one that it cannot have is a crash."""
    try:
        said: dict[str, Any] = json.loads(payload)
        name, message = str(said["error"]), str(said["message"])
    except (ValueError, KeyError, TypeError):
        return QueryCrashedError("the worker gave an answer that is none; ask again")
    cls = getattr(errors, name) if name in _RAISED else QueryCrashedError
    # Messages quote what people wrote; no terminal is to obey it.
    error: LogitLakeError = cls("".join(char if char.isprintable() or char == "\n" else "?" for char in message))
    return error


def _environment(*, remote: bool) -> dict[str, str]:
    """Nothing of this process's, but where modules are; the store's own variables where the lake is in a store."""
    kept = {"PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)}
    if libraries := os.environ.get("LD_LIBRARY_PATH"):
        kept["LD_LIBRARY_PATH"] = libraries
    # Threads of libraries take memory that the question could have, and Landlock binds only those started after it.
    kept |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "TZ": "UTC"}
    kept |= {"LC_CTYPE": "C.UTF-8", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    if remote:
        kept |= {name: value for name, value in os.environ.items() if name.upper().startswith(_STORE_VARIABLES)}
    return kept
