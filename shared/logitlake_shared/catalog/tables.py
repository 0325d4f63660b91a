"""What a catalog holds, as Arrow tables made from the newest snapshots.

Everything here is derived: a table can be made again from the commit records and the shards at any time, and comes
out equal row for row. No column holds an absolute path, so a lake can be moved with its catalog.

    about         one row: the version of the catalog and of the lake's format
    caches        one row a cache: its figures, and the sha256 of the snapshot document they were made from
    shards        one row a committed file; `shard` numbers them, `first_id`..`last_id` bound the ids of their rows
    errors        one row a sample that failed
    sample_index  one row a sample or pair: in which shard, row group and row it lies
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import pyarrow as pa

from logitlake_schemas import FORMAT_VERSION, CommitRecord, ShardEntry, Snapshot, layout, sha256_hex
from logitlake_shared.cache_figures import cache_figures
from logitlake_shared.errors import LakeError, NotInLakeError
from logitlake_shared.lake import Cache, Lake

__all__ = [
    "ABOUT_SCHEMA",
    "CACHES_SCHEMA",
    "CATALOG_VERSION",
    "ERRORS_SCHEMA",
    "INDEX_SCHEMA",
    "SHARDS_SCHEMA",
    "Pinned",
    "about_table",
    "caches_table",
    "errors_table",
    "index_batches",
    "pin",
    "shards_table",
]

CATALOG_VERSION = 1
"""Raised with any change of the tables. A reader that meets another version works without the file."""

# Shards are read in runs, some runs at the same time: a remote store answers slowly.
_INDEX_RUN = 16
_INDEX_THREADS = 8
_INDEX_AHEAD = 16

ABOUT_SCHEMA = pa.schema([("catalog_version", pa.int32()), ("format_version", pa.int32())])
CACHES_SCHEMA = pa.schema(
    [
        ("cache", pa.string()),
        ("kind", pa.string()),
        ("snapshot", pa.int64()),
        ("fingerprint", pa.string()),
        ("teacher", pa.string()),
        ("engine", pa.string()),
        ("units", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("bytes", pa.int64()),
        ("bytes_per_token", pa.float64()),
        ("errors", pa.int64()),
        ("stored_kl_mean", pa.float64()),
        ("stored_kl_max", pa.float64()),
        ("mean_k", pa.float64()),
        ("shards", pa.int64()),
        ("image_bytes", pa.int64()),
        ("snapshot_sha256", pa.string()),
    ]
)
SHARDS_SCHEMA = pa.schema(
    [
        ("cache", pa.string()),
        ("unit", pa.string()),
        ("kind", pa.string()),
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("footer_sha256", pa.string()),
        ("footer_bytes", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("stored_kl_mean", pa.float64()),
        ("stored_kl_max", pa.float64()),
        ("mean_stored_mass", pa.float64()),
        ("mean_k", pa.float64()),
    ]
)
"""Without `shard`, `first_id` and `last_id`, which come from the index."""
ERRORS_SCHEMA = pa.schema([(name, pa.string()) for name in ("cache", "unit", "sample_id", "code", "message")])
INDEX_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("sample_id", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
        ("task", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("num_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Pinned:
    """A cache at its newest snapshot, which is parsed when it is needed."""

    cache: Cache
    number: int
    sha256: str
    """of the snapshot document"""

    @property
    def identity(self) -> tuple[str, int, str, str]:
        """What a catalog must have been made from to speak for this cache."""
        return self.cache.name, self.number, self.cache.fingerprint, self.sha256

    @cached_property
    def snapshot(self) -> Snapshot:
        """The parsed snapshot."""
        return self.cache.open_snapshot(self.number)


def pin(lake: Lake, caches: Sequence[str] | None = None, snapshots: Mapping[str, int] | None = None) -> list[Pinned]:
    """Every cache that has a snapshot, by name, at its newest or at the one that `snapshots` says.

    `caches` names the only ones that are looked at; no message then names another. Raises `LakeError` when none has a
    snapshot, `NotInLakeError` when one has not the one that is asked for, or is not there.
    """
    wanted = dict(snapshots or {})
    pinned = []
    for name in lake.cache_names() if caches is None else sorted(set(caches)):
        found = _known_cache(lake, name, caches)
        paths = lake.store.names(layout.snapshots_prefix(name))
        if name in wanted:
            number = wanted.pop(name)
            path = layout.snapshot_path(name, number)
            if path not in paths:
                newest = layout.snapshot_number(paths[-1]) if paths else "none yet"
                raise NotInLakeError(
                    f"{lake.store.uri}: cache {name!r} has no snapshot {number}; its newest is {newest}"
                )
            paths = [path]
        if paths:
            data = lake.store.get(paths[-1])
            if data is None:
                raise LakeError(f"{lake.store.uri}/{paths[-1]}: listed, but gone when it was read; ask again")
            pinned.append(Pinned(found, layout.snapshot_number(paths[-1]), sha256_hex(data)))
    if wanted:
        raise LakeError(
            f"snapshots of {', '.join(map(repr, sorted(wanted)))} are asked for, of which there is no cache"
        )
    if not pinned:
        raise LakeError(f"{lake.store.uri}: no cache has a snapshot yet; let a capture finish first")
    return pinned


def _known_cache(lake: Lake, name: str, caches: Sequence[str] | None) -> Cache:
    """The cache; the message for an unknown one does not name those that the caller may not know of."""
    if caches is not None and not lake.has_cache(name):
        raise NotInLakeError(f"{lake.store.uri}: no cache {name!r}")
    return lake.cache(name)


def about_table() -> pa.Table:
    """The one row of `about`."""
    return pa.Table.from_pylist([{"catalog_version": CATALOG_VERSION, "format_version": FORMAT_VERSION}], ABOUT_SCHEMA)


def caches_table(pinned: Iterable[Pinned]) -> pa.Table:
    """The rows of `caches`."""
    rows = [asdict(cache_figures(pin.cache, pin.snapshot)) | {"snapshot_sha256": pin.sha256} for pin in pinned]
    return pa.Table.from_pylist(rows, CACHES_SCHEMA)


def shards_table(pinned: Iterable[Pinned]) -> pa.Table:
    """The rows of `shards`, by cache, unit and path, so that their numbers are the same whoever counts."""
    rows = [
        _shard_row(pin.cache.name, commit, entry)
        for pin in pinned
        for commit in pin.snapshot.commits
        for entry in sorted(commit.shards, key=lambda entry: entry.path)
    ]
    return pa.Table.from_pylist(rows, SHARDS_SCHEMA)


def errors_table(pinned: Iterable[Pinned]) -> pa.Table:
    """The rows of `errors`."""
    rows = [
        {"cache": pin.cache.name, "unit": commit.unit, **error.model_dump()}
        for pin in pinned
        for commit in pin.snapshot.commits
        for error in commit.errors
    ]
    return pa.Table.from_pylist(rows, ERRORS_SCHEMA)


def index_batches(
    work: Sequence[tuple[Cache, ShardEntry]], failed: Callable[[LakeError], None]
) -> Iterator[pa.RecordBatch]:
    """The index rows of these shards, in order; some shards are read ahead by threads.

    Raises `LakeCorruptError` for a shard that is missing or damaged, and tells `failed` first.
    """
    with ThreadPoolExecutor(_INDEX_THREADS, "catalog-index") as pool:
        runs = (work[start : start + _INDEX_RUN] for start in range(0, len(work), _INDEX_RUN))
        pending = [pool.submit(_index_batch, run) for run in islice(runs, _INDEX_AHEAD)]
        while pending:
            try:
                batch = pending.pop(0).result()
            except LakeError as error:
                failed(error)
                raise
            pending += [pool.submit(_index_batch, run) for run in islice(runs, 1)]
            yield batch


def _index_batch(run: Sequence[tuple[Cache, ShardEntry]]) -> pa.RecordBatch:
    tables = [cache.index(entry) for cache, entry in run]
    rows = pa.concat_tables(tables).combine_chunks()
    paths = pa.array([entry.path for _, entry in run])
    shard_of_row = np.repeat(np.arange(len(run)), [table.num_rows for table in tables])
    columns = [rows.column(name).chunk(0) for name in ("id", "group", "row", "task", "source", "split", "num_tokens")]
    return pa.RecordBatch.from_arrays([paths.take(pa.array(shard_of_row)), *columns], schema=INDEX_SCHEMA)


def _shard_row(cache: str, commit: CommitRecord, entry: ShardEntry) -> dict[str, object]:
    row: dict[str, object] = {"cache": cache, "unit": commit.unit, **entry.model_dump()}
    error = commit.stored_error if entry.kind == "samples" else None
    if error is not None:
        row |= {
            "stored_kl_mean": error.kl_mean,
            "stored_kl_max": error.kl_max,
            "mean_stored_mass": error.mean_stored_mass,
            "mean_k": error.mean_k,
        }
    return row
