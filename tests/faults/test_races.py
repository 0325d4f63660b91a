"""A12, A13: of two processes that publish the same thing exactly one wins, whenever either is stopped."""

from pathlib import Path
from typing import Any

import pytest
from tests.faults.conftest import Bench
from tests.faults.harness import Fault
from tests.faults.laws import assert_finished, findings
from tests.faults.test_kill import MOST_CALLS

from logitlake_shared.errors import LakeConflictError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.reader import LakeDataset

ROUNDS = 200
ROUNDS_ON_S3 = 10
SAMPLES_OF_A_UNIT = 2


def test_of_two_publishers_of_a_unit_with_other_content_one_wins(bench: Bench) -> None:
    """200 rounds: one record each, and its publisher is the only one that was not told of a conflict."""
    got = _race(bench, "conflict", ROUNDS)
    caches = _caches(bench.root)
    records = {unit: cache.commit(unit) for cache in caches for unit in cache.committed_units()}
    assert len(records) == ROUNDS
    for answers in got:
        (winner,) = (answer for answer in answers if "unit" in answer)
        (loser,) = (answer for answer in answers if "conflict" in answer)
        assert [entry.sha256 for entry in records[winner["unit"]].shards] == winner["shards"]
        assert "committed with other content" in loser["conflict"]
    assert [finding for cache in caches for finding in findings(bench.root, cache.name)] == []


def test_of_two_publishers_of_one_unit_both_are_told_the_same(bench: Bench) -> None:
    """200 rounds of equal content: one record, one set of shards, and both publishers have it."""
    for first, second in _race(bench, "unit", ROUNDS):
        assert first == second
        assert "unit" in first
    caches = _caches(bench.root)
    assert sum(len(cache.committed_units()) for cache in caches) == ROUNDS
    assert len(list(bench.root.glob("caches/*/shards/*"))) == ROUNDS
    for cache in caches:
        cache.snapshot()
    assert sum(len(LakeDataset(bench.root, cache.name)) for cache in caches) == SAMPLES_OF_A_UNIT * ROUNDS


def test_of_two_snapshot_makers_none_loses_a_unit(bench: Bench) -> None:
    """200 rounds: a snapshot holds what its maker had published, and everything that the one before it held."""
    pinned: dict[str, list[int]] = {}
    for answers in _race(bench, "snapshot", ROUNDS):
        for answer in answers:
            pinned.setdefault(answer["unit"], []).append(answer["snapshot"])
    assert len(pinned) == 2 * ROUNDS
    for cache in _caches(bench.root):
        numbers = range(1, cache.open_snapshot().number + 1)
        units = {number: {commit.unit for commit in cache.open_snapshot(number).commits} for number in numbers}
        for unit in cache.committed_units():
            (number,) = pinned[unit]
            assert unit in units[number]
        assert all(units[number] < units[number + 1] for number in numbers[:-1])
        assert units[numbers[-1]] == cache.committed_units()


@pytest.mark.parametrize("kind", ["unit", "conflict", "snapshot"])
def test_an_object_store_decides_as_a_disk_does(bench: Bench, s3_bucket: str, kind: str) -> None:
    """The same races on S3."""
    uri = f"s3://{s3_bucket}/lake"
    got = _race(bench, kind, ROUNDS_ON_S3, uri)
    (cache,) = _caches(uri)
    assert {commit.unit for commit in cache.snapshot().commits} == cache.committed_units()
    assert len(cache.committed_units()) == (2 if kind == "snapshot" else 1) * ROUNDS_ON_S3
    for answers in got:
        assert sum("unit" in answer for answer in answers) == (1 if kind == "conflict" else 2)


@pytest.mark.parametrize("call", range(1, MOST_CALLS + 1))
def test_a_publisher_that_was_stopped_while_another_finished(
    bench: Bench, finished: dict[str, bytes], call: int
) -> None:
    """SIGSTOP at call n; another process does the whole work; the first goes on: it ends as the second did."""
    stopped = bench.start("capture", Fault("stop_before", call))
    outcome = bench.workers.wait(stopped)
    if outcome.ended == "done":
        assert len(outcome.calls) < call
        return
    assert outcome.ended == "stopped"
    assert bench.run("capture").ended == "done"
    bench.workers.resume(stopped)
    outcome = bench.workers.wait(stopped)
    assert outcome.ended == "done", outcome.said
    assert_finished(bench.root, bench.units, finished)


@pytest.mark.parametrize("link", [1, 2, 3])
def test_a_stopped_publisher_of_other_content_is_refused(bench: Bench, link: int) -> None:
    """It comes back with other rows (a teacher that is not deterministic), whichever of its three files was next."""
    assert bench.run("make").ended == "done"
    stopped = bench.start("publish", Fault("stop_before", link, ops=("link",)), unit=0, content_of=1)
    assert bench.workers.wait(stopped).ended == "stopped"
    assert bench.run("publish", unit=0).ended == "done"
    committed = Lake.open(bench.root).cache("main").commit("000001-test")
    bench.workers.resume(stopped)
    outcome = bench.workers.wait(stopped)
    assert outcome.error["raised"] == LakeConflictError.__name__
    assert Lake.open(bench.root).cache("main").commit("000001-test") == committed
    assert findings(bench.root) == []


def _caches(root: Path | str) -> list[Cache]:
    lake = Lake.open(root)
    return [lake.cache(name) for name in lake.cache_names()]


def _race(bench: Bench, kind: str, rounds: int, uri: str | None = None) -> list[list[dict[str, Any]]]:
    """What both publishers got in each round."""
    root = uri or bench.root
    outcome = bench.run("race", root=root, rounds=rounds, kind=kind)
    assert outcome.ended == "done", outcome.said
    assert outcome.all("broken") == []
    got: list[list[dict[str, Any]]] = [[] for _ in range(rounds)]
    for fact in outcome.said:
        got[fact["round"]].append(fact["got"])
    assert {len(answers) for answers in got} == {2}
    return got
