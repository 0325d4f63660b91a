"""Map-style datasets over one snapshot of a lake.

Promises: what is read is what was committed (sha256 of the file, checksum of every page); the order of the items is
the order of their ids, whatever the units or the workers were; a reader pins one snapshot and never sees a later
one; memory holds a bounded number of decoded shards.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa

from logitlake_schemas import CacheKind, CaptureSpec, ShardEntry
from logitlake_shared.errors import DataError, LakeCorruptError, LakeError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.rows import (
    LakePair,
    LakeSample,
    images_from_table,
    pairs_from_table,
    samples_from_table,
)

__all__ = ["LakeDataset", "PairDataset"]

# Decoded shards kept in memory, per kind. A unit of 20,000 tokens decodes to a few megabytes.
_CACHED_SHARDS = 256

Item = TypeVar("Item", LakeSample, LakePair)
Value = TypeVar("Value")


class _SnapshotDataset(Generic[Item]):
    """What samples and pairs share: an index over the snapshot's shards, and a bounded cache of decoded ones."""

    kind: CacheKind
    _id_column: str
    _from_table: Callable[[pa.Table], list[Item]]

    def __init__(
        self,
        lake: str | Path,
        cache: str,
        *,
        split: str | None = None,
        tasks: Sequence[str] | None = None,
        snapshot: int | None = None,
    ) -> None:
        self._cache: Cache = Lake.open(lake).cache(cache)
        self.spec: CaptureSpec = self._cache.spec
        self.fingerprint = self._cache.fingerprint
        if self.spec.kind != self.kind:
            raise LakeError(f"{lake}: cache {cache!r} holds {self.spec.kind}, expected {self.kind}; name another cache")
        pinned = self._cache.open_snapshot(snapshot)
        self.snapshot = pinned.number
        self._images: dict[str, ShardEntry] = {}
        index: list[tuple[str, ShardEntry, int]] = []
        for commit in pinned.commits:
            rows = [entry for entry in commit.shards if entry.kind == self.kind]
            for entry in rows:
                table = self._cache.read(entry, [self._id_column, "task", "split", "image_sha256"])
                for row, record in enumerate(table.to_pylist()):
                    if (split is None or record["split"] == split) and (tasks is None or record["task"] in tasks):
                        index.append((record[self._id_column], entry, row))
            image_shards = [entry for entry in commit.shards if entry.kind == "images"]
            for entry in image_shards:
                for sha256 in self._cache.read(entry, ["image_sha256"]).column(0).to_pylist():
                    self._images[sha256] = entry
        self._index = sorted(index, key=lambda item: item[0])
        if not self._index:
            raise DataError(
                f"{lake}: cache {cache!r}, snapshot {pinned.number} holds no {self.kind} with split={split!r} and "
                f"tasks={list(tasks) if tasks is not None else None!r}"
            )
        self._rows_of: _Bounded[list[Item]] = _Bounded(lambda entry: self._from_table(self._cache.read(entry)))
        self._bytes_of = _Bounded(
            lambda entry: {image.image_sha256: image.data for image in images_from_table(self._cache.read(entry))}
        )

    def __len__(self) -> int:
        return len(self._index)

    def ids(self) -> list[str]:
        """The ids of all items, in order."""
        return [item_id for item_id, _, _ in self._index]

    def __getitem__(self, position: int) -> Item:
        """Item `position` with its encoded images. Raises `LakeCorruptError`."""
        _, entry, row = self._index[position]
        item: Item = self._rows_of(entry)[row]
        return replace(item, images=tuple(self._image(sha256, entry) for sha256 in item.image_sha256))

    def _image(self, sha256: str, entry: ShardEntry) -> bytes:
        image_entry = self._images.get(sha256)
        if image_entry is None:
            raise LakeCorruptError(f"{entry.path}: names image {sha256}, which no image shard of the snapshot holds")
        return self._bytes_of(image_entry)[sha256]


class LakeDataset(_SnapshotDataset[LakeSample]):
    """The captured samples of a cache: `len(dataset)`, `dataset[i]`. `spec` says who captured them and how."""

    kind = "samples"
    _id_column = "sample_id"
    _from_table = staticmethod(samples_from_table)


class PairDataset(_SnapshotDataset[LakePair]):
    """The preference pairs of a cache."""

    kind = "pairs"
    _id_column = "pair_id"
    _from_table = staticmethod(pairs_from_table)


class _Bounded(Generic[Value]):
    """Remembers the value of the most recently used shards."""

    def __init__(self, load: Callable[[ShardEntry], Value]) -> None:
        self._load = load
        self._values: OrderedDict[str, Value] = OrderedDict()

    def __call__(self, entry: ShardEntry) -> Value:
        if entry.path in self._values:
            self._values.move_to_end(entry.path)
        else:
            self._values[entry.path] = self._load(entry)
            if len(self._values) > _CACHED_SHARDS:
                self._values.popitem(last=False)
        return self._values[entry.path]
