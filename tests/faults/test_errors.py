"""A2-A5: a disk that answers with an error is met with ours, and the work is finished once the disk is well.

Every call that the capture makes to the disk fails once, or from there on for good. Either the capture did not mind
(the call was repeated, or did not matter) or it raised a `LogitLakeError`; in both cases what is committed is whole.
"""

import pytest
from tests.faults.conftest import Bench
from tests.faults.harness import Fault, Outcome
from tests.faults.laws import assert_finished, assert_nothing_torn
from tests.faults.test_kill import MOST_CALLS, MOST_WRITES

# More syncs than the capture makes.
MOST_SYNCS = 28

# What a disk says once: a bad sector, a signal.
ONCE = ("EIO", "EINTR")


@pytest.mark.parametrize("call", range(1, MOST_CALLS + 1))
@pytest.mark.parametrize("errno", ONCE)
def test_a_call_that_fails_once(bench: Bench, finished: dict[str, bytes], errno: str, call: int) -> None:
    """Call n, whatever it is, fails and the disk is well again."""
    _fail_and_finish(bench, finished, Fault(errno, call))


@pytest.mark.parametrize("call", range(1, MOST_CALLS + 1))
def test_a_disk_that_takes_no_more(bench: Bench, finished: dict[str, bytes], call: int) -> None:
    """It is full from call n on: what was committed before stays readable, and the error is ours."""
    outcome = _fail_and_finish(bench, finished, Fault("ENOSPC", call, lasting=True))
    assert (outcome.ended == "raised") == (len(outcome.calls) >= call)


@pytest.mark.parametrize("call", range(1, MOST_WRITES + 1))
def test_a_short_write_is_carried_on(bench: Bench, finished: dict[str, bytes], call: int) -> None:
    """Half of the n-th write lands and the call says so: the rest is written after it."""
    assert _fail_and_finish(bench, finished, Fault("short", call, ops=("write",))).ended == "done"


@pytest.mark.parametrize("call", range(1, MOST_WRITES + 1))
def test_a_disk_that_fills_up_in_the_middle_of_a_write(bench: Bench, finished: dict[str, bytes], call: int) -> None:
    """Half of the n-th write lands, and no byte after it."""
    _fail_and_finish(bench, finished, Fault("torn", call, lasting=True, ops=("write",)))


@pytest.mark.parametrize("call", range(1, MOST_SYNCS + 1))
def test_a_sync_that_fails_is_not_believed(bench: Bench, finished: dict[str, bytes], call: int) -> None:
    """The n-th fsync fails: the publisher says so, and never syncs the same file a second time."""
    outcome = _fail_and_finish(bench, finished, Fault("EIO", call, ops=("fsync",)))
    if call > len(outcome.calls):
        return
    assert outcome.ended == "raised"
    lost = outcome.calls[call - 1].path
    assert "#" not in lost or [other.path for other in outcome.calls].count(lost) == 1


def test_every_sync_is_reached(bench: Bench) -> None:
    """An undisturbed capture makes fewer syncs than are tried."""
    calls = bench.run("capture").calls
    assert 0 < sum(call.op == "fsync" for call in calls) < MOST_SYNCS, "raise MOST_SYNCS"


def test_a_full_disk_is_named_as_such(bench: Bench) -> None:
    """The message says which object could not be written, and why."""
    error = bench.run("capture", Fault("ENOSPC", 1, lasting=True, ops=("write",))).error
    assert error["raised"] == "LakeError"
    assert "lake.json" in error["message"]
    assert "No space left on device" in error["message"]


@pytest.mark.parametrize("read", range(1, 41))
def test_a_read_that_fails_is_ours_too(bench: Bench, read: int) -> None:
    """The n-th read or open of a reader fails: the same rows, or an error of ours, never other rows."""
    assert bench.run("capture").ended == "done"
    whole = bench.run("read")
    assert whole.ended == "done", whole.said
    outcome = bench.run("read", Fault("EIO", read, ops=("open_read", "read")))
    if outcome.ended == "done":
        assert outcome.all("digest") == whole.all("digest")
    else:
        assert outcome.error["explained"], outcome.error["traceback"]


def _fail_and_finish(bench: Bench, finished: dict[str, bytes], fault: Fault) -> Outcome:
    outcome = bench.run("capture", fault)
    assert outcome.ended in ("raised", "done"), outcome.last_calls()
    if outcome.ended == "raised":
        assert outcome.error["explained"], outcome.error["traceback"]
    assert_nothing_torn(bench.root, outcome.all("committed"), outcome.all("snapshot"))
    assert bench.run("capture").ended == "done", outcome.last_calls()
    assert_finished(bench.root, bench.units, finished)
    return outcome
