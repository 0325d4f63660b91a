"""One contract, three stores: a local folder, memory, and S3 (moto's server on loopback)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from logitlake_schemas import CaptureSpec
from logitlake_shared.catalog import Catalog
from logitlake_shared.errors import LakeConflictError, LakeError, LakeFormatError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.store import ObjectStore

ROUNDS = 50
WRITERS = 4


def test_put_new_creates_once(store: ObjectStore) -> None:
    """The second writer of a name is told so and changes nothing."""
    assert store.put_new("a/b.json", b"first")
    assert not store.put_new("a/b.json", b"second")
    assert store.get("a/b.json") == b"first"
    assert store.get("a/none.json") is None
    store.put_new("a/a.json", b"")
    assert store.names("a") == ["a/a.json", "a/b.json"]
    assert store.names("nothing") == []


def test_of_racing_writers_exactly_one_wins(store: ObjectStore) -> None:
    """Four threads at a barrier, fifty rounds: one True each round, and its bytes are the object's."""
    rounds = ROUNDS if "s3" not in store.uri else 5
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(rounds):
            barrier = Barrier(WRITERS)

            def write(writer: int, number: int = number, barrier: Barrier = barrier) -> bool:
                barrier.wait()
                return store.put_new(f"race/{number}", bytes([writer]))

            wins = list(pool.map(write, range(WRITERS)))
            assert sum(wins) == 1
            assert store.get(f"race/{number}") == bytes([wins.index(True)])


def test_publishing_twice_is_publishing_once(
    store: ObjectStore, capture_spec: CaptureSpec, make_unit: Callable[..., UnitResult]
) -> None:
    """The same unit gives the same record and no new object; other content under its name is refused."""
    cache = _lake(store).create_cache("main", capture_spec)
    first = cache.publish_unit(make_unit(1))
    names = store.names("caches")
    assert cache.publish_unit(make_unit(1)) == first
    assert store.names("caches") == names
    other = UnitResult(unit=make_unit(1).unit, samples=make_unit(2).samples, images=make_unit(2).images)
    with pytest.raises(LakeConflictError, match="other content"):
        cache.publish_unit(other)
    assert cache.commit(first.unit) == first


def test_snapshots_pin_what_was_committed(
    store: ObjectStore, capture_spec: CaptureSpec, make_unit: Callable[..., UnitResult]
) -> None:
    """A snapshot never changes; a new one is made only when something came since."""
    cache = _lake(store).create_cache("main", capture_spec)
    assert not cache.has_snapshot()
    with pytest.raises(LakeError, match="no snapshot"):
        cache.open_snapshot()
    cache.publish_unit(make_unit(1))
    assert cache.snapshot().number == 1
    assert cache.snapshot().number == 1
    cache.publish_unit(make_unit(2))
    assert [commit.unit for commit in cache.open_snapshot().commits] == ["000001-test"]
    assert cache.snapshot().number == 2
    assert len(cache.open_snapshot(1).commits) == 1
    assert len(cache.open_snapshot().commits) == 2


def test_of_two_snapshot_makers_one_rebases(
    store: ObjectStore, capture_spec: CaptureSpec, make_unit: Callable[..., UnitResult]
) -> None:
    """Racing snapshot makers lose no commit: the newest snapshot names every unit that was committed before it."""
    cache = _lake(store).create_cache("main", capture_spec)

    def commit_and_snapshot(number: int) -> int:
        cache.publish_unit(make_unit(number))
        return cache.snapshot().number

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(commit_and_snapshot, range(8)))
    assert {commit.unit for commit in cache.snapshot().commits} == cache.committed_units()
    assert len(cache.committed_units()) == 8


def test_a_lake_is_recognised(store: ObjectStore) -> None:
    """An empty store is not a lake, and one of another format names both versions."""
    with pytest.raises(LakeFormatError, match=r"lake\.json is missing"):
        Lake.of(store)
    store.put_new("lake.json", b'{"format_version": 99}')
    with pytest.raises(LakeFormatError, match="format version 99, this release reads 1"):
        Lake.of(store)


# A store in memory has no address that pyarrow could open.
@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_sql_answers_from_every_store(
    store: ObjectStore, capture_spec: CaptureSpec, make_unit: Callable[..., UnitResult]
) -> None:
    """The catalog reads shards where they lie, on a disk and in an object store."""
    cache = _lake(store).create_cache("main", capture_spec)
    cache.publish_unit(make_unit(1))
    cache.snapshot()
    with Catalog(Lake.of(store)) as catalog:
        assert catalog.query("SELECT count(*) AS n FROM samples").to_pylist() == [{"n": 2}]


def _lake(store: ObjectStore) -> Lake:
    store.put_new("lake.json", b'{"format_version": 1}')
    return Lake.of(store)
