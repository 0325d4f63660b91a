"""The shards of a lake as a catalog's scans hold them: rows of a table until one is opened, then kept open.

A lake may have ten thousand shards, a question may need one: nothing here costs more than what is asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import pyarrow as pa

from logitlake_schemas import ShardEntry
from logitlake_shared.catalog.pruning import Bounds
from logitlake_shared.lake import Cache
from logitlake_shared.shards import Shard

__all__ = ["OpenShards", "ScannedShard", "ShardRows", "entry_of"]

_OPEN_SHARDS = 128


@dataclass(frozen=True)
class ScannedShard:
    """A shard as the scans see it."""

    cache: Cache
    entry: ShardEntry


class ShardRows:
    """The shards of one kind, as rows of the view `shards`; records of them are made when they are needed."""

    def __init__(self, rows: pa.Table, caches: Mapping[str, Cache]) -> None:
        self._rows, self._caches = rows, caches

    def __iter__(self) -> Iterator[ScannedShard]:
        for row in self._rows.to_pylist():
            yield ScannedShard(self._caches[row["cache"]], entry_of(row))

    def select(self, condition: Any) -> "ShardRows":
        """Those for which an Arrow expression over the columns of `shards` is true."""
        return ShardRows(self._rows.filter(condition), self._caches)

    def take(self, places: Sequence[int]) -> "ShardRows":
        """Those at these places, in this order."""
        return ShardRows(self._rows.take(pa.array(places, pa.int64())), self._caches)

    def bounds(self, id_column: str | None, schema: pa.Schema) -> Bounds:
        """What is known of their ids. The rows must be sorted by cache and first id."""
        return Bounds(id_column, self._rows, schema)


def entry_of(row: Mapping[str, Any]) -> ShardEntry:
    """The record of a row of `shards`. Its values were checked when they were read from the commit record."""
    return ShardEntry.model_construct(**{name: row[name] for name in ShardEntry.model_fields})


class OpenShards:
    """Shards that stay open between questions, the least recently used closed first. Each has one user at a time."""

    def __init__(self) -> None:
        self._idle: dict[str, Shard] = {}
        self._lock = Lock()

    def take(self, shard: ScannedShard) -> Shard:
        """The shard, opened if it is not idle here. Raises `LakeCorruptError`, `LakeFormatError`."""
        with self._lock:
            opened = self._idle.pop(shard.entry.path, None)
        return opened if opened is not None else shard.cache.open(shard.entry, verify=False)

    def give(self, shard: ScannedShard, opened: Shard) -> None:
        """Hands a shard back."""
        with self._lock:
            spare = [self._idle.pop(shard.entry.path, None)]
            self._idle[shard.entry.path] = opened
            if len(self._idle) > _OPEN_SHARDS:
                spare.append(self._idle.pop(next(iter(self._idle))))
        for old in spare:
            if old is not None:
                old.close()

    def close(self) -> None:
        """Closes what is idle."""
        with self._lock:
            idle, self._idle = list(self._idle.values()), {}
        for shard in idle:
            shard.close()
