"""A capture that is killed again and again, by seed, is in the end the capture that nobody disturbed.

Two hundred schedules. Each draws where its kills fall: at which of the capture's calls to the disk, before it, after
it, or in the middle of a write, one after the other over as many restarts, real processes and real SIGKILLs. After
every kill the invariants of `laws.py` hold (I1-I4, I8); in the end the lake is byte for byte that of an undisturbed
run (I6), and running the finished capture again changes nothing. A schedule is replayed by
`pytest tests/faults -k "schedule and 17"`.
"""

import io
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.faults.harness import Fault, Outcome, Workers
from tests.faults.laws import assert_counted_once, assert_nothing_torn, findings, tree

from logitlake_schemas import CaptureSpec, sha256_hex
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset
from logitlake_shared.tools.gc import find_garbage
from logitlake_teacher.config import FakeEngineConfig
from logitlake_teacher.engines import EngineSetup
from logitlake_teacher.items import PlannedSample, Unit

NUM_SCHEDULES = 200
MOST_KILLS = 6
NUM_UNITS, NUM_SAMPLES = 5, 3
# The teacher has no number for this one: every lake must hold its error row.
NAN_ON = "s03-1"


def made_unit(number: int) -> Unit:
    """Three samples about one picture, four response tokens each."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (number * 40, 90, 200)).save(buffer, "PNG")
    data = buffer.getvalue()
    response_ids = np.array([7, 8, 9, 1], np.int32)
    samples = tuple(
        PlannedSample(
            sample_id=f"s{number:02d}-{place}",
            task="caption",
            source="made",
            split="train",
            messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
            prompt_ids=np.array([5, 2, 6 + place], np.int32),
            prompt_lengths=np.array([3], np.int32),
            response_ids=response_ids,
            response_lengths=np.array([4], np.int32),
            images=(ImageRef(data=data),),
            image_sha256=(sha256_hex(data),),
        )
        for place in range(NUM_SAMPLES)
    )
    return Unit(f"{number:06d}-test", samples)


@dataclass(frozen=True)
class Schedules:
    """The warm process, the plan, and the lake of a capture that nothing disturbed."""

    workers: Workers
    scenario: Path
    planned: dict[str, list[str]]
    num_calls: int
    expected: dict[str, bytes]

    def run(self, root: Path, fault: Fault = Fault(), **arguments: object) -> Outcome:  # noqa: B008  # frozen
        """A capture of what is left."""
        return self.workers.run("teach", root, self.scenario, fault, **arguments)


@pytest.fixture(scope="module")
def workers(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A warm process that knows the teacher."""
    script = Path(__file__).with_name("teacher_worker.py")
    workers = Workers(shim, tmp_path_factory.mktemp("teacher-reports"), script)
    yield workers
    workers.close()


@pytest.fixture
def schedules(workers: Workers, place: Path, capture_spec: CaptureSpec) -> Schedules:
    """See `Schedules`; the undisturbed capture is done once."""
    units = [made_unit(number) for number in range(NUM_UNITS)]
    setup = EngineSetup(place, vocab_size=40, eos_id=1, image_token_id=2, k=8, num_threads=1)
    made = {"spec": capture_spec, "units": units, "setup": setup, "engine": FakeEngineConfig(wrong={NAN_ON: "nan"})}
    scenario = place / "scenario.pickle"
    scenario.write_bytes(pickle.dumps(made))
    planned = {unit.unit_id: [item.item_id for item in unit.items] for unit in units}
    if not _UNDISTURBED:
        whole = Schedules(workers, scenario, planned, 0, {}).run(place / "undisturbed")
        assert whole.ended == "done", whole.said
        _UNDISTURBED.append((len(whole.calls), tree(place / "undisturbed")))
    return Schedules(workers, scenario, planned, *_UNDISTURBED[0])


_UNDISTURBED: list[tuple[int, dict[str, bytes]]] = []


def drawn_fault(draw: random.Random, num_calls: int) -> Fault:
    """A kill at some call of a capture that has `num_calls` left at most."""
    call = draw.randint(1, num_calls)
    when = draw.choice(["kill_before", "kill_after", "kill_mid"])
    return Fault(when, max(1, call // 6), ops=("write",)) if when == "kill_mid" else Fault(when, call)


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
def test_a_schedule_of_kills_changes_nothing_in_the_end(schedules: Schedules, place: Path, seed: int) -> None:
    """Killed up to six times at drawn calls: nothing torn, lost or doubled on the way, the undisturbed lake at last."""
    draw = random.Random(seed)
    root = place / "lake"
    acknowledged: set[str] = set()
    snapshots: set[int] = set()
    left = schedules.num_calls
    for _ in range(draw.randint(1, MOST_KILLS)):
        outcome = schedules.run(root, drawn_fault(draw, left), everything=draw.random() < 0.2)
        assert outcome.ended in ("killed", "done"), outcome.said
        acknowledged |= set(outcome.all("committed"))
        snapshots |= set(outcome.all("snapshot"))
        assert_nothing_torn(root, acknowledged, snapshots)
        pending = assert_counted_once(root, schedules.planned)
        # So that later kills still fall where something is done.
        left = max(20, schedules.num_calls * pending // (NUM_UNITS * NUM_SAMPLES))
    last = schedules.run(root)
    assert last.ended == "done", last.said
    assert acknowledged <= set(last.all("found")), "acknowledged work is done again"
    assert_undisturbed(root, schedules)
    before = tree(root)
    again = schedules.run(root)
    assert again.ended == "done"
    assert not again.all("committed")
    assert tree(root) == before


def test_the_kills_reach_every_part_of_a_capture(schedules: Schedules) -> None:
    """The drawn calls cover an undisturbed capture from the first to the last, and the half-written ones are writes."""
    drawn = {drawn_fault(random.Random(seed), schedules.num_calls).call for seed in range(NUM_SCHEDULES)}
    assert min(drawn) < 0.1 * schedules.num_calls
    assert max(drawn) > 0.9 * schedules.num_calls


def assert_undisturbed(root: Path, schedules: Schedules) -> None:
    """The lake of a capture that nothing disturbed, garbage aside: every sample once, whole, or its error row."""
    garbage = {one.path for one in find_garbage(Lake.open(root), grace_s=0)}
    files = {name: data for name, data in tree(root).items() if name not in garbage}
    assert files == schedules.expected
    assert assert_counted_once(root, schedules.planned) == 0
    assert findings(root) == []
    dataset = LakeDataset(root, "main")
    wanted = sorted(item for ids in schedules.planned.values() for item in ids if item != NAN_ON)
    assert dataset.ids() == wanted
    dataset.close()
