"""Row groups of committed shards, verified and held in bounded memory.

The length and the sha256 of a shard are compared with its commit record once in a process, before its first row is
delivered, and again when the file is no longer the one that was verified; the checksum of a page is compared on every
read. Row groups are decoded on the calling thread, a group that several threads want is decoded once. Shards of an
object store are read from local copies (`shard_copies`).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa

from logitlake_schemas import ShardEntry
from logitlake_shared.lake import Cache
from logitlake_shared.reader.held import Held
from logitlake_shared.reader.shard_copies import ShardCopies
from logitlake_shared.shards import Shard

__all__ = ["RowGroups"]

Value = TypeVar("Value")

# Open shards that no thread uses just now. A shard costs a file handle and its parsed footer.
_IDLE_SHARDS = 128
# What os.stat says of a file that was verified in this process: a file that was changed or swapped says otherwise.
_VERIFIED: dict[str, tuple[int, ...]] = {}


class RowGroups:
    """The row groups of one cache. Safe to use from many threads; not to be carried over a fork.

    `copies` is where the shards of an object store are kept; a local lake needs none.
    """

    def __init__(self, cache: Cache, held_bytes: int, copies: ShardCopies | None) -> None:
        self._cache, self._copies = cache, copies
        self._held = Held(held_bytes)
        self._idle: OrderedDict[str, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def table(self, entry: ShardEntry, group: int | None, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one row group, or of the whole shard, read now. Raises `LakeCorruptError`."""
        with self._open(entry) as shard:
            return shard.read(columns, group)

    def group_rows(self, entry: ShardEntry) -> tuple[int, ...]:
        """The rows of each row group of a shard."""
        with self._open(entry) as shard:
            return shard.group_rows

    def held(self, key: tuple[object, ...], make: Callable[[], tuple[Value, int]]) -> Value:
        """What `make` gives, and how many bytes it is, held among the row groups."""
        return self._held.get(key, make)

    def close(self) -> None:
        """Closes the shards that are open."""
        with self._lock:
            idle, self._idle = self._idle, OrderedDict()
        for shard in idle.values():
            shard.close()

    @contextmanager
    def _open(self, entry: ShardEntry) -> Iterator[Shard]:
        """A handle that nobody else uses meanwhile: a Parquet reader is made for one thread."""
        with self._lock:
            shard = self._idle.pop(entry.path, None)
        if shard is None:
            shard = self._fresh(entry)
        try:
            yield shard
        except BaseException:
            shard.close()
            raise
        leaving = []
        with self._lock:
            leaving += [self._idle.pop(entry.path)] if entry.path in self._idle else []
            self._idle[entry.path] = shard
            leaving += [self._idle.popitem(last=False)[1]] if len(self._idle) > _IDLE_SHARDS else []
        for other in leaving:
            other.close()

    def _fresh(self, entry: ShardEntry) -> Shard:
        store = self._cache.store
        if self._copies is not None:
            return Shard(self._copies.open(store, entry), f"{store.uri}/{entry.path}")
        if store.root is None:
            return self._cache.open(entry)
        path = store.root / entry.path
        stamp: tuple[int, ...] = ()
        if path.is_file():
            status = path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = _VERIFIED.get(str(path))
        shard = self._cache.open(entry, verify=not stamp or known != stamp)
        _VERIFIED[str(path)] = stamp
        return shard
