"""Garbage of a lake: what no reader can reach, found and collected without a lock.

Garbage is a shard that neither a commit record nor a snapshot names (its writer was stopped, or lost to another), a
file that a local writer left half written, and a catalog that newer ones replaced. Commit records, snapshots and
quarantine records are never garbage.

A writer may be between its shard and its commit record while a collector looks. Two checks that cross make that safe
whatever the clocks say: the writer creates its record and *then* looks whether every shard is still there, writing
what is gone once more (`Cache.publish_unit`); the collector deletes the shard and *then* looks whether a record names
it by now, and puts the bytes back if so. Whichever order the four steps take, one of the two sees the other. The age
that garbage must have (`grace`) only keeps them from meeting in the first place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from logitlake_schemas import layout
from logitlake_shared.errors import LakeError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.store import StoredObject

__all__ = ["DEFAULT_GRACE_S", "Garbage", "collect", "find_garbage"]

DEFAULT_GRACE_S = 24 * 3600.0
"""Longer than any unit takes from its first shard to its commit record."""
# The newest catalog is the one that readers open; the one before it may be open in a reader that came earlier.
_KEPT_CATALOGS = 2


@dataclass(frozen=True)
class Garbage:
    """One object that can go."""

    path: str
    """relative to the lake's root"""
    bytes: int
    age_s: float
    """since it was written, by this machine's clock; never negative"""
    reason: str
    """for people"""


def find_garbage(lake: Lake, grace_s: float = DEFAULT_GRACE_S) -> list[Garbage]:
    """What can go and is at least `grace_s` seconds old, sorted by path. Changes nothing.

    Raises `LakeError` if a record or snapshot cannot be read: what it names would look like garbage.
    """
    now = datetime.now(UTC)
    found = []
    for entry, reason in _candidates(lake):
        age_s = max((now - entry.modified).total_seconds(), 0.0)
        if age_s >= grace_s:
            found.append(Garbage(entry.name, entry.bytes, age_s, reason))
    return sorted(found, key=lambda garbage: garbage.path)


def collect(lake: Lake, garbage: Sequence[Garbage]) -> list[Garbage]:
    """Deletes it; returns what is gone. A shard that a writer committed meanwhile is put back and not returned."""
    return [one for one in garbage if _delete(lake, one.path)]


def _candidates(lake: Lake) -> Iterator[tuple[StoredObject, str]]:
    for name in lake.cache_names():
        cache = lake.cache(name)
        # Listed before the records are read: a shard that comes later is no candidate, its record may be missed.
        shards = [entry for prefix in layout.shard_prefixes(name) for entry in lake.store.entries(prefix)]
        named = _named_shards(cache)
        for entry in shards:
            if entry.name not in named:
                yield entry, "no commit record or snapshot names it"
    for entry in lake.store.leftovers(""):
        yield entry, "left half written by a writer that was stopped"
    for entry in lake.store.entries(layout.catalog_prefix())[:-_KEPT_CATALOGS]:
        yield entry, "newer catalogs replaced it"


def _named_shards(cache: Cache) -> set[str]:
    named = {entry.path for commit in cache.commits() for entry in commit.shards}
    for path in cache.store.names(layout.snapshots_prefix(cache.name)):
        snapshot = cache.open_snapshot(layout.snapshot_number(path))
        named |= {entry.path for commit in snapshot.commits for entry in commit.shards}
    return named


def _delete(lake: Lake, path: str) -> bool:
    name = layout.cache_of(path) if path.endswith(".parquet") else None
    data = None if name is None else lake.store.get(path)
    lake.store.delete(path)
    if name is not None and data is not None and _may_be_named(lake.cache(name), path):
        lake.store.put_new(path, data)
        return False
    return True


def _may_be_named(cache: Cache, path: str) -> bool:
    unit = layout.unit_of_shard(path)
    if cache.store.get(layout.commit_path(cache.name, unit)) is None:
        return False
    try:
        return any(entry.path == path for entry in cache.commit(unit).shards)
    except LakeError:  # a record that cannot be read may name anything
        return True
