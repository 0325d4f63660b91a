"""A1: a writer that is killed at any call it makes to the disk loses nothing and tears nothing.

The work is a whole capture: a lake, a cache, two units of a samples and an images shard each, a snapshot. It is killed
before and after its n-th call, and in the middle of its n-th write, for every n. Then it is done again, and again.
"""

import re

import pytest
from tests.faults.conftest import Bench
from tests.faults.harness import Call, Fault
from tests.faults.laws import assert_finished, assert_nothing_torn, tree

from logitlake_shared.lake import Lake
from logitlake_shared.tools.gc import collect, find_garbage

# More than the calls that the work makes; the first test says so if it ever makes more.
MOST_CALLS = 76
MOST_WRITES = 12
WRITES = ("write",)

# The crash points of the fault matrix, each as the call of the first unit that it stands for.
SHARD, RECORD, SNAPSHOT = "caches/main/shards/000001", "caches/main/commits/000001", "caches/main/snapshots/00000001"
CRASH_POINTS = {
    "before_open": ("kill_before", "open", SHARD),
    "after_open": ("kill_after", "open", SHARD),
    "mid_write": ("kill_mid", "write", SHARD),
    "after_write": ("kill_after", "write", SHARD),
    "after_fsync": ("kill_after", "fsync", SHARD),
    "after_rename": ("kill_after", "link", SHARD),
    "after_dirsync": ("kill_after", "fsync", "caches/main/shards$"),
    "after_manifest_tmp": ("kill_after", "write", RECORD),
    "after_manifest_put": ("kill_after", "link", RECORD),
    "before_ack": ("kill_after", "fsync", "caches/main/commits$"),
}


def test_every_call_is_reached(bench: Bench) -> None:
    """An undisturbed capture makes fewer calls than the tests below try, so that the last of them is unharmed."""
    outcome = bench.run("capture")
    assert outcome.ended == "done", outcome.said
    assert 0 < len(outcome.calls) < MOST_CALLS, "raise MOST_CALLS"
    assert 0 < sum(call.op == "write" for call in outcome.calls) < MOST_WRITES, "raise MOST_WRITES"
    assert {call.op for call in outcome.calls} == {"open", "write", "fsync", "link", "unlink", "mkdir"}


@pytest.mark.parametrize("call", range(1, MOST_CALLS + 1))
@pytest.mark.parametrize("when", ["kill_before", "kill_after"])
def test_a_killed_capture_is_finished_by_the_next(
    bench: Bench, finished: dict[str, bytes], when: str, call: int
) -> None:
    """SIGKILL at call n: nothing torn, nothing acknowledged lost, and the next run ends as if nothing had been."""
    _kill_and_finish(bench, finished, Fault(when, call))


@pytest.mark.parametrize("call", range(1, MOST_WRITES + 1))
def test_a_capture_killed_in_the_middle_of_a_write(bench: Bench, finished: dict[str, bytes], call: int) -> None:
    """SIGKILL when half of the n-th write has landed."""
    _kill_and_finish(bench, finished, Fault("kill_mid", call, ops=WRITES))


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_capture_killed_at_a_named_point(bench: Bench, finished: dict[str, bytes], point: str) -> None:
    """The crash points of the fault matrix, by name: each is a call that the log of an undisturbed run shows."""
    when, op, path = CRASH_POINTS[point]
    calls = bench.run("capture", root=bench.root.with_name("counted")).calls
    number = _first(calls, op, path)
    if when == "kill_mid":
        writes = [call.number for call in calls if call.op == "write"]
        _kill_and_finish(bench, finished, Fault(when, writes.index(number) + 1, ops=WRITES))
    else:
        _kill_and_finish(bench, finished, Fault(when, number))


def test_publishing_again_after_a_crash_heals_what_was_left(bench: Bench, finished: dict[str, bytes]) -> None:
    """A publisher that does not look at what is committed (a second writer) still ends at the same bytes."""
    number = _first(bench.run("capture", root=bench.root.with_name("counted")).calls, "write", RECORD)
    assert bench.run("capture", Fault("kill_after", number)).ended == "killed"
    assert bench.run("capture", everything=True).ended == "done"
    assert_finished(bench.root, bench.units, finished)


def _kill_and_finish(bench: Bench, finished: dict[str, bytes], fault: Fault) -> None:
    outcome = bench.run("capture", fault)
    assert outcome.ended in ("killed", "done"), outcome.said
    assert (outcome.ended == "killed") == (len(outcome.calls) >= fault.call), outcome.last_calls()
    if outcome.ended == "done":
        assert tree(bench.root) == finished
        return
    assert_nothing_torn(bench.root, outcome.all("committed"), outcome.all("snapshot"))
    assert bench.run("capture").ended == "done", outcome.last_calls()
    assert_finished(bench.root, bench.units, finished)
    before = tree(bench.root)
    again = bench.run("capture")
    assert again.ended == "done"
    assert tree(bench.root) == before
    lake = Lake.open(bench.root)
    collect(lake, find_garbage(lake, grace_s=0))
    assert tree(bench.root) == finished, "collection leaves something of the crash, or takes more than that"


def _first(calls: list[Call], op: str, path: str) -> int:
    return next(call.number for call in calls if call.op == op and re.match(path, call.path))
