"""Laws of collection and quarantine: what a reader can reach stays, the rest goes, and a race loses nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from logitlake_schemas import CaptureSpec, layout
from logitlake_shared.errors import LakeFormatError
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_shared.shards import Shard
from logitlake_shared.tools.gc import collect, find_garbage

MakeUnit = Callable[..., UnitResult]


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """An empty lake in a folder."""
    return Lake.create(tmp_path / "lake")


@pytest.fixture
def cache(lake: Lake, capture_spec: CaptureSpec, make_unit: MakeUnit) -> Cache:
    """A cache of two units, pinned by a snapshot."""
    cache = lake.create_cache("main", capture_spec)
    cache.publish_unit(make_unit(1))
    cache.publish_unit(make_unit(2))
    cache.snapshot()
    return cache


def test_a_finished_lake_holds_no_garbage(lake: Lake, cache: Cache) -> None:
    """Everything that a capture leaves is named by a record."""
    assert find_garbage(lake, 0) == []


def test_orphans_and_leftovers_are_found_and_go(lake: Lake, cache: Cache) -> None:
    """A shard without a record and a half-written file are garbage; nothing else is touched."""
    before = lake.store.names("")
    orphan = layout.shard_path("main", "000003-test", "e" * 64)
    lake.store.put_new(orphan, b"a shard whose writer was stopped")
    assert lake.store.root is not None
    half = lake.store.root / layout.shard_path("main", "000004-test", "f" * 64).replace(".parquet", ".parquet#7")
    half.write_bytes(b"half of a sha")
    garbage = find_garbage(lake, 0)
    assert {one.path for one in garbage} == {orphan, str(half.relative_to(lake.store.root))}
    assert [one.bytes for one in garbage] == [32, 13]
    assert find_garbage(lake, 3600) == [], "what is young may still be named by its writer"
    assert collect(lake, garbage) == garbage
    assert lake.store.names("") == before
    assert not half.exists()
    assert len(LakeDataset(lake.store.root, "main")) == 4


def test_an_old_orphan_is_found_whatever_the_clock_of_its_writer(lake: Lake, cache: Cache) -> None:
    """A file from tomorrow has age zero, not a negative one; an old one is found at its age."""
    assert lake.store.root is not None
    for unit, digest in (("old", "a" * 64), ("new", "b" * 64)):
        lake.store.put_new(layout.shard_path("main", unit, digest), b"x")
    (old,) = lake.store.root.glob("caches/main/shards/old-*")
    (new,) = lake.store.root.glob("caches/main/shards/new-*")
    status = new.stat()
    os.utime(old, (status.st_atime, status.st_mtime - 90_000))
    os.utime(new, (status.st_atime, status.st_mtime + 90_000))
    assert [one.path for one in find_garbage(lake)] == [str(old.relative_to(lake.store.root))]
    assert all(one.age_s >= 0 for one in find_garbage(lake, 0))


def test_a_commit_between_finding_and_collecting_wins(lake: Lake, cache: Cache, make_unit: MakeUnit) -> None:
    """The writer of an orphan commits it after it was listed: its bytes are there afterwards."""
    written = {entry.path for entry in cache.publish_unit(make_unit(3)).shards}
    lake.store.delete(layout.commit_path("main", "000003-test"))
    garbage = find_garbage(lake, 0)
    assert {one.path for one in garbage} == written
    cache.publish_unit(make_unit(3))
    assert collect(lake, garbage) == []
    cache.snapshot()
    assert lake.store.root is not None
    assert len(LakeDataset(lake.store.root, "main")) == 6


def test_a_collection_before_the_record_is_healed_by_the_writer(
    lake: Lake, cache: Cache, make_unit: MakeUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector runs between the writer's shards and its record: the writer sees it and writes once more."""
    put_new = lake.store.put_new

    def collect_before_the_record(name: str, data: bytes) -> bool:
        if name == layout.commit_path("main", "000003-test"):
            assert len(collect(lake, find_garbage(lake, 0))) == 2
        return put_new(name, data)

    monkeypatch.setattr(cache.store, "put_new", collect_before_the_record)
    record = cache.publish_unit(make_unit(3))
    for entry in record.shards:
        assert isinstance(cache.open(entry), Shard)


def test_collection_stops_at_a_record_that_cannot_be_read(lake: Lake, cache: Cache) -> None:
    """What a damaged record names would look like garbage, so nothing is."""
    lake.store.overwrite(layout.commit_path("main", "000001-test"), b"{")
    with pytest.raises(LakeFormatError, match="000001-test"):
        find_garbage(lake, 0)


def test_a_quarantined_unit_is_in_the_plan_again_and_heals(lake: Lake, cache: Cache, make_unit: MakeUnit) -> None:
    """A damaged unit's record goes, its history stays, and capturing it anew makes old snapshots whole."""
    entry = cache.commit("000001-test").shards[0]
    good = lake.store.get(entry.path)
    assert good is not None
    lake.store.overwrite(entry.path, good[:-1] + bytes([good[-1] ^ 1]))
    record = cache.quarantine("000001-test", ["sha256 differs"])
    assert record.reasons == ("sha256 differs",)
    assert cache.committed_units() == {"000002-test"}
    assert cache.snapshot().number == 2
    assert find_garbage(lake, 0) == [], "snapshot 1 still names the shard"
    cache.publish_unit(make_unit(1))
    assert lake.store.get(entry.path) == good
    assert cache.snapshot().commits == cache.open_snapshot(1).commits
    cache.quarantine("000001-test", ["again"])
    assert [path.rsplit("/", 1)[-1] for path in lake.store.names(layout.quarantine_prefix("main"))] == [
        "000001-test-0001.json",
        "000001-test-0002.json",
    ]
