"""The answer to a question in SQL, read while it comes.

An answer is whole or an error: a stream that breaks off raises, it never looks like a shorter table. What the service
cut short at a limit says so in `truncated`, once it was read.
"""

import io
import json
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx
import pyarrow as pa

from logitlake_shared.client.transport import Transport
from logitlake_shared.errors import ServiceError

if TYPE_CHECKING:
    import pandas
    import polars

__all__ = ["SqlAnswer"]

_MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_PIECE = 2**16


class SqlAnswer:
    """One answer: a context manager, whose batches can be read once. Closing it before its end ends the question."""

    def __init__(self, transport: Transport, body: dict[str, Any]) -> None:
        self._open = transport.stream("POST", "/v1/sql", json=body, headers={"Accept": _MEDIA_TYPE})
        answer = self._open.__enter__()
        self._is_closed = False
        self.truncated: str | None = None
        """the limit that cut it short (`rows`, `bytes`), once it was read"""
        self.milliseconds: float | None = None
        """that the service took, once it was read"""
        try:
            # Buffered, because Arrow takes a short read for the end.
            self._reader = pa.ipc.open_stream(io.BufferedReader(_Body(answer), _PIECE))
            self.schema: pa.Schema = self._reader.schema.remove_metadata()
            metadata = {key.decode(): value.decode() for key, value in (self._reader.schema.metadata or {}).items()}
            self.query_id = metadata["logitlake.query_id"]
            """its id in the service's log"""
            self.snapshot: dict[str, int] = json.loads(metadata["logitlake.snapshot"])
            """of each cache, the snapshot that was asked"""
        except BaseException as error:
            self._close(error)
            if isinstance(error, pa.ArrowInvalid | OSError):
                raise _broken(error) from error
            if isinstance(error, KeyError | ValueError):
                raise ServiceError(
                    f"{transport.address}: an answer in Arrow that is none of a LogitLake service"
                ) from error
            raise

    def __enter__(self) -> "SqlAnswer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """The batches, once. Raises `ServiceError` where the answer breaks off."""
        if self._is_closed:
            closed = ServiceError("the answer was read, or closed: keep its table, or ask again")
            closed.code = "answered"
            raise closed
        num_rows = 0
        try:
            while True:
                batch, end = self._reader.read_next_batch_with_custom_metadata()
                if end is not None:
                    if num_rows != int(end[b"logitlake.num_rows"]):
                        raise OSError(f"{num_rows} rows of {int(end[b'logitlake.num_rows'])} came")
                    self.truncated = end[b"logitlake.truncated"].decode() or None
                    self.milliseconds = float(end[b"logitlake.milliseconds"])
                    return
                num_rows += batch.num_rows
                yield batch.replace_schema_metadata(None)
        except (StopIteration, pa.ArrowInvalid, OSError) as error:
            raise _broken(error) from error
        finally:
            self.close()  # also where somebody leaves early

    def reader(self) -> pa.RecordBatchReader:
        """Its batches, for whatever reads Arrow."""
        return pa.RecordBatchReader.from_batches(self.schema, iter(self))

    def arrow(self) -> pa.Table:
        """All of it as an Arrow table."""
        return pa.Table.from_batches(list(self), self.schema)

    def pandas(self) -> "pandas.DataFrame":
        """All of it as a frame of pandas."""
        return self.arrow().to_pandas()

    def polars(self) -> "polars.DataFrame":
        """All of it as a frame of polars."""
        import polars

        frame = polars.from_arrow(self.arrow())
        assert isinstance(frame, polars.DataFrame)
        return frame

    def rows(self) -> list[dict[str, Any]]:
        """All of it as dicts."""
        rows: list[dict[str, Any]] = self.arrow().to_pylist()
        return rows

    def close(self) -> None:
        """Hangs up: a question that goes on ends."""
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        self._is_closed = True
        self._open.__exit__(None if error is None else type(error), error, None)


class _Body(io.RawIOBase):
    """The bytes of an answer as a file, without holding more than a piece."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__()
        self._pieces, self._left = answer.iter_bytes(_PIECE), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._left:
            try:
                self._left = memoryview(next(self._pieces))
            except StopIteration:
                return 0
            except httpx.HTTPError as error:
                raise OSError(f"the connection broke: {error}") from error
        num = min(len(buffer), len(self._left))
        buffer[:num] = self._left[:num]
        self._left = self._left[num:]
        return num


def _broken(error: BaseException) -> ServiceError:
    broken = ServiceError(f"the answer broke off before its end: {error or 'the connection was closed'}; ask again")
    broken.code, broken.retryable = "interrupted", True
    return broken
