"""What a run tells of its steps: as many as there were, and the tokens of their samples."""

from typing import Any

import pytest

from logitlake_shared.jobs.measured import Measured
from logitlake_shared.jobs.progress import VARIABLE, parse_lines, say
from logitlake_student.step_meter import StepMeter


def measured(world: Any, name: str, capsys: pytest.CaptureFixture[str], **stage: Any) -> Measured:
    """What a run of this stage told last."""
    world.train(world.train_config(stage, output=str(world.folder / name)))
    say()  # what waits
    said, _ = parse_lines(capsys.readouterr().err.encode())
    told: Measured = [line["measured"] for line in said if "measured" in line][-1]
    return told


@pytest.mark.parametrize("kind", ["d2d", "preference"])
def test_tokens_are_those_of_the_samples_however_a_step_is_cut(
    student_world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One micro-batch a step, or one a sample: padding is no token."""
    monkeypatch.setenv(VARIABLE, "1")
    whole = measured(student_world, "whole", capsys, type=kind, steps=3)
    cut = measured(student_world, "cut", capsys, type=kind, steps=3, micro_batch_size=1)
    assert whole["train_tokens"] == cut["train_tokens"] > [0]
    for told in (whole, cut):
        seconds, *counts = told["train_step_seconds"]
        assert sum(counts) == 3
        assert 0 < told["data_wait_seconds"][0] < seconds


def test_an_even_layer_has_a_ratio_of_one_and_the_worst_layer_counts() -> None:
    """Everything on one of four experts is four times its share."""
    meter = StepMeter()
    meter.routed([[0.25, 0.25, 0.25, 0.25]])
    assert meter.told() == {"expert_load_max_ratio": [1]}
    meter.routed([[0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
    assert meter.told() == {"expert_load_max_ratio": [4]}
