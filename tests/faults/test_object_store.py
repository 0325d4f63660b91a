"""A14: an object store that is slow to believe, cuts connections, or lands a write without saying so.

The store is moto's, behind a proxy that breaks single requests. A conditional write that landed before its connection
was cut is the hard one: repeated, it is refused as taken, by our own bytes.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.faults.conftest import Bench
from tests.faults.proxy import Breakage, Proxy, proxy_to

from logitlake_shared.errors import LakeError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.reader import LakeDataset
from logitlake_shared.reader.shard_copies import ShardCopies
from logitlake_shared.store import open_store
from logitlake_shared.tools.verify import CacheCheck

# What a commit writes, in its order.
WRITES = ("lake.json", "spec.json", "/shards/", "/images/", "/commits/", "/snapshots/")
# More requests than a reader of one unit makes.
MOST_READS = 30
# What the proxy does, and how often, before the store is well again: within what a client repeats.
# 409 says that another request on the name is under way, which is not that the name is taken.
PASSING = {"503": 2, "500": 1, "409": 1, "cut before": 1, "cut after": 1, "late 503": 1}


@pytest.fixture
def proxy(s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the product and moto."""
    with proxy_to(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def uri(s3_bucket: str) -> str:
    """Where the lake is to be."""
    return f"s3://{s3_bucket}/lake"


@pytest.mark.parametrize("what", PASSING)
def test_a_write_that_goes_wrong_is_neither_lost_nor_doubled(bench: Bench, proxy: Proxy, uri: str, what: str) -> None:
    """Each kind of object goes wrong: the client repeats it, and a write of ours that had landed is known as ours."""
    proxy.broken = [Breakage(what, "PUT", write, PASSING[what]) for write in WRITES]
    _capture(uri, bench)
    assert [one.times for one in proxy.broken] == [0] * len(WRITES), "a breakage was never met"
    _assert_whole(uri, bench)


@pytest.mark.parametrize("write", ["/shards/", "/images/", "/commits/"])
@pytest.mark.parametrize("what", ["cut after", "late 503"])
def test_our_own_landed_write_is_recognised(bench: Bench, proxy: Proxy, uri: str, what: str, write: str) -> None:
    """The write landed, the answer did not: publishing succeeds, and the content is there once."""
    cache = Lake.create(uri).create_cache("main", bench.spec)
    proxy.broken = [Breakage(what, "PUT", write)]
    record = cache.publish_unit(bench.units[0])
    assert proxy.broken[0].times == 0
    assert record == cache.commit(bench.units[0].unit)
    assert len(cache.store.names("caches/main")) == 4


@pytest.mark.parametrize("what", ["503", "cut before", "short"])
def test_a_read_that_goes_wrong_gives_no_other_rows(
    bench: Bench, proxy: Proxy, uri: str, tmp_path: Path, what: str
) -> None:
    """The n-th GET of a reader goes wrong, for every n: all rows, or an error of ours."""
    _capture(uri, bench, 1)
    for read in range(MOST_READS):
        proxy.broken = [Breakage("", "GET", times=read), Breakage(what, "GET")]
        with suppress(LakeError):
            assert _read_all(uri, tmp_path / f"copies-{read}") == 2
        if proxy.broken[1].times:
            break
    assert 5 < read < MOST_READS - 1, "the reader makes more requests than are tried"


def test_a_store_that_refuses_for_good_is_named(bench: Bench, proxy: Proxy, uri: str) -> None:
    """Access denied is not repeated for minutes: an error with the object's name."""
    _capture(uri, bench, 1)
    proxy.broken = [Breakage("403", "PUT", times=100)]
    with pytest.raises(LakeError, match=r"/shards/000002"):
        Lake.open(uri).cache("main").publish_unit(bench.units[1])
    proxy.broken = []
    _capture(uri, bench)
    _assert_whole(uri, bench)


def test_a_conditional_write_is_sent_as_one(proxy: Proxy, uri: str) -> None:
    """`put_new` of a taken name changes nothing, also where the first answer was lost."""
    store = open_store(uri)
    assert store.put_new("name", b"first")
    proxy.broken = [Breakage("cut after", "PUT")]
    assert not store.put_new("name", b"second")
    assert store.get("name") == b"first"


def _capture(uri: str, bench: Bench, num_units: int = 2) -> None:
    cache = Lake.create(uri).create_cache("main", bench.spec)
    for unit in bench.units[:num_units]:
        if unit.unit not in cache.committed_units():
            cache.publish_unit(unit)
    cache.snapshot()


def _cache(uri: str) -> Cache:
    return Lake.open(uri).cache("main")


def _read_all(uri: str, copies: Path) -> int:
    dataset = LakeDataset(uri, "main", copies=ShardCopies(copies))
    try:
        return len(dataset.__getitems__(range(len(dataset))))
    finally:
        dataset.close()


def _assert_whole(uri: str, bench: Bench) -> None:
    cache = _cache(uri)
    check = CacheCheck(cache)
    assert [*check.records(), *(one for unit in check.units for one in check.unit(unit, full=True)), *check.ids()] == []
    assert {commit.unit for commit in cache.open_snapshot().commits} == {unit.unit for unit in bench.units}
    assert len(cache.store.names("caches/main")) == 1 + 3 * len(bench.units) + cache.open_snapshot().number
