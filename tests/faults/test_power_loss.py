"""A6: the power fails after any call, and the disk keeps only what it was asked to keep.

A file system may lose every name and every byte that was not synced, in any combination. The log of one undisturbed
capture is replayed up to call n on a model of such a disk; what the model kept is laid out as a folder, and that
folder is treated as after any other crash.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.faults.conftest import Bench
from tests.faults.harness import Call, Outcome
from tests.faults.laws import assert_finished, assert_nothing_torn
from tests.faults.test_kill import MOST_CALLS

FOLDER = "a folder"


@dataclass
class Disk:
    """Names that a process sees and names that a power loss leaves, each standing for an inode."""

    seen: dict[str, int] = field(default_factory=lambda: {"": 0})
    kept: dict[str, int] = field(default_factory=lambda: {"": 0})
    folders: set[int] = field(default_factory=lambda: {0})
    synced: set[int] = field(default_factory=set)
    """inodes of files whose bytes were synced after they were written"""

    def apply(self, call: Call) -> None:
        """One call that succeeded."""
        before, _, after = call.path.partition(" -> ")
        if call.op in ("mkdir", "open") and before not in self.seen:
            self.seen[before] = call.number
            if call.op == "mkdir":
                self.folders.add(call.number)
        elif call.op == "write":
            self.synced.discard(self.seen[before])
        elif call.op == "fsync" and self.seen[before] in self.folders:
            self.kept = {name: inode for name, inode in self.kept.items() if _folder(name) != before or not name}
            self.kept |= {name: inode for name, inode in self.seen.items() if _folder(name) == before and name}
        elif call.op == "fsync":
            self.synced.add(self.seen[before])
        elif call.op == "link":
            self.seen[after] = self.seen[before]
        elif call.op == "rename":
            self.seen[after] = self.seen.pop(before)
        elif call.op == "unlink":
            del self.seen[before]

    def after_power_loss(self, lucky: Callable[[], float]) -> dict[str, float | str]:
        """The names that are left: `FOLDER`, or the part of its bytes that a file has. `lucky` draws from [0, 1)."""
        names = {}
        for name in sorted(self.seen.keys() | self.kept.keys()):
            same = self.seen.get(name) == self.kept.get(name)
            source = self.kept if same or lucky() < 0.5 else self.seen
            if name in source:
                names[name] = source[name]
        # What lies in a folder that was lost is lost with it.
        left = {name: inode for name, inode in names.items() if all(above in names for above in _above(name))}
        return {
            name: FOLDER if inode in self.folders else 1.0 if inode in self.synced else round(lucky(), 1)
            for name, inode in left.items()
        }


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts))]


def _draws(variant: str, call: int) -> Callable[[], float]:
    """`synced`: only what was synced is left; `names`: every name and no byte that was not; a number: a seed."""
    if variant in ("synced", "names"):
        values = {"synced": 0.0, "names": 0.5}
        return lambda: values[variant]
    return random.Random(f"{variant} {call}").random


_TRACE: list[Outcome] = []


@pytest.fixture
def trace(bench: Bench) -> Outcome:
    """One undisturbed capture."""
    if not _TRACE:
        _TRACE.append(bench.run("capture", root=bench.root.with_name("traced")))
        assert _TRACE[0].ended == "done"
    return _TRACE[0]


@pytest.mark.parametrize("call", range(MOST_CALLS + 1))
@pytest.mark.parametrize("variant", ["synced", "names", "seed 0", "seed 1"])
def test_a_power_loss_tears_nothing(
    bench: Bench, finished: dict[str, bytes], trace: Outcome, variant: str, call: int
) -> None:
    """After call n the power fails: what was acknowledged is there and whole, and the work can be finished."""
    disk, seen = Disk(), []
    for done in trace.calls[:call]:
        if done.errno == 0:
            disk.apply(done)
        seen.append(disk.after_power_loss(_draws(variant, call)))
    if not seen or len(seen) < call or (len(seen) > 1 and seen[-1] == seen[-2]):
        return  # no such call, or one that changes nothing that a power loss could leave
    _lay_out(bench.root, seen[-1], finished)
    acknowledged = [fact["committed"] for fact in trace.said if "committed" in fact and fact["after"] <= call]
    snapshots = [fact["snapshot"] for fact in trace.said if "snapshot" in fact and fact["after"] <= call]
    assert_nothing_torn(bench.root, acknowledged, snapshots)
    assert bench.run("capture").ended == "done"
    assert_finished(bench.root, bench.units, finished)


def test_the_model_loses_what_it_should(trace: Outcome, finished: dict[str, bytes]) -> None:
    """With no sync at all the model keeps nothing; with every call of the trace, every file."""
    deaf, disk = Disk(), Disk()
    for call in trace.calls:
        if call.errno == 0:
            disk.apply(call)
            if call.op != "fsync":
                deaf.apply(call)
    assert deaf.after_power_loss(lambda: 0.0) == {"": FOLDER}
    assert set(deaf.after_power_loss(lambda: 0.5).values()) == {FOLDER, 0.5}
    left = disk.after_power_loss(lambda: 0.0)
    assert {name for name, part in left.items() if part == 1.0} == set(finished)


def _lay_out(root: Path, names: dict[str, float | str], contents: dict[str, bytes]) -> None:
    for name, part in names.items():
        if part == FOLDER:
            (root / name).mkdir()
        else:
            data = contents[name.partition("#")[0]]
            (root / name).write_bytes(data[: int(len(data) * float(part))])
