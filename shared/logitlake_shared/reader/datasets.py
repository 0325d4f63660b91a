"""Map-style datasets over one snapshot of a lake.

    dataset = LakeDataset("lake", "main", split="train")
    dataset[0], len(dataset), dataset.__getitems__([5, 3])

Promises: what is read is what was committed (`row_groups`); the order of the positions is the order of the ids,
whatever the units or the workers were; a reader pins one snapshot and never sees a later one; memory holds a bounded
number of bytes of decoded row groups. The arrays of an item are views of a row group: they cost no copy, cannot be
written to, and keep their group in memory as long as they live.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitlake_schemas import COLUMNS, CacheKind, CaptureSpec, CommitRecord, ShardEntry, arrow_schema
from logitlake_shared.errors import ConfigError, DataError, LakeCorruptError, LakeError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.reader.batches import Batches
from logitlake_shared.reader.order import Layout
from logitlake_shared.reader.row_groups import RowGroups
from logitlake_shared.reader.shard_copies import ShardCopies
from logitlake_shared.rows import LakePair, LakeSample, PairViews, SampleViews

__all__ = ["HELD_BYTES", "WINDOW_BYTES", "LakeDataset", "PairDataset"]

# Decoded row groups in memory: two windows of the default order, and room to spare.
HELD_BYTES = 2**30
# Stored bytes of a window of the order: about 800,000 tokens and a quarter of a gigabyte decoded, at 78 bytes a token.
# Far more items than a batch holds, so that neighbours in a row group are strangers in the order.
WINDOW_BYTES = 2**26
# An object store answers a small request in some tens of milliseconds, whatever the number of requests.
_INDEX_THREADS = 16

Item = TypeVar("Item", LakeSample, LakePair)
ImagePlaces = dict[str, tuple[ShardEntry, int, int]]


class _SnapshotDataset(Generic[Item]):
    """What samples and pairs share."""

    kind: CacheKind
    _views: Callable[[pa.Table], Any]

    def __init__(
        self,
        lake: str | Path | Lake,
        cache: str,
        *,
        split: str | None = None,
        tasks: Sequence[str] | None = None,
        snapshot: int | None = None,
        window_bytes: int = WINDOW_BYTES,
        held_bytes: int = HELD_BYTES,
        copies: ShardCopies | None = None,
    ) -> None:
        opened = lake if isinstance(lake, Lake) else Lake.open(lake)
        uri = opened.store.uri
        self._cache: Cache = opened.cache(cache)
        self.spec: CaptureSpec = self._cache.spec
        self.fingerprint = self._cache.fingerprint
        if self.spec.kind != self.kind:
            raise LakeError(f"{uri}: cache {cache!r} holds {self.spec.kind}, expected {self.kind}; name another cache")
        pinned = self._cache.open_snapshot(snapshot)
        self.snapshot = pinned.number
        self._commits: tuple[CommitRecord, ...] = tuple(pinned.commits)
        shards = [entry for commit in self._commits for entry in commit.shards if entry.kind == self.kind]
        tokens, stored_bytes = sum(entry.tokens for entry in shards), sum(entry.bytes for entry in shards)
        self._window_tokens = max(1, tokens * window_bytes // max(1, stored_bytes))
        self._read_index(split, tasks)
        if not len(self):
            raise DataError(
                f"{uri}: cache {cache!r}, snapshot {pinned.number} holds no {self.kind} with split={split!r} and "
                f"tasks={list(tasks) if tasks is not None else None!r}"
            )
        self._held_bytes = held_bytes
        self._copies = copies if copies is not None or self._cache.store.root is not None else ShardCopies()
        self._open_groups: tuple[int, RowGroups] | None = None

    def _read_index(self, split: str | None, tasks: Sequence[str] | None) -> None:
        """What is known of every item by position: id, length, row group and row."""
        shards = [(commit, entry) for commit in self._commits for entry in commit.shards if entry.kind == self.kind]
        with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="lake-index") as pool:
            tables: list[pa.Table] = list(pool.map(lambda shard: self._cache.index(shard[1]), shards))
        self._places: list[tuple[CommitRecord, ShardEntry, int]] = []
        """of each row group, by number: its commit, its shard and its number there"""
        kept: list[pa.Table] = []
        for (commit, entry), table in zip(shards, tables, strict=True):
            group, row = table.column("group").to_numpy(), table.column("row").to_numpy()
            groups, first_rows = np.unique(group, return_index=True)
            here = {
                "number": pa.array((group + len(self._places)).astype(np.int32)),
                "place": pa.array((row - row[first_rows][group]).astype(np.int32)),
            }
            self._places += [(commit, entry, int(number)) for number in groups]
            wanted = pa.table({"id": table.column("id"), "num_tokens": table.column("num_tokens"), **here})
            if split is not None:
                mask = pc.equal(table.column("split"), split)
                wanted, table = wanted.filter(mask), table.filter(mask)
            if tasks is not None:
                wanted = wanted.filter(pc.is_in(table.column("task"), pa.array(list(tasks), pa.string())))
            kept.append(wanted)
        index = pa.concat_tables(kept) if kept else _NO_ROWS
        # Arrow sorts strings by their bytes, which is Python's order of code points, and equal ones as they came.
        index = index.take(pc.sort_indices(index.column("id")))
        self._ids: pa.ChunkedArray = index.column("id")
        self.num_tokens: npt.NDArray[np.int32] = index.column("num_tokens").to_numpy()
        """response tokens of each position (chosen and rejected together for a pair)"""
        self._number_P: npt.NDArray[np.int32] = index.column("number").to_numpy()
        self._place_P: npt.NDArray[np.int32] = index.column("place").to_numpy()

    def __len__(self) -> int:
        return len(self._number_P)

    def __getitem__(self, position: int) -> Item:
        """Item `position` with its encoded images. Raises `LakeCorruptError`, `IndexError`."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int] | npt.NDArray[Any]) -> list[Item]:
        """The items at `positions`, in that order. What torch's DataLoader and `LakeLoader` call for a batch."""
        wanted = np.asarray(positions, np.int64)
        if wanted.size and not (wanted.min() >= -len(self) and wanted.max() < len(self)):
            raise IndexError(f"positions {wanted.min()}..{wanted.max()} of a dataset of {len(self)}")
        groups = self._row_groups()
        return [
            self._item(groups, number, row)
            for number, row in zip(self._number_P[wanted].tolist(), self._place_P[wanted].tolist(), strict=True)
        ]

    def prepare(self, positions: Sequence[int]) -> None:
        """Reads the row groups of `positions` into memory. What cannot be read is reported when it is asked for."""
        with contextlib.suppress(LakeError):
            groups = self._row_groups()
            for number in np.unique(self._number_P[np.asarray(positions, np.int64)]).tolist():
                self._group_views(groups, number)

    def ids(self) -> list[str]:
        """The ids of all items, in order."""
        ids: list[str] = self._ids.to_pylist()
        return ids

    @property
    def layout(self) -> Layout:
        """Where the items lie and how long they are: what the order of an epoch is made from."""
        return Layout(self._number_P, self.num_tokens, self._window_tokens)

    def batches(
        self,
        *,
        seed: int,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        by_length: bool = False,
        drop_last: bool = False,
    ) -> Batches:
        """The global batches of every epoch of this dataset; see `Batches`."""
        return Batches(
            self.layout,
            seed=seed,
            batch_size=batch_size,
            max_tokens=max_tokens,
            by_length=by_length,
            drop_last=drop_last,
        )

    def iter_arrow(
        self,
        columns: Sequence[str] | None = None,
        *,
        order: Literal["stored", "id"] | Sequence[int] | npt.NDArray[Any] = "stored",
        batch_rows: int = 256,
    ) -> Iterator[pa.RecordBatch]:
        """The rows as record batches, for other tools; `arrow_schema(columns)` is their schema.

        `order` is `stored` (row group after row group, one batch each: the fastest), `id`, or positions, e.g. those of
        `epoch_order(dataset.layout, seed, epoch)`. Raises `ConfigError` for a column that is not there.
        """
        names = self.arrow_schema(columns).names
        if isinstance(order, str) and order == "stored":
            return self._stored_batches(names)
        positions = np.arange(len(self)) if isinstance(order, str) else np.asarray(order, np.int64)
        starts = range(0, len(positions), batch_rows)
        return (self._rows_as_batch(positions[start : start + batch_rows], names) for start in starts)

    def arrow_schema(self, columns: Sequence[str] | None = None) -> pa.Schema:
        """The schema of all columns, or of the named ones in that order."""
        schema = arrow_schema(COLUMNS[self.kind])
        unknown = [name for name in columns or () if name not in schema.names]
        if unknown:
            raise ConfigError(f"no column {', '.join(unknown)}; {self.kind} have {', '.join(schema.names)}")
        return schema if columns is None else pa.schema([schema.field(name) for name in columns])

    def close(self) -> None:
        """Closes open files and drops what is held; the dataset opens them again when it is used."""
        if self._open_groups is not None:
            self._open_groups[1].close()
            self._open_groups = None

    def __getstate__(self) -> dict[str, Any]:
        """Open files and decoded rows stay behind when a dataset is sent to another process."""
        return {**self.__dict__, "_open_groups": None}

    def _row_groups(self) -> RowGroups:
        # Locks and handles do not survive a fork (a DataLoader's worker): a child opens its own.
        if self._open_groups is None or self._open_groups[0] != os.getpid():
            self._open_groups = os.getpid(), RowGroups(self._cache, self._held_bytes, self._copies)
        return self._open_groups[1]

    def _item(self, groups: RowGroups, number: int, row: int) -> Item:
        views = self._group_views(groups, number)
        images = tuple(self._image(groups, number, sha256) for sha256 in views.image_sha256(row))
        item: Item = views.item(row, images)
        return item

    def _group_views(self, groups: RowGroups, number: int) -> Any:
        def read() -> tuple[Any, int]:
            views = self._views(self._group_table(groups, number, None))
            return views, views.num_bytes

        return groups.held(("rows", number), read)

    def _group_table(self, groups: RowGroups, number: int, columns: Sequence[str] | None) -> pa.Table:
        _, entry, group = self._places[number]
        try:
            return groups.table(entry, group, columns)
        except LakeCorruptError as error:
            ids = self._ids.filter(pa.array(self._number_P == number))
            raise LakeCorruptError(f"{error} (row group {group}: {len(ids)} items, {ids[0]} to {ids[-1]})") from error

    # ---- images: those of a unit's rows are in the unit's own image shards ----

    def _image(self, groups: RowGroups, number: int, sha256: str) -> bytes:
        commit, entry, _ = self._places[number]
        places = groups.held(("images of", commit.unit), lambda: _image_places(groups, commit))
        if sha256 not in places:
            raise LakeCorruptError(
                f"{entry.path}: names image {sha256}, which no image shard of its unit {commit.unit} holds; run "
                "`logitlake verify`"
            )
        image_entry, group, row = places[sha256]

        def read() -> tuple[pa.ChunkedArray, int]:
            column = groups.table(image_entry, group, ["data"]).column(0)
            return column, column.get_total_buffer_size()

        data: bytes = groups.held((image_entry.path, group), read)[row].as_py()
        return data

    # ---- record batches ----

    def _stored_batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        by_group = np.lexsort((self._place_P, self._number_P))
        cuts = np.flatnonzero(np.diff(self._number_P[by_group])) + 1
        groups = self._row_groups()
        for positions in np.split(by_group, cuts):
            table = self._group_table(groups, int(self._number_P[positions[0]]), names)
            rows = self._place_P[positions]
            yield _one_batch(table if len(rows) == table.num_rows else table.take(rows), names)

    def _rows_as_batch(self, positions: npt.NDArray[np.int64], names: list[str]) -> pa.RecordBatch:
        groups, parts, places = self._row_groups(), [], []
        for number in np.unique(self._number_P[positions]).tolist():
            here = np.flatnonzero(self._number_P[positions] == number)
            table = groups.held(("table", number, *names), partial(self._held_table, groups, number, names))
            parts.append(table.take(self._place_P[positions[here]]))
            places.append(here)
        return _one_batch(pa.concat_tables(parts).take(np.argsort(np.concatenate(places))), names)

    def _held_table(self, groups: RowGroups, number: int, names: list[str]) -> tuple[pa.Table, int]:
        table = self._group_table(groups, number, names)
        return table, table.get_total_buffer_size()


class LakeDataset(_SnapshotDataset[LakeSample]):
    """The captured samples of a cache: `len(dataset)`, `dataset[i]`. `spec` says who captured them and how.

    `lake` is a folder, an address or an open lake. `window_bytes` of stored rows are shuffled together (`layout`);
    `held_bytes` bounds the decoded row groups in memory and should be eight times as much; `copies` is where the
    shards of an object store are kept on the local disk.
    """

    kind = "samples"
    _views = SampleViews


class PairDataset(_SnapshotDataset[LakePair]):
    """The preference pairs of a cache; settings as for `LakeDataset`."""

    kind = "pairs"
    _views = PairViews


_NO_ROWS = pa.table(
    {
        "id": pa.array([], pa.string()),
        "num_tokens": pa.array([], pa.int32()),
        "number": pa.array([], pa.int32()),
        "place": pa.array([], pa.int32()),
    }
)


def _image_places(groups: RowGroups, commit: CommitRecord) -> tuple[ImagePlaces, int]:
    """Where each image of a unit lies, and the bytes that knowing it takes."""
    places: ImagePlaces = {}
    for entry in commit.shards:
        if entry.kind == "images":
            names = groups.table(entry, None, ["image_sha256"]).column(0).to_pylist()
            rows = [(group, row) for group, size in enumerate(groups.group_rows(entry)) for row in range(size)]
            places |= {name: (entry, group, row) for name, (group, row) in zip(names, rows, strict=True)}
    return places, len(places) * _IMAGE_PLACE_BYTES


# A dictionary entry, its key of 64 characters and its tuple.
_IMAGE_PLACE_BYTES = 300


def _one_batch(table: pa.Table, names: list[str]) -> pa.RecordBatch:
    combined = table.select(names).combine_chunks()
    return pa.RecordBatch.from_arrays([column.chunk(0) for column in combined.columns], schema=combined.schema)
