"""The units of a plan as one Arrow file: record batch i is unit i, read when its turn comes.

Beside it stands an index (id, items, tokens of each unit), small enough for memory at any size of plan.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from logitlake_schemas import CacheKind
from logitlake_teacher.items import Item, Unit
from logitlake_teacher.planning.rows import DIGEST_BYTES, items_of

__all__ = ["UnitsFile", "UnitsWriter"]

# Digits of a unit's content digest in its name. Its number comes first, so that names sort as the plan does.
_UNIT_DIGITS = 12
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")
_UNITS, _INDEX = "units.arrow", "index.arrow"


class UnitsWriter:
    """Takes rows in order and cuts them into units at the budget, between two images where that is possible."""

    def __init__(self, folder: Path, schema: pa.Schema, unit_tokens: int) -> None:
        self._folder = folder
        self._unit_tokens = unit_tokens
        self._writer = pa.ipc.new_file(folder / _UNITS, schema, options=_OPTIONS)
        self._pending: list[pa.Table] = []
        self._pending_digests: list[bytes] = []
        self._pending_rows = 0
        self._pending_tokens = 0
        self._ids: list[str] = []
        self._num_items: list[int] = []
        self._num_tokens: list[int] = []

    @property
    def num_units(self) -> int:
        """Units so far; all of them once the writer is closed."""
        return len(self._ids)

    def __enter__(self) -> "UnitsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._writer.close()
        index = pa.table({"unit_id": self._ids, "num_items": self._num_items, "num_tokens": self._num_tokens})
        with pa.ipc.new_file(self._folder / _INDEX, index.schema) as writer:
            writer.write_table(index)

    def add(self, rows: pa.Table, length_N: npt.NDArray[np.int64], digests: pa.Array) -> None:
        """The next rows in order, with the tokens and the digest (`DIGEST_BYTES` each) of each item."""
        if not rows.num_rows:
            return
        stops, tokens = self._groups(rows, length_N)
        tokens_before = np.append(0, np.cumsum(tokens))
        start = group = 0
        while True:
            # The groups up to `following` fit the unit; an empty unit takes one whatever its size.
            room = self._unit_tokens - self._pending_tokens
            following = int(np.searchsorted(tokens_before, tokens_before[group] + room, side="right")) - 1
            following = max(following, group)
            if following == group and not self._pending_rows:
                following = group + 1
            stop = int(stops[following - 1]) if following else 0
            self._take(rows, start, stop, int(tokens_before[following] - tokens_before[group]), digests)
            if following == len(tokens):
                return
            self._flush()
            start, group = stop, following

    def _groups(
        self, rows: pa.Table, length_N: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """End and tokens of the rows that share an order key; one by one if they do not fit a unit."""
        keys = rows.column("order_key").combine_chunks()
        key_N = np.frombuffer(keys.buffers()[1], f"V{DIGEST_BYTES}")[keys.offset : keys.offset + len(keys)]
        is_last_N = np.append(key_N[1:] != key_N[:-1], True)
        group_N = np.cumsum(is_last_N) - is_last_N
        tokens_G = np.bincount(group_N, length_N).astype(np.int64)
        is_stop_N = is_last_N | (tokens_G > self._unit_tokens)[group_N]
        stops = np.flatnonzero(is_stop_N) + 1
        return stops, np.diff(np.append(0, np.cumsum(length_N))[np.append(0, stops)])

    def _take(self, rows: pa.Table, start: int, stop: int, tokens: int, digests: pa.Array) -> None:
        if stop > start:
            self._pending.append(rows.slice(start, stop - start))
            self._pending_digests.append(bytes(digests.buffers()[1][start * DIGEST_BYTES : stop * DIGEST_BYTES]))
            self._pending_rows += stop - start
            self._pending_tokens += tokens

    def _flush(self) -> None:
        if self._pending:
            (batch,) = pa.concat_tables(self._pending).combine_chunks().to_batches()
            content = hashlib.sha256(b"".join(self._pending_digests)).hexdigest()
            self._ids.append(f"{len(self._ids):06d}-{content[:_UNIT_DIGITS]}")
            self._num_items.append(batch.num_rows)
            self._num_tokens.append(self._pending_tokens)
            self._writer.write_batch(batch)
        self._pending, self._pending_digests, self._pending_rows, self._pending_tokens = [], [], 0, 0


class UnitsFile(Sequence[Unit]):
    """The units of a plan, each read when it is asked for; nothing is kept."""

    def __init__(self, folder: Path, kind: CacheKind) -> None:
        self._kind = kind
        # Not mapped: the pages of a large plan would count as memory of this process.
        self._reader = pa.ipc.open_file(pa.OSFile(str(folder / _UNITS)))
        with pa.ipc.open_file(folder / _INDEX) as reader:
            index = reader.read_all()
        self.ids: list[str] = index.column("unit_id").to_pylist()
        self.num_items: list[int] = index.column("num_items").to_pylist()
        self.num_tokens: list[int] = index.column("num_tokens").to_pylist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> Unit:  # type: ignore[override]  # units are asked for one at a time
        unit_id = self.ids[place]
        rows = pa.Table.from_batches([self._reader.get_batch(place % len(self.ids))])
        return StoredUnit(unit_id, self._kind, rows)


class StoredUnit(Unit):
    """A unit of a plan on disk: rows, of which items are made when somebody asks for them.

    A driver that hands units out makes none, and the rows are what crosses to another process.
    """

    _kind: CacheKind
    _rows: pa.Table

    def __init__(self, unit_id: str, kind: CacheKind, rows: pa.Table) -> None:
        vars(self).update(unit_id=unit_id, _kind=kind, _rows=rows)  # frozen: as its own `__init__` would

    def __reduce__(self) -> tuple[type["StoredUnit"], tuple[str, CacheKind, pa.Table]]:
        return StoredUnit, (self.unit_id, self._kind, self._rows)

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """All samples or all pairs."""
        return items_of(self._kind, self._rows)

    @property
    def rows(self) -> pa.Table:
        """See `Unit.rows`."""
        return self._rows
