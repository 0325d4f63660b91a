"""One question on its way through a pool, and its answer as it is read.

A question ends once, for one reason: it was answered, it failed, its time was over, somebody cancelled it, the pool was
closed. Whoever finds the reason first ends it; the process is killed then, and the place is free.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa

from logitlake_shared.errors import (
    LogitLakeError,
    QueryCancelledError,
    QueryCrashedError,
    QueryError,
    QueryTimeoutError,
)
from logitlake_shared.sql_service.process import TooLateError, WorkerEndedError, WorkerProcess, raised_again
from logitlake_shared.sql_service.records import SqlRequest

__all__ = ["Query", "Reason", "SqlResult"]

Reason = Literal["", "answered", "failed", "timeout", "cancelled", "closed"]


class Query:
    """A question. `finished` is called once, when it ends."""

    def __init__(self, request: SqlRequest, finished: Callable[["Query"], None]) -> None:
        assert request.timeout_s is not None
        assert request.max_bytes is not None
        self.query_id = request.query_id
        self.started = time.monotonic()
        self.deadline = self.started + request.timeout_s
        self.runs = False
        self.worker: WorkerProcess | None = None
        self.reason: Reason = ""
        self._timeout_s, self._max_bytes = request.timeout_s, request.max_bytes
        self._finished = finished
        self._lock = threading.Lock()

    def seconds_left(self) -> float:
        """Until its deadline."""
        return max(0.0, self.deadline - time.monotonic())

    def end(self, reason: Reason) -> bool:
        """Ends it for this reason; False when it ended before."""
        with self._lock:
            if self.reason:
                return False
            self.reason = reason
        worker = self.worker
        if worker is not None:
            worker.kill()
        self._finished(self)
        return True

    def begin(self) -> "SqlResult":
        """The answer, once its schema is known. Raises as `SqlPool.run` does."""
        said = self._json(self.next_frame(b"S")[1])
        schema = _read_stream(self.next_frame(b"A")[1]).schema
        snapshot = said.get("snapshot")
        if not isinstance(snapshot, dict) or not all(isinstance(number, int) for number in snapshot.values()):
            raise WorkerEndedError("gave an answer that is none")
        return SqlResult(self, schema, snapshot)

    def next_frame(self, expected: bytes) -> tuple[bytes, bytes]:
        """The next frame, whose kind must be one of `expected`. Raises as `SqlPool.run` does."""
        if self.reason or self.worker is None:
            raise self.explained(None)
        kind, payload = self.worker.read_frame(self.deadline, self._max_bytes)
        if kind == b"X":
            raise raised_again(payload)
        if kind not in expected:
            raise WorkerEndedError("gave an answer that is none")
        return kind, payload

    def explained(self, error: Exception | None) -> LogitLakeError:
        """The error of a question that did not end well; ends it if that is news."""
        self.end("timeout" if isinstance(error, TooLateError) else "failed")
        match self.reason:
            case "timeout":
                return QueryTimeoutError(
                    f"the question was not answered and read in {self._timeout_s:g} s; ask for less, or raise timeout_s"
                )
            case "cancelled":
                return QueryCancelledError("the question was cancelled")
            case "closed":
                return QueryCancelledError("the question was ended because the service stops")
            case "answered":
                return QueryError("the answer was read already; keep its batches, or ask again")
        return QueryCrashedError(
            f"the worker {error}; often a question that needs too much memory does that. Ask again, or ask for less"
        )

    def release(self) -> None:
        """Gives back what the process held. After `end`, by the one who reads."""
        if self.worker is not None:
            self.worker.close()

    @staticmethod
    def _json(payload: bytes) -> dict[str, Any]:
        try:
            said = json.loads(payload)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise WorkerEndedError("gave an answer that is none")
        return said


class SqlResult:
    """An answer: its schema and, read once, its batches. Close it, or read it to its end.

    `rows`, `truncated` and `milliseconds` are those of the whole answer after the last batch; until then they say what
    was read so far.
    """

    def __init__(self, query: Query, schema: pa.Schema, snapshot: dict[str, int]) -> None:
        self.query_id = query.query_id
        self.schema = schema
        self.snapshot = snapshot
        """the caches that were asked, and the snapshot of each"""
        self.truncated = ""
        """"rows" or "bytes", the limit that cut the answer short; empty where none did"""
        self.rows = 0
        self.milliseconds = 0.0
        """from the worker's reading of the question to the last batch"""
        self._query = query

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """The batches. Raises as `SqlPool.run` does."""
        query = self._query
        try:
            while True:
                kind, payload = query.next_frame(b"AE")
                if kind == b"E":
                    self._end(query, payload)
                    return
                for batch in _read_stream(payload):
                    if batch.schema != self.schema:
                        raise WorkerEndedError("gave an answer that is none")
                    self.rows += batch.num_rows
                    yield batch
        except (TooLateError, WorkerEndedError) as error:
            raise query.explained(error) from error
        except LogitLakeError:
            query.end("failed")
            raise
        finally:
            self.close()

    def read_all(self) -> pa.Table:
        """The whole answer."""
        return pa.Table.from_batches(list(self), self.schema)

    def close(self) -> None:
        """Ends the question if it has not ended. Calling it twice is fine."""
        self._query.end("cancelled")
        self._query.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end(self, query: Query, payload: bytes) -> None:
        said = query._json(payload)
        try:
            self.truncated = {"": "", "rows": "rows", "bytes": "bytes"}[said["truncated"]]
            self.milliseconds = float(said["milliseconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise WorkerEndedError("gave an answer that is none") from error
        query.end("answered")


def _read_stream(payload: bytes) -> pa.RecordBatchReader:
    """An Arrow stream of a process that is not trusted: every offset in it is checked."""
    try:
        reader = pa.ipc.open_stream(pa.py_buffer(payload))
        batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
        _check_names(reader.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise WorkerEndedError("gave an answer that is none") from error
    return pa.RecordBatchReader.from_batches(reader.schema, batches)


def _check_names(fields: Iterable[pa.Field]) -> None:
    """Raises `UnicodeDecodeError` for a name that is none, wherever it is nested."""
    for field in fields:
        _ = field.name
        _check_names(field.type.field(place) for place in range(field.type.num_fields))
