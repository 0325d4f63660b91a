"""Two processes that train one student: the same steps as one process takes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.student_trainer.torchrun import run_two_ranks

from logitlake_shared.jobs.progress import VARIABLE, parse_lines, say

Metrics = Callable[[Path], list[dict[str, Any]]]

# The same sums in float32 in another order, grown over twelve steps of AdamW.
SUM_TOLERANCE = 1e-4
# AdamW turns the rounding of a gradient near 0 into part of a step; on average the weights agree to rounding.
MEAN_WEIGHT_TOLERANCE = 1e-6
# Two processes import torch and train twelve steps in half a minute.
TIMEOUT_S = 240

STAGES: list[dict[str, Any]] = [
    {"type": "d2d", "ce_weight": 0.5, "micro_batch_size": 1},
    {"type": "d2s", "z_loss_weight": 1e-3, "micro_batch_size": 1},
    {"type": "preference", "loss": "kto_pair", "batch_size": 4, "micro_batch_size": 2},
]
"""With micro-batches of their own for each rank; a batch of d2d holds a sample without a picture."""
WHOLE = [stage | {"micro_batch_size": stage.get("batch_size", 4)} for stage in STAGES]


def assert_same_steps(one: Path, other: Path, metrics_of: Metrics) -> None:
    """Every line of metrics of every stage, and the weights at the end of each."""
    for stage in STAGES:
        lines, others = metrics_of(one / stage["type"]), metrics_of(other / stage["type"])
        assert len(lines) == len(others) > 1
        for line, theirs in zip(lines, others, strict=True):
            experts, their_experts = line.pop("experts", []), theirs.pop("experts", [])
            assert theirs == pytest.approx(line, abs=SUM_TOLERANCE)
            assert [layer["load"] for layer in their_experts] == [
                pytest.approx(layer["load"], abs=SUM_TOLERANCE) for layer in experts
            ]
        a = load_file(one / stage["type"] / "model" / "model.safetensors")
        b = load_file(other / stage["type"] / "model" / "model.safetensors")
        assert a.keys() == b.keys()
        apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
        assert float(apart.mean()) <= MEAN_WEIGHT_TOLERANCE


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp"])
def test_two_ranks_take_the_steps_of_one_process(student_world: Any, metrics_of: Metrics, data_parallel: str) -> None:
    """Losses, balance over the global batch, the baseline of `kto_pair`, gradient norms and weights; and they go on
    from a checkpoint that one process left, with its batches."""
    alone = student_world.folder / "alone"
    student_world.train(student_world.train_config(*WHOLE, output=str(alone)))
    # One process stops after the first checkpoint of d2d; two ranks finish that stage and do the others.
    begun = student_world.train_config(*STAGES, data_parallel=data_parallel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logitlake_student.trainer.prune_checkpoints", _stop)
        with pytest.raises(StoppedError):
            student_world.train(begun)
    assert (student_world.output / "d2d" / "checkpoint-2").is_dir()
    run_two_ranks(*student_world.command(student_world.file(*STAGES, data_parallel=data_parallel)))
    assert_same_steps(alone, student_world.output, metrics_of)


def test_dropped_tokens_are_those_of_all_ranks(
    student_world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once: as many as one process drops, which fills its experts with the same micro-batches."""
    monkeypatch.setenv(VARIABLE, "1")
    stage = {"type": "d2s", "capacity_factor": 0.5, "steps": 1, "micro_batch_size": 1}
    student_world.train(student_world.train_config(stage, output=str(student_world.folder / "one")))
    say()  # what waits
    logs = (capsys.readouterr().err, run_two_ranks(*student_world.command(student_world.file(stage))))
    one, two = ([line["measured"] for line in parse_lines(log.encode())[0] if "measured" in line][-1] for log in logs)
    for name in ("tokens_dropped", "train_tokens"):
        assert one[name] == two[name] > [0]


@pytest.mark.slow
def test_ray_workers_take_the_steps_of_one_process(student_world: Any, metrics_of: Metrics) -> None:
    """The same training under Ray Train, and what it says of itself."""
    alone = student_world.folder / "alone"
    student_world.train(student_world.train_config(*WHOLE, output=str(alone)))
    config = student_world.file(*STAGES)
    done = subprocess.run(
        [sys.executable, *student_world.command(config), "--ray-workers", "2"],
        capture_output=True,
        text=True,
        cwd=student_world.folder,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("trained already") == 3
    assert_same_steps(alone, student_world.output, metrics_of)


class StoppedError(Exception):
    """Where the first run ends."""


def _stop(*_: object) -> None:
    raise StoppedError
