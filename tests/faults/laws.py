"""What holds after every fault: the invariants I1-I6 and I10 of a lake, as checks of a folder.

I1  what a record or snapshot names is there, whole      I4  every planned sample is counted once
I2  what was acknowledged is not done again              I5  a reader sees one snapshot (`test_gc_and_readers`)
I3  no sample twice                                      I6  doing finished work again changes no byte
I10 what a stopped writer leaves is never data, and collection names it
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from logitlake_shared.errors import LakeError, LakeFormatError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_shared.tools.gc import find_garbage
from logitlake_shared.tools.verify import CacheCheck, Finding

__all__ = ["assert_counted_once", "assert_finished", "assert_nothing_torn", "findings", "tree"]


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root`: its relative name and its bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def findings(root: Path, cache: str = "main") -> list[Finding]:
    """What `logitlake verify` finds in the cache."""
    check = CacheCheck(Lake.open(root).cache(cache))
    found = list(check.records())
    for unit in check.units:
        found += check.unit(unit, full=True)
    return [*found, *check.ids()]


def assert_nothing_torn(root: Path, acknowledged: Iterable[str] = (), snapshots: Iterable[int] = ()) -> None:
    """A lake as a fault left it: whatever is named is whole (I1), and what was acknowledged is there (I2)."""
    acknowledged, snapshots = list(acknowledged), list(snapshots)
    try:
        lake = Lake.open(root)
    except LakeFormatError:
        assert not acknowledged, "the lake of an acknowledged unit is gone"
        assert not any(name for name in tree(root) if "#" not in name), "files in a lake that does not open"
        return
    assert not any("#" in name for name in lake.store.names("")), "a half-written file is listed as an object"
    if "main" not in lake.cache_names():
        assert not acknowledged, "the cache of an acknowledged unit is gone"
        return
    cache = lake.cache("main")
    committed = cache.committed_units()
    assert set(acknowledged) <= committed
    pinned = [cache.open_snapshot(number) for number in snapshots]
    if cache.has_snapshot():
        pinned.append(cache.open_snapshot())
    for commit in [*map(cache.commit, committed), *(commit for snapshot in pinned for commit in snapshot.commits)]:
        for entry in commit.shards:
            data = (root / entry.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
    leftovers = {name for name in tree(root) if "#" in name}
    garbage = {found.path for found in find_garbage(lake, grace_s=0)}
    # One that is gone by now was no leftover: its writer outlived whoever was killed, and has finished it.
    unseen = {name for name in leftovers - garbage if (root / name).exists()}
    assert not unseen, f"leftovers that gc cannot see: {unseen}"


def assert_counted_once(root: Path, planned: Mapping[str, Sequence[str]]) -> int:
    """Each planned sample is a row, an error with a code, or pending, and only one of these (I3, I4, I8).

    `planned`: the sample ids of each unit. Returns how many are pending.
    """
    try:
        cache = Lake.open(root).cache("main")
    except LakeError:
        return sum(map(len, planned.values()))
    pending = 0
    for unit, ids in planned.items():
        if unit not in cache.committed_units():
            pending += len(ids)
            continue
        commit = cache.commit(unit)
        rows = [
            sample_id
            for entry in commit.shards
            if entry.kind == "samples"
            for sample_id in cache.read(entry, ["sample_id"]).column("sample_id").to_pylist()
        ]
        assert Counter([*rows, *(error.sample_id for error in commit.errors)]) == Counter(ids), unit
        assert all(error.code and error.message for error in commit.errors)
    assert cache.committed_units() <= planned.keys()
    return pending


def assert_finished(root: Path, units: Sequence[UnitResult], expected: dict[str, bytes]) -> None:
    """A lake after the work was finished: the bytes of an undisturbed one (I1, I6), each sample once (I3, I4)."""
    lake = Lake.open(root)
    cache = lake.cache("main")
    garbage = {one.path for one in find_garbage(lake, grace_s=0)}
    files = {name: data for name, data in tree(root).items() if name not in garbage}
    assert files.keys() == expected.keys()
    assert files == expected
    snapshot = cache.open_snapshot()
    assert [commit.unit for commit in snapshot.commits] == sorted(unit.unit for unit in units)
    assert findings(root) == []
    dataset = LakeDataset(root, "main")
    samples = {sample.sample_id: sample for unit in units for sample in unit.samples}
    assert dataset.ids() == sorted(samples)
    for item in dataset.__getitems__(range(len(dataset))):
        np.testing.assert_array_equal(item.rows.topk_ids, samples[item.sample_id].rows.topk_ids)
        np.testing.assert_array_equal(item.rows.topk_logprobs, samples[item.sample_id].rows.topk_logprobs)
        assert [hashlib.sha256(image).hexdigest() for image in item.images] == list(item.image_sha256)
    dataset.close()
