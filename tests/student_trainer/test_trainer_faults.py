"""What goes wrong in a training run, and what is left of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.student_trainer.torchrun import run_two_ranks, two_ranks

from logitlake_shared.errors import ConfigError, FingerprintMismatchError, MemoryExhaustedError, TrainingError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_student import trainer as trainer_module
from logitlake_student.data import EpochOrder
from logitlake_student.losses import distillation as distillation_module
from logitlake_student.objectives import distillation as objective_module
from logitlake_student.output_lock import output_lock
from logitlake_student.run import plan_run, train_run

Metrics = Callable[[Path], list[dict[str, Any]]]

D2D = {"type": "d2d"}
# A start, some steps and an end of two processes on a busy machine.
TIMEOUT_S = 240
# More than healthy ranks are ever apart while they load, on a machine that has three times as much to do as it can.
RANK_TIMEOUT_S = 30.0
# torchrun asks a rank to end and makes it end 30 s later; one that is stopped does not answer. And a busy machine.
LAUNCHER_GRACE_S = 60
# The same sums in float32 in another order, grown over a hundred steps of AdamW.
SUM_TOLERANCE = 1e-3


class Killed(BaseException):
    """Where a run is made to end."""


def stopped_after_two_checkpoints(world: Any, monkeypatch: pytest.MonkeyPatch, config: Any) -> Path:
    """The folder of a stage that ended after steps 2 and 4 of 6 were saved."""
    calls: list[Any] = []
    publish = trainer_module.publish_folder

    def counted(built: Path, name: Path) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise Killed
        publish(built, name)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "publish_folder", counted)
        with pytest.raises(Killed):
            world.train(config)
    folder: Path = world.output / "d2d"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    return folder


# ---- C2, C3: checkpoints ----


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_no_whole_checkpoint_is_said_and_not_begun_again(
    student_world: Any, student_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """C3: with every checkpoint damaged the command ends with code 4; nothing is overwritten."""
    config = student_world.train_config(D2D | {"steps": 6})
    folder = stopped_after_two_checkpoints(student_world, monkeypatch, config)
    for checkpoint in folder.glob("checkpoint-*"):
        victim = checkpoint / "optimizer.pt"
        data = victim.read_bytes()
        if damage == "missing":
            victim.unlink()
        else:
            victim.write_bytes(data[:-1] if damage == "truncated" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.warns(UserWarning, match=r"checkpoint-\d: not used"):
        result = student_command("train", student_world.file(D2D | {"steps": 6}))
    assert result.code == 4
    assert "none of its checkpoints is whole (checkpoint-2, checkpoint-4" in result.err


def test_a_disk_that_fills_up_costs_nothing_saved(student_world: Any, metrics_of: Metrics) -> None:
    """C2: a checkpoint that cannot be written ends the run with a message; the one before it stays whole, and the same
    command goes on from it once there is room."""
    config = student_world.file(D2D | {"steps": 6})
    # The first checkpoint is written whole; then no file may grow beyond a kilobyte.
    program = (
        "import resource, signal, sys\n"
        "from logitlake_student import trainer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "publish = trainer.publish_folder\n"
        "def full_after(built, name):\n"
        "    publish(built, name)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))\n"
        "trainer.publish_folder = full_after\n"
        "from logitlake_student.cli import main\n"
        f"sys.argv = ['logitlake-student', 'train', {str(config)!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "checkpoint-4: cannot be written" in done.stderr
    folder = student_world.output / "d2d"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    student_world.train(student_world.train_config(D2D | {"steps": 6}))
    assert json.loads((folder / "done.json").read_text())["figures"]["resumed_at_step"] == 2
    assert [line["step"] for line in metrics_of(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("other", ["seed", "snapshot", "cache"])
def test_a_checkpoint_of_another_run_is_refused(
    student_world: Any, capture_samples: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The identity of what is trained on what is in every checkpoint: one that was copied here from a run with another
    configuration, snapshot or cache is not gone on from, and the field is named, before the first step."""
    stage = D2D | {"steps": 6}
    folder = stopped_after_two_checkpoints(student_world, monkeypatch, student_world.train_config(stage))
    field = {"seed": "stage.seed", "snapshot": "lake.snapshot", "cache": "lake.samples"}[other]
    lake, data = student_world.folder / "lake", {}
    if other == "seed":
        stage = stage | {"seed": 1}
    else:
        shutil.copytree(student_world.lake, lake)
        data = {"lake": str(lake)}
    if other == "snapshot":
        sample = LakeDataset(lake, "main", split="train")[4]
        cache = Lake.open(lake).cache("main")
        cache.publish_unit(
            UnitResult(unit="999999-later", samples=[replace(sample, sample_id="later", image_sha256=())])
        )
        assert cache.snapshot().number == 2
    if other == "cache":
        capture_samples(lake, "other", codec={"k_max": 8})
        data["samples"] = "other"
    config = student_world.train_config(stage, output=str(student_world.folder / "other"), data=data)
    (run,) = plan_run(config)
    run.folder.mkdir(parents=True)
    (folder / "checkpoint-4").rename(run.folder / "checkpoint-4")
    with pytest.raises(FingerprintMismatchError, match=rf"something else: `{field}` is \S+ there, \S+ here"):
        student_world.train(config)
    assert (run.folder / "metrics.jsonl").read_text() == ""


# ---- C6: what is not finite ----


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int, of: str = "loss") -> None:
    """Makes the loss of some steps, or only its gradient, not a number."""
    calls: list[int] = []
    loss = distillation_module.distillation_loss

    def spoilt(hidden_RH: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        value, sums = loss(hidden_RH, *arguments, **keywords)
        if len(calls) in steps:
            # The root of 0 is 0, and its slope times 0 is nothing that has a value.
            value = value * float("nan") if of == "loss" else value + (0 * hidden_RH.sum()).sqrt()
        return value, sums

    monkeypatch.setattr(objective_module, "distillation_loss", spoilt)


@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_written_down_and_left_out(
    student_world: Any, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """Within `max_skipped` the stage goes on with finite weights; its samples can be looked at, and read again: they
    are those that the order gives this step."""
    poisoned(monkeypatch, 2, of=of)
    folder = student_world.train(student_world.train_config(D2D | {"max_skipped": 1}))
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 1]
    assert lines[1]["grad_norm"] is None
    assert "loss" not in lines[1]
    assert all(line["forward_kl"] > 0 for line in (lines[0], *lines[2:]))
    written = json.loads((folder / "not-finite-2.json").read_text())
    assert written["step"] == 2
    assert written["grad_norm"] == "nan"
    assert (written["loss"] == "nan") == (of == "loss")
    dataset = LakeDataset(student_world.lake, "main", split="train")
    assert written["samples"] == [dataset.ids()[place] for place in list(EpochOrder(dataset.layout, 8, 0))[4:8]]
    assert all(torch.isfinite(t).all() for t in load_file(folder / "model" / "model.safetensors").values())


def test_too_many_of_them_end_the_stage(student_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than `max_skipped`."""
    poisoned(monkeypatch, 2, 3)
    with pytest.raises(TrainingError, match=r"step 3: .*2 such steps, `max_skipped` is 1.*not-finite-3.json"):
        student_world.train(student_world.train_config(D2D | {"max_skipped": 1}))


def test_steps_left_out_are_remembered(
    student_world: Any, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that stops and goes on counts those before its checkpoint, and does those after it again: its metrics are
    those of a stage that did not stop, and `max_skipped` is of the stage, not of the process."""
    config = student_world.train_config(D2D | {"steps": 6, "max_skipped": 1})
    with monkeypatch.context() as patch:
        poisoned(patch, 2)
        whole = student_world.train_config(
            D2D | {"steps": 6, "max_skipped": 1}, output=str(student_world.folder / "whole")
        )
        expected = student_world.train(whole)
    with monkeypatch.context() as patch:
        poisoned(patch, 2)
        folder = stopped_after_two_checkpoints(student_world, patch, config)
    with monkeypatch.context() as patch:
        poisoned(patch, 1)  # step 5, the second
        with pytest.raises(TrainingError, match=r"step 5: .*2 such steps, `max_skipped` is 1"):
            student_world.train(config)
    assert (folder / "not-finite-5.json").exists()
    student_world.train(config)
    assert not (folder / "not-finite-5.json").exists()
    assert metrics_of(folder) == metrics_of(expected)


@pytest.mark.slow
@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_rank_is_left_out_on_all(
    student_world: Any, metrics_of: Metrics, data_parallel: str
) -> None:
    """Both ranks decide the same and take the same steps after it: the other one's gradient was finite."""
    config = student_world.file(D2D | {"steps": 6, "max_skipped": 1}, data_parallel=data_parallel)
    program = student_world.folder / "poisoned.py"
    program.write_text(
        "import os, sys\n"
        "from logitlake_student.objectives import distillation\n"
        "loss, calls = distillation.distillation_loss, []\n"
        "def spoilt(*arguments, **keywords):\n"
        "    calls.append(1)\n"
        "    value, sums = loss(*arguments, **keywords)\n"
        "    spoil = os.environ['RANK'] == '1' and len(calls) == 2\n"
        "    return (value * float('nan') if spoil else value), sums\n"
        "distillation.distillation_loss = spoilt\n"
        "from logitlake_student.cli import main\n"
        f"sys.argv = ['logitlake-student', 'train', {str(config)!r}]\n"
        "main()\n"
    )
    run_two_ranks(str(program))
    lines = metrics_of(student_world.output / "d2d")
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 1, 1, 1]
    assert all(line["forward_kl"] > 0 for line in lines[2:])


# ---- C11, C13 ----


def test_a_step_that_does_not_fit_says_what_to_change(student_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """C11: code 5, and what to lower; any other error of torch stays what it is."""
    assert MemoryExhaustedError.exit_code == 5

    def too_large(*_arguments: Any, **_keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(objective_module, "distillation_loss", too_large)
    with pytest.raises(
        MemoryExhaustedError, match=r"Lower `micro_batch_size`, then `chunk_rows`, set `gradient_checkp"
    ):
        student_world.train(student_world.train_config(D2D))


def test_a_second_trainer_in_one_folder_is_refused(student_world: Any, student_command: Callable[..., Any]) -> None:
    """C13: who holds it is named; once that process has ended, however it ended, the folder is free."""
    config = student_world.file(D2D)
    with output_lock(student_world.output):
        result = student_command("train", config)
    assert result.code == 2
    assert f"another trainer works in this folder: process {os.getpid()} on " in result.err
    assert not (student_world.output / "d2d").exists()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from logitlake_student.output_lock import output_lock\n"
            "with output_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)",
            str(student_world.output),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert student_command("train", config).code == 2
    holder.kill()
    holder.wait(TIMEOUT_S)
    holder.stdout.close()
    assert student_command("train", config).code == 0


def test_nobody_comes_between_two_stages(student_world: Any) -> None:
    """The output is held from the first stage to the end of the last, and by nobody after it."""
    config = student_world.train_config(D2D | {"steps": 1}, {"type": "d2s", "steps": 1})
    stages = train_run(config)
    next(stages)
    with pytest.raises(ConfigError, match="another trainer works in this folder"):
        student_world.train(config)
    assert [figures is not None for _, figures in stages] == [True]
    assert [figures for _, figures in train_run(config)] == [None, None]


# ---- C12 ----


@pytest.mark.slow
def test_a_rank_that_stops_ends_the_others(student_world: Any, metrics_of: Metrics) -> None:
    """A stopped process says nothing for `rank_timeout_s`: the other ends, torchrun ends both, and one process goes on
    from the checkpoint that was there, with the losses of a run that nothing happened to (C4: two ranks, then one)."""
    stage = D2D | {"steps": 100, "save_every": 2}
    config = student_world.file(stage, rank_timeout_s=RANK_TIMEOUT_S)
    with two_ranks(*student_world.command(config)) as ranks:
        ranks.read_until("20/100")
        ranks.signal_rank(1, signal.SIGSTOP)
        stopped = time.monotonic()
        code, _ = ranks.end()
        assert code != 0
        assert time.monotonic() - stopped < RANK_TIMEOUT_S + LAUNCHER_GRACE_S
    folder = student_world.train(student_world.train_config(stage))
    assert json.loads((folder / "done.json").read_text())["figures"]["resumed_at_step"] > 0
    whole = student_world.train(student_world.train_config(stage, output=str(student_world.folder / "whole")))
    for line, expected in zip(metrics_of(folder), metrics_of(whole), strict=True):
        assert line["step"] == expected["step"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=SUM_TOLERANCE)
