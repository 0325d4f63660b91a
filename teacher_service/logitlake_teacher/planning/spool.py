"""Rows on disk, in 256 buckets by the first byte of their order key: a sort that never holds more than a bucket.

The keys are digests, so the buckets are about equal and reading them one after the other, each sorted, is reading
everything sorted. Rows are gathered until they are worth writing; what a plan of any size holds in memory is that
buffer, and then one bucket or as many small ones as make a few megabytes.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from logitlake_teacher.planning.rows import DIGEST_BYTES

__all__ = ["NUM_BUCKETS", "Spool"]

NUM_BUCKETS = 256
_BUFFER_BYTES = 8 * 2**20
# Of a table that is read back, at least, where there is as much: a bucket or several.
_TABLE_BYTES = 4 * 2**20
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


class Spool:
    """Append rows, then read the buckets; the folder is the caller's to remove."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._schema = schema
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._buffer: list[pa.RecordBatch] = []
        self._buffer_bytes = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_writers()

    def append(self, rows: pa.RecordBatch) -> None:
        """Takes the rows, in any order."""
        self._buffer.append(rows)
        self._buffer_bytes += rows.get_total_buffer_size()
        if self._buffer_bytes >= _BUFFER_BYTES:
            self._write()

    def buckets(self) -> Iterator[pa.Table]:
        """All rows, sorted by order key and id, some at a time; a key is never split over two tables."""
        if not self._writers:
            # It all fits the buffer: one bucket, which need not be written.
            rows, self._buffer = pa.Table.from_batches(self._buffer, self._schema), []
            if rows.num_rows:
                yield _sorted(rows)
            return
        self._write()
        self._close_writers()
        waiting: list[pa.Table] = []
        for number in range(NUM_BUCKETS):
            path = self._path(number)
            if path.exists():
                with pa.ipc.open_stream(path) as reader:
                    waiting.append(reader.read_all())
                path.unlink()
            # Small buckets are sorted together: what is done to a table costs more than what is done to its rows.
            if sum(rows.get_total_buffer_size() for rows in waiting) >= _TABLE_BYTES:
                yield _sorted(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            yield _sorted(pa.concat_tables(waiting))

    def _write(self) -> None:
        if not self._buffer:
            return
        rows = pa.Table.from_batches(self._buffer, self._schema).combine_chunks()
        self._buffer, self._buffer_bytes = [], 0
        keys = rows.column("order_key").chunk(0)
        bucket_N = np.frombuffer(keys.buffers()[1], np.uint8).reshape(-1, DIGEST_BYTES)[: len(keys), 0]
        order_N = np.argsort(bucket_N, kind="stable")
        rows = rows.take(pa.array(order_N))
        numbers, starts = np.unique(bucket_N[order_N], return_index=True)
        stops = np.append(starts[1:], len(order_N))
        for number, start, stop in zip(numbers.tolist(), starts.tolist(), stops.tolist(), strict=True):
            self._writer(number).write_table(rows.slice(start, stop - start))

    def _writer(self, number: int) -> pa.ipc.RecordBatchStreamWriter:
        if number not in self._writers:
            self._writers[number] = pa.ipc.new_stream(self._path(number), self._schema, options=_OPTIONS)
        return self._writers[number]

    def _path(self, number: int) -> Path:
        return self._folder / f"bucket-{number:03d}.arrow"

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def _sorted(rows: pa.Table) -> pa.Table:
    return rows.sort_by([("order_key", "ascending"), ("item_id", "ascending")])
