"""A16, I5: collection takes nothing that a reader or a writer still uses, whatever it runs into.

Collection runs here without the age that garbage must have (24 hours by default), so that it meets writers whose
files are a moment old: the worst case, which the age makes all but impossible.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.faults.conftest import Bench
from tests.faults.harness import Fault
from tests.faults.laws import assert_finished, findings, tree
from tests.faults.test_kill import MOST_CALLS

from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_shared.tools.gc import DEFAULT_GRACE_S, collect, find_garbage
from logitlake_shared.tools.verify import quarantine_damaged

# More calls than a collection of two shards and a leftover makes when it has to put both shards back.
MOST_GC_CALLS = 25
# What a killed writer left: both shards of unit 1, and its record half written.
LEFT_BEHIND = Fault("kill_mid", 6, ops=("write",))


def test_a_reader_keeps_its_snapshot(bench: Bench, make_unit: Callable[..., UnitResult]) -> None:
    """Units come and go, collection runs, and a reader of snapshot 1 sees every row of it and no other."""
    assert bench.run("capture").ended == "done"
    held, late = LakeDataset(bench.root, "main"), LakeDataset(bench.root, "main", snapshot=1)
    cache = Lake.open(bench.root).cache("main")
    cache.quarantine("000001-test", ["a test"])
    cache.publish_unit(make_unit(3))
    assert cache.snapshot().number == 2
    assert bench.run("gc").all("listed") == []
    again = LakeDataset(bench.root, "main", snapshot=1)
    for dataset in (held, late, again):
        assert dataset.snapshot == 1
        assert [item.sample_id for item in dataset.__getitems__(range(4))] == again.ids()
        assert len(dataset) == 4
    assert LakeDataset(bench.root, "main").ids() == ["sample-0020", "sample-0021", "sample-0030", "sample-0031"]


def test_a_reader_outlives_the_files_it_has_open(bench: Bench) -> None:
    """Rows that a reader has begun to read stay readable when somebody removes the file."""
    assert bench.run("capture").ended == "done"
    dataset = LakeDataset(bench.root, "main")
    first = dataset[0]
    for shard in bench.root.glob("caches/main/shards/000001-*"):
        shard.unlink()
    assert dataset[0].messages == first.messages


@pytest.mark.parametrize("call", range(1, MOST_CALLS + 1))
def test_a_writer_that_collection_overtakes_loses_nothing(bench: Bench, finished: dict[str, bytes], call: int) -> None:
    """A capture stops at call n, everything that looks like garbage goes, the capture goes on: whole, or an error of
    ours that the next run mends."""
    writer = bench.start("capture", Fault("stop_before", call))
    if bench.workers.wait(writer).ended == "done":
        return
    collected = bench.run("gc") if (bench.root / "lake.json").exists() else None
    assert collected is None or collected.ended == "done", collected.said
    bench.workers.resume(writer)
    outcome = bench.workers.wait(writer)
    if outcome.ended == "raised":
        assert outcome.error["explained"], outcome.error["traceback"]
        assert bench.run("capture").ended == "done"
    assert_finished(bench.root, bench.units, finished)


@pytest.mark.parametrize("call", range(1, MOST_GC_CALLS + 1))
def test_collection_that_a_writer_overtakes_loses_nothing(bench: Bench, finished: dict[str, bytes], call: int) -> None:
    """Collection stops at its n-th call, the garbage is committed by a new capture, collection goes on."""
    assert bench.run("capture", LEFT_BEHIND).ended == "killed"
    collector = bench.start("gc", Fault("stop_before", call))
    if bench.workers.wait(collector).ended == "done":
        return
    assert bench.run("capture").ended == "done"
    bench.workers.resume(collector)
    assert bench.workers.wait(collector).ended == "done"
    assert_finished(bench.root, bench.units, finished)


@pytest.mark.parametrize("call", range(1, MOST_GC_CALLS + 1))
def test_killed_collection_is_finished_by_the_next(bench: Bench, finished: dict[str, bytes], call: int) -> None:
    """SIGKILL at its n-th call, no writer near: the capture and another collection end as if nothing had been."""
    assert bench.run("capture", LEFT_BEHIND).ended == "killed"
    bench.run("gc", Fault("kill_before", call))
    assert bench.run("gc").ended == "done"
    assert bench.run("capture").ended == "done"
    assert_finished(bench.root, bench.units, finished)
    assert tree(bench.root) == finished


def test_collection_killed_before_it_put_a_shard_back_is_loud_and_healed(bench: Bench) -> None:
    """The one gap: garbage is committed between listing and deletion, and the collector dies before it looks again.

    It takes a shard older than the grace and a crash within the same moment. Then the loss is named, and repaired.
    """
    assert bench.run("capture", LEFT_BEHIND).ended == "killed"
    collector = bench.start("gc", Fault("stop_kill", 2, ops=("unlink",)))
    assert bench.workers.wait(collector).ended == "stopped"
    assert bench.run("capture").ended == "done"
    bench.workers.resume(collector)
    outcome = bench.workers.wait(collector)
    assert outcome.ended == "killed"
    lost = outcome.calls[-1].path
    found = findings(bench.root)
    assert lost in {finding.path for finding in found}
    assert {finding.unit for finding in found} == {"000001-test"}
    quarantine_damaged(Lake.open(bench.root), found)
    assert bench.run("capture").ended == "done"
    assert findings(bench.root) == []


def test_there_are_no_more_calls_of_collection(bench: Bench) -> None:
    """Collection makes fewer calls than are tried."""
    assert bench.run("capture", LEFT_BEHIND).ended == "killed"
    outcome = bench.run("gc")
    assert len(outcome.all("listed")) == 3
    assert 0 < len(outcome.calls) < MOST_GC_CALLS


@pytest.mark.parametrize("clock", [-3600, 24 * 3600, 10 * 365 * 24 * 3600])
def test_a_wrong_clock_of_the_collector_costs_no_row(bench: Bench, finished: dict[str, bytes], clock: int) -> None:
    """A21: whatever the collector takes for the time, what is named stays; ages are never negative."""
    assert bench.run("capture").ended == "done"
    assert bench.run("gc", Fault(clock=clock)).ended == "done"
    assert_finished(bench.root, bench.units, finished)


def test_age_is_never_negative_and_young_garbage_stays(bench: Bench) -> None:
    """Files from the future (another machine's clock) are young; the default grace keeps what a writer just wrote."""
    assert bench.run("capture", LEFT_BEHIND).ended == "killed"
    lake = Lake.open(bench.root)
    paths = [one.path for one in find_garbage(lake, grace_s=0)]
    assert len(paths) == 3
    assert find_garbage(lake) == []
    _date(bench.root, paths, datetime.now(UTC) + timedelta(days=2))
    assert {one.age_s for one in find_garbage(lake, grace_s=0)} == {0.0}
    assert find_garbage(lake) == []
    _date(bench.root, paths, datetime.now(UTC) - timedelta(seconds=DEFAULT_GRACE_S + 60))
    assert [one.path for one in collect(lake, find_garbage(lake))] == paths


def _date(root: Path, paths: list[str], when: datetime) -> None:
    for path in paths:
        os.utime(root / path, (when.timestamp(), when.timestamp()))
