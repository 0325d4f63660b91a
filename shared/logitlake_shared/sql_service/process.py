"""One worker process as the pool sees it: started, asked, heard, killed.

The pool imports no DuckDB: what can crash is on the other side of two pipes. Nothing that comes through them is
believed: a frame has a kind and a length that it may have, a message is text, an error one of a list.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitlake_shared import errors
from logitlake_shared.errors import LogitLakeError, QueryCrashedError
from logitlake_shared.sql_service.records import FRAME_HEADER, SqlLimits

__all__ = ["TooLateError", "WorkerEndedError", "WorkerProcess", "raised_again"]

# Arrow imports pandas where it is installed; a worker has no use for it, and starts in two thirds of the time without.
_PROGRAM = """
import sys
class NoPandas:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "pandas":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPandas)
from logitlake_shared.sql_service.worker import main
main()
"""
# A frame holds at most one batch, with what Arrow puts around it.
_FRAME_EXTRA_BYTES = 2**20
# From the signal that nobody can refuse, or from the end of its output, to its end.
_END_TIMEOUT_S = 5.0
_STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_", "OBJECT_STORE_", "SSL_CERT_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_RAISED = frozenset(
    {
        "ConfigError",
        "LakeConflictError",
        "LakeCorruptError",
        "LakeError",
        "LakeFormatError",
        "FingerprintMismatchError",
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


class WorkerProcess:
    """One process and the pipes to it. Killing is safe from any thread; the pipes have one user at a time."""

    def __init__(self, lake: str, limits: SqlLimits, *, layers: bool = False) -> None:
        remote = "://" in lake and not lake.startswith("file://")
        given = asdict(limits) | {"lake": lake, "layers": layers}
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-P", "-c", _PROGRAM, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(remote=remote),
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._received = bytearray()
        # A number is only signalled while it is certainly this process's: until it is reaped, which happens under it.
        self._life = threading.Lock()

    @property
    def pid(self) -> int:
        """Its number, which is its session's and group's too."""
        return self._process.pid

    @property
    def output(self) -> int:
        """The descriptor that its frames come from."""
        return self._out

    def send(self, data: bytes, deadline: float) -> None:
        """Raises `WorkerEndedError`, `TooLateError`."""
        left = memoryview(data)
        while left:
            self._wait(self._in, select.POLLOUT, deadline)
            try:
                left = left[os.write(self._in, left) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerEndedError(self._how_it_ended()) from error

    def read_frame(self, deadline: float, max_bytes: int = 0) -> tuple[bytes, bytes]:
        """The next frame: its kind and payload. Raises `WorkerEndedError`, `TooLateError`."""
        kind, size = FRAME_HEADER.unpack(self._read(FRAME_HEADER.size, deadline))
        if size > max_bytes + _FRAME_EXTRA_BYTES:
            raise WorkerEndedError("gave an answer that is none")
        return kind, self._read(size, deadline)

    def kill(self) -> None:
        """Ends it, and whatever it may have started, at once. The pipes stay open for who reads them."""
        with self._life, contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> int | None:
        """The code that it ended with; None while it has not."""
        until = time.monotonic() + timeout_s
        while True:
            with self._life:
                code = self._process.poll()
            if code is not None or time.monotonic() > until:
                return code
            time.sleep(0.002)

    def close(self) -> None:
        """Ends it, waits for its end and closes the pipes."""
        self.kill()
        self.wait(_END_TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def last_words(self) -> str:
        """What it wrote before it was ready, if it ended then: the last line of a traceback."""
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        text = (self._process.stderr.read() or b"").decode(errors="replace").strip()
        return text.rsplit("\n", 1)[-1][:500]

    def _read(self, size: int, deadline: float) -> bytes:
        while len(self._received) < size:
            self._wait(self._out, select.POLLIN, deadline)
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

    def _wait(self, handle: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(handle, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TooLateError("did not answer")

    def _how_it_ended(self) -> str:
        code = self.wait(_END_TIMEOUT_S)
        if code is None:
            return "closed its output"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


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
