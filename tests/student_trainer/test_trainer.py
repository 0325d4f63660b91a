"""One stage of training: what a step is made of, and that how it is cut up does not matter."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from logitlake_shared.errors import ConfigError, TrainingError
from logitlake_shared.reader import PairDataset
from logitlake_shared.rendering import Renderer
from logitlake_student.losses.reference import sequence_logprobs_reference
from logitlake_student.models.load import load_student

Metrics = Callable[[Path], list[dict[str, Any]]]

# The same sums in float32 in another order: a hundred times the rounding of losses and norms around 1.
SUM_TOLERANCE = 1e-5
# Sums of 20 logprobs of a float32 forward pass, against float64 on the head's side.
LOGPROB_TOLERANCE = 1e-4
# AdamW turns the rounding of a gradient near 0 into part of a step; on average the weights agree to rounding.
MEAN_WEIGHT_TOLERANCE = 1e-7

D2D = {"type": "d2d"}
D2S = {"type": "d2s"}
PREFERENCE = {"type": "preference", "batch_size": 6, "steps": 2}


def mean_difference(one: Path, other: Path) -> float:
    """Mean absolute difference of all weights of two finished stages."""
    a, b = load_file(one / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    assert a.keys() == b.keys()
    return float(torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).mean())


@pytest.mark.parametrize(
    ("stage", "micro_batch_size"),
    [(D2D | {"batch_size": 12, "ce_weight": 0.5}, 3), (PREFERENCE | {"anchor_weight": 0.5}, 2)],
    ids=["d2d", "preference"],
)
def test_micro_batches_do_not_change_a_step(
    student_world: Any, metrics_of: Metrics, stage: dict[str, Any], micro_batch_size: int
) -> None:
    """One forward pass over the batch, or several over parts with different numbers of tokens: the same losses,
    gradient norms and weights. (A mean of the parts' means would differ in the second digit.)"""
    whole = student_world.train(student_world.train_config(stage, output=str(student_world.folder / "whole")))
    parts = student_world.train(
        student_world.train_config(
            stage | {"micro_batch_size": micro_batch_size}, output=str(student_world.folder / "parts")
        )
    )
    one, other = metrics_of(whole), metrics_of(parts)
    assert len(one) == len(other) > 1
    for a, b in zip(one, other, strict=True):
        assert b == pytest.approx(a, abs=SUM_TOLERANCE)
    assert mean_difference(whole, parts) <= MEAN_WEIGHT_TOLERANCE


def test_a_logged_line_is_the_mean_of_its_steps(student_world: Any, metrics_of: Metrics) -> None:
    """Every second step logged: the mean of what is logged when every step is."""
    each = student_world.train(student_world.train_config(D2D, output=str(student_world.folder / "each")))
    pairs = student_world.train(
        student_world.train_config(D2D | {"log_every": 2}, output=str(student_world.folder / "pairs"))
    )
    steps, lines = metrics_of(each), metrics_of(pairs)
    assert [record["step"] for record in lines] == [2, 4]
    for line, (first, second) in zip(lines, [steps[:2], steps[2:]], strict=True):
        for name in ("loss", "forward_kl", "ce"):
            assert line[name] == pytest.approx((first[name] + second[name]) / 2, abs=SUM_TOLERANCE)


def test_the_loss_is_the_weighted_sum_of_its_parts(student_world: Any, metrics_of: Metrics) -> None:
    """KL, cross-entropy and balance under their weights, and the experts' loads beside them."""
    weights = {"divergence_weight": 0.7, "ce_weight": 0.3, "balance_weight": 0.05}
    folder = student_world.train(student_world.train_config(D2S | weights))
    for record in metrics_of(folder):
        expected = 0.7 * record["forward_kl"] + 0.3 * record["ce"] + 0.05 * record["balance"]
        assert record["loss"] == pytest.approx(expected, abs=SUM_TOLERANCE)
        assert record["balance"] >= 2 - SUM_TOLERANCE  # num_experts_per_tok where the load is even
        assert len(record["experts"]) == 1  # every other one of two layers
        for layer in record["experts"]:
            assert len(layer["load"]) == 4
            assert sum(layer["load"]) == pytest.approx(1, abs=SUM_TOLERANCE)
            assert 0 < layer["entropy"] <= math.log(4) + SUM_TOLERANCE


def test_upcycling_does_not_change_the_loss(student_world: Any, metrics_of: Metrics) -> None:
    """The first batch of the dense stage and of the sparse one, from the same checkpoint, cost the same KL."""
    dense = student_world.train(student_world.train_config(D2D | {"steps": 2}))
    sparse = student_world.train(student_world.train_config(D2S | {"steps": 2}))
    assert metrics_of(sparse)[0]["forward_kl"] == pytest.approx(metrics_of(dense)[0]["forward_kl"], abs=SUM_TOLERANCE)


def test_a_sparse_checkpoint_can_be_trained_as_if_dense(student_world: Any, metrics_of: Metrics) -> None:
    """A stage that has no balance loss does not ask for one."""
    sparse = student_world.train(student_world.train_config(D2S | {"steps": 2}))
    again = student_world.train(
        student_world.train_config(
            D2D | {"steps": 2},
            student={"checkpoint": str(sparse / "model")},
            output=str(student_world.folder / "again"),
        )
    )
    assert "balance" not in metrics_of(again)[0]


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ({"type": "init"}, {"multi_modal_projector"}),
        (D2D, {"multi_modal_projector", "language_model"}),
    ],
    ids=["init", "d2d"],
)
def test_a_stage_changes_what_it_trains(student_world: Any, stage: dict[str, Any], trained: set[str]) -> None:
    """And nothing else: the other tensors are bit for bit those that it began with."""
    folder = student_world.train(student_world.train_config(stage))
    before = load_student(student_world.checkpoint, dtype=torch.float32).state_dict()
    after = load_student(folder / "model", dtype=torch.float32).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part for name in changed for part in name.split(".")} & {
        "multi_modal_projector",
        "language_model",
        "vision_tower",
    } == trained


# ---- preference ----


def initial_logprobs(world: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The untrained student's logprobs of all chosen and all rejected responses, one forward pass a response."""
    from logitlake_student.data import PairCollator, StudentInputs
    from logitlake_student.model_inputs import ModelInputs

    renderer = Renderer(world.checkpoint)
    model = load_student(world.checkpoint, dtype=torch.float32).eval()
    inputs = StudentInputs(ModelInputs.of_checkpoint(world.checkpoint, model.config), pad_id=renderer.pad_id)
    dataset = PairDataset(world.lake, "preference")
    logprobs: list[torch.Tensor] = []
    for position in range(len(dataset)):
        batch = PairCollator(inputs)([dataset[position]])
        with torch.no_grad():
            hidden_BSH = model.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                pixel_values=batch["pixel_values"],
            ).last_hidden_state
            logprobs.append(
                sequence_logprobs_reference(
                    hidden_BSH.flatten(0, 1)[batch["rows_R"]],
                    model.lm_head.weight[: renderer.vocab_size],
                    batch["label_ids_R"],
                    batch["sequence_R"],
                    2,
                )
            )
    chosen_P, rejected_P = torch.stack(logprobs).unbind(dim=1)
    return chosen_P, rejected_P


@pytest.mark.parametrize("reference", ["teacher", "initial_student", "none"])
def test_rewards_are_measured_against_the_reference(student_world: Any, metrics_of: Metrics, reference: str) -> None:
    """On the untrained student (the first step of a warm-up has learning rate 0): beta times its logprobs less the
    cached teacher's, its own, or nothing's."""
    beta = 0.2
    folder = student_world.train(
        student_world.train_config(PREFERENCE | {"reference": reference, "beta": beta, "nll_weight": 0.0})
    )
    first = metrics_of(folder)[0]
    chosen_P, rejected_P = initial_logprobs(student_world)
    dataset = PairDataset(student_world.lake, "preference")
    pairs = [dataset[position] for position in range(len(dataset))]
    of_teacher = (
        torch.tensor([float(pair.chosen_logprobs.sum()) for pair in pairs]),
        torch.tensor([float(pair.rejected_logprobs.sum()) for pair in pairs]),
    )
    of_reference = {"teacher": of_teacher, "initial_student": (chosen_P, rejected_P), "none": (0, 0)}[reference]
    chosen, rejected = beta * (chosen_P - of_reference[0]), beta * (rejected_P - of_reference[1])
    assert first["chosen_reward"] == pytest.approx(float(chosen.mean()), abs=LOGPROB_TOLERANCE)
    assert first["rejected_reward"] == pytest.approx(float(rejected.mean()), abs=LOGPROB_TOLERANCE)
    assert first["margin"] == pytest.approx(float((chosen - rejected).mean()), abs=LOGPROB_TOLERANCE)


def test_a_student_is_its_own_reference_at_the_start(student_world: Any, metrics_of: Metrics) -> None:
    """Reference `initial_student`: no margin at step 1 and the loss of a coin, log 2; then the margin grows."""
    stage = PREFERENCE | {"reference": "initial_student", "nll_weight": 0.0, "steps": 6}
    lines = metrics_of(student_world.train(student_world.train_config(stage)))
    assert lines[0]["margin"] == pytest.approx(0, abs=SUM_TOLERANCE)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=SUM_TOLERANCE)
    assert lines[-1]["margin"] > lines[1]["margin"] >= 0 - SUM_TOLERANCE


@pytest.mark.parametrize("loss", ["kto_pair", "ipo", "hinge"])
def test_every_preference_loss_widens_the_margin(student_world: Any, metrics_of: Metrics, loss: str) -> None:
    """Each of them, alone and against the initial student."""
    stage = PREFERENCE | {"reference": "initial_student", "nll_weight": 0.0, "loss": loss, "steps": 6}
    lines = metrics_of(student_world.train(student_world.train_config(stage)))
    assert lines[-1]["margin"] > lines[0]["margin"] + 10 * SUM_TOLERANCE


# ---- what stops it ----


def test_a_loss_that_is_not_finite_stops_the_stage(student_world: Any) -> None:
    """With stage, step and what to do, and no model at the end."""
    config = student_world.train_config(D2D | {"learning_rate": 1e30, "steps": 8})
    with pytest.raises(TrainingError, match=r"stage d2d, step \d: the loss is (nan|inf).* Lower the learning rate"):
        student_world.train(config)
    assert not (student_world.output / "d2d" / "model").exists()
    assert not (student_world.output / "d2d" / "done.json").exists()


def test_ranks_that_do_not_make_up_the_batch_are_refused(student_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks cannot share four samples, nor two ranks take four at a time; nothing is written before the no."""
    for world_size, stage in (("3", D2D), ("2", D2D | {"micro_batch_size": 4})):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        with pytest.raises(ConfigError, match=rf"{world_size} ranks .* do not make up a batch of 4"):
            student_world.train(student_world.train_config(stage))
        assert not student_world.output.exists()


def test_several_devices_of_one_process_are_refused() -> None:
    """Trainer would spread one batch over all of them, and multiply it; one device is fine."""
    from logitlake_student.run import _refuse_several_devices

    _refuse_several_devices(1)
    with pytest.raises(TrainingError, match=r"one device, got 8 visible CUDA devices; .*torchrun --nproc-per-node=8"):
        _refuse_several_devices(8)
