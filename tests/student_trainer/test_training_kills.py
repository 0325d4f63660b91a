"""A stage that is killed, or finds the disk full, at any of its calls to the disk is in the end the stage that nothing
happened to: the same weights and metrics, byte for byte, and no file more.

Real processes, real SIGKILLs, real errnos, by the library that `tests/faults` puts between a process and libc. The
trainer knows nothing of it.
"""

import json
import pickle
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.faults.conftest import shim
from tests.faults.harness import Call, Fault, Outcome, Workers
from tests.student_trainer.conftest import StudentWorld

from logitlake_student.checkpoints import newest_checkpoint

__all__ = ["shim"]

pytestmark = pytest.mark.slow

# A checkpoint every second step: two of them, then the model.
STAGE = {"type": "d2d", "ema_decay": 0.9}
NUM_SCHEDULES = 5
MOST_KILLS = 4
WRITES = ("write", "fsync")
# Files of a folder that has not got its name yet, or has lost it, are alike; and checkpoints are.
_ALIKE = r"(?<=\.building/).*/.*|(?<=\.model/).*|(?<=\.checkpoint-)\d/.*|#\d+|checkpoint-\d"
# Of the full disks, those after which the run is finished; after the others it is seen that it can be.
FINISHED_EVERY = 4


@dataclass(frozen=True)
class Training:
    """The warm process, what is trained, and what becomes of it undisturbed."""

    workers: Workers
    scenario: Path
    calls: list[Call]
    expected: dict[str, bytes | None]

    def run(self, root: Path, fault: Fault = Fault()) -> Outcome:  # noqa: B008  # frozen
        """What is left to train."""
        root.mkdir(exist_ok=True)
        return self.workers.run("train", root, self.scenario, fault)


def result(root: Path) -> dict[str, bytes | None]:
    """Every file of a run; of those that hold times or the command line, only the name. The lock of a process that was
    killed goes with the next one that trains, if there is anything left to train."""
    dated = ("done.json", "provenance.json")
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".run.lock"]
    return {str(path.relative_to(root)): None if path.name in dated else path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def training(
    shim: Path, student_checkpoint: Path, student_lake: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Training]:
    """See `Training`."""
    folder = tmp_path_factory.mktemp("training")
    workers = Workers(shim, folder, Path(__file__).parent.parent / "faults" / "training_worker.py")
    scenario = folder / "scenario.pickle"
    scenario.write_bytes(pickle.dumps(StudentWorld(folder, student_checkpoint, student_lake).document(STAGE)))
    outcome = Training(workers, scenario, [], {}).run(folder / "undisturbed")
    assert outcome.ended == "done", outcome.said
    yield Training(workers, scenario, outcome.calls, result(folder / "undisturbed"))
    workers.close()


def one_of_each_kind(calls: Sequence[Call], unimportant: str) -> list[int]:
    """Numbers of calls, one for each operation on each file: the last, so that something is there before it. What
    matches `unimportant` in a name makes no difference."""
    return sorted({(call.op, re.sub(unimportant, "", call.path)): call.number for call in calls}.values())


def assert_sound(stage_dir: Path) -> None:
    """What a fault leaves: checkpoints that are whole or not there, and each step once in the metrics."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newest_checkpoint(stage_dir)
    metrics = stage_dir / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    assert steps == sorted(set(steps))


def test_killed_at_every_kind_of_call(training: Training, tmp_path: Path) -> None:
    """C1, C14: one kill, before the call or after it; then the same command to the end."""
    for number in one_of_each_kind(training.calls, _ALIKE):
        call, when = training.calls[number - 1], ("kill_before", "kill_after")[number % 2]
        root = tmp_path / str(number)
        killed = training.run(root, Fault(when, number))
        assert killed.ended == "killed", (call, killed.said)
        assert_sound(root / "run" / "d2d")
        again = training.run(root)
        assert again.ended == "done", (when, call, again.said)
        assert result(root) == training.expected, (when, call)


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
def test_a_schedule_of_kills_changes_nothing_in_the_end(training: Training, tmp_path: Path, seed: int) -> None:
    """Kills one after the other, by seed, also in the run that takes up what the kill before it left."""
    draw = random.Random(seed)
    root = tmp_path / "root"
    for _ in range(draw.randint(2, MOST_KILLS)):
        when = draw.choice(["kill_before", "kill_after", "kill_mid"])
        call = draw.randint(1, len(training.calls))
        fault = Fault(when, max(1, call // 2), ops=("write",)) if when == "kill_mid" else Fault(when, call)
        outcome = training.run(root, fault)
        assert outcome.ended in ("killed", "done"), outcome.said
        assert_sound(root / "run" / "d2d")
    outcome = training.run(root)
    assert outcome.ended == "done", outcome.said
    assert result(root) == training.expected


def test_a_disk_that_is_full_from_any_write_on(training: Training, tmp_path: Path) -> None:
    """C2: one message that names what could not be written; with room again, the same command to the end."""
    writes = [call for call in training.calls if call.op in WRITES]
    numbered = [Call(place, call.op, call.path) for place, call in enumerate(writes, start=1)]
    for place, number in enumerate(one_of_each_kind(numbered, r"#\d+|\.tmp\w+|checkpoint-\d")):
        call = numbered[number - 1]
        root = tmp_path / str(number)
        full = training.run(root, Fault("ENOSPC", number, lasting=True, ops=WRITES))
        assert full.ended == "raised", call
        assert full.error["raised"] == "TrainingError", (call, full.error)
        assert "cannot be written" in full.error["message"]
        assert str(root) in full.error["message"]
        assert_sound(root / "run" / "d2d")
        if place % FINISHED_EVERY == 0:
            again = training.run(root)
            assert again.ended == "done", (call, again.said)
            assert result(root) == training.expected, call
