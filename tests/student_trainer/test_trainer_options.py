"""Options that change how a stage is computed or watched, and what they may change of its result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from logitlake_student import trainer as trainer_module
from logitlake_student.models.load import load_student

Metrics = Callable[[Path], list[dict[str, Any]]]

D2D = {"type": "d2d", "steps": 6, "learning_rate": 3e-3}
D2S = {"type": "d2s", "steps": 4}
# Activations made twice are the same float32 products.
SAME = 1e-6
# bfloat16 has 8 bits: a loss of order 1 through two layers moves in the second or third digit.
BF16_TOLERANCE = 0.05


def trained(world: Any, name: str, stage: dict[str, Any], **sections: Any) -> Path:
    folder: Path = world.train(world.train_config(stage, output=str(world.folder / name), **sections))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = load_student(folder / "model", dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", [D2D, D2S, D2S | {"capacity_factor": 0.5}], ids=["d2d", "d2s", "capacity"])
def test_gradient_checkpointing_changes_no_step(student_world: Any, metrics_of: Metrics, stage: dict[str, Any]) -> None:
    """Losses, balance, dropped choices and gradient norms are those of kept activations."""
    kept = metrics_of(trained(student_world, "kept", stage))
    again = metrics_of(trained(student_world, "again", stage, gradient_checkpointing=True))
    for one, other in zip(kept, again, strict=True):
        assert other.pop("experts", None) == one.pop("experts", None)
        assert other == pytest.approx(one, abs=SAME)


def test_bfloat16_products_keep_float32_weights(student_world: Any, metrics_of: Metrics) -> None:
    """Near the float32 run, not equal to it, in a model that is stored in float32."""
    exact, rounded = (trained(student_world, precision, D2D, precision=precision) for precision in ("fp32", "bf16"))
    for one, other in zip(metrics_of(exact), metrics_of(rounded), strict=True):
        assert other["forward_kl"] == pytest.approx(one["forward_kl"], rel=BF16_TOLERANCE)
        assert other["forward_kl"] != one["forward_kl"]
    stored = load_file(rounded / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert not torch.equal(*(weights(f)["model.language_model.norm.weight"] for f in (exact, rounded)))


def test_an_average_is_what_its_formula_says_and_resumes(student_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """average = decay average + (1 - decay) weight, from the weights after every step of a run without it; a run that
    stops in the middle ends with the same average."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(trainer_module._Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            student = kwargs["model"].student
            seen.append({name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad})
            super().on_step_end(args, state, control, **kwargs)

        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            student = kwargs["model"].student
            seen.append({name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad})

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "_Progress", Watched)
        trained(student_world, "plain", D2D)
    decay = 0.7
    average = seen[0]
    for after in seen[1:]:
        average = {name: decay * average[name] + (1 - decay) * after[name] for name in average}
    stage = D2D | {"ema_decay": decay}
    ended = weights(trained(student_world, "averaged", stage))
    for name, tensor in average.items():
        torch.testing.assert_close(ended[name], tensor, rtol=0, atol=SAME)
    config = student_world.train_config(stage, output=str(student_world.folder / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "prune_checkpoints", _stop)
        with pytest.raises(StoppedError):
            student_world.train(config)
    resumed = weights(student_world.train(config))
    assert all(torch.equal(resumed[name], ended[name]) for name in ended)


class StoppedError(Exception):
    """Where a run ends."""


def _stop(*_: object) -> None:
    raise StoppedError


def test_a_tracker_gets_what_the_metrics_hold(student_world: Any, metrics_of: Metrics) -> None:
    """TensorBoard's file has the same figures at the same steps, experts by layer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = trained(student_world, "watched", D2S, report_to=["tensorboard"])
    (events,) = folder.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    for line in metrics_of(folder):
        for tag, value in (
            ("forward_kl", line["forward_kl"]),
            ("experts/0/max_violation", line["experts"][0]["max_violation"]),
            ("experts/0/load/3", line["experts"][0]["load"][3]),
        ):
            scalars = {event.step: event.value for event in read.Scalars(f"train/{tag}")}
            assert scalars[line["step"]] == pytest.approx(value, rel=1e-5)


def test_a_tracker_that_is_not_installed_is_said_before_work(
    student_world: Any, student_command: Callable[..., Any]
) -> None:
    """Its name and the package to install; no folder of the stage is made."""
    result = student_command("train", student_world.file(D2D, report_to=["trackio"]))
    assert result.code == 2
    assert "trackio" in result.err
    assert not (student_world.output / "d2d").exists()
