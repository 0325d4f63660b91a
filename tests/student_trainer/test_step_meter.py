"""What a run tells of its steps: as many as there were, and the tokens of their samples."""

import json
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


def test_dropped_tokens_are_those_of_all_steps_whichever_are_logged(
    student_world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share that the metrics of a step have, of the choices of its tokens; nothing without a capacity."""
    monkeypatch.setenv(VARIABLE, "1")
    options = {"type": "d2s", "capacity_factor": 0.5, "num_experts_per_tok": 2}
    one = measured(student_world, "one", capsys, steps=1, **options)
    (line,) = (student_world.folder / "one/d2s/metrics.jsonl").read_text().splitlines()
    shares = [layer["dropped"] for layer in json.loads(line)["experts"]]
    assert one["tokens_dropped"] == [pytest.approx(sum(shares) * 2 * one["train_tokens"][0])]
    often, seldom = (
        measured(student_world, f"every-{every}", capsys, steps=4, log_every=every, **options) for every in (1, 2)
    )
    assert often["tokens_dropped"] == seldom["tokens_dropped"] > one["tokens_dropped"]
    dropless = measured(student_world, "dropless", capsys, type="d2s", steps=1)
    assert "tokens_dropped" not in dropless


def test_an_even_layer_has_a_ratio_of_one() -> None:
    """Everything on one of four experts is four times its share."""
    meter = StepMeter()
    meter.routed([[0.25, 0.25, 0.25, 0.25]])
    assert meter.told() == {"expert_load_max_ratio/0": [1]}
    meter.routed([[0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
    assert meter.told() == {"expert_load_max_ratio/0": [1], "expert_load_max_ratio/1": [4]}
