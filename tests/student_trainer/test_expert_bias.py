"""Balance by a bias on the choice of experts instead of a loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from logitlake_student import trainer as trainer_module
from logitlake_student.losses.balance import ExpertCounts
from logitlake_student.models.routing import RouterRecorder, bias_experts
from logitlake_student.models.upcycle import upcycle
from logitlake_student.objectives import ExpertBias

Metrics = Callable[[Path], list[dict[str, Any]]]

# One division of float32.
RTOL = 1e-6
D2S = {"type": "d2s", "balance_weight": 0.0, "steps": 10, "save_every": 5, "layers": "all"}


def test_by_hand() -> None:
    """Loads 6, 2, 4, 0 around a mean of 3: the busy lose the rate, the idle gain it; an even one stays.

    Over ten steps the bias counts whole up to step 7, then 1/2 (one of two steps left) and nothing from step 9 on.
    """
    bias = ExpertBias(0.1, 10, 2, 4, torch.device("cpu"))
    counts = ExpertCounts(torch.tensor([[6.0, 2.0, 4.0, 0.0], [3.0, 3.0, 3.0, 3.0]]), torch.tensor(6))
    bias.update(counts)
    expected_LE = torch.tensor([[-0.1, 0.1, -0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(bias.total_LE, expected_LE, rtol=RTOL, atol=0)
    for step, share in ((1, 1.0), (7, 1.0), (8, 0.5), (9, 0.0), (10, 0.0)):
        torch.testing.assert_close(bias.at(step), share * expected_LE, rtol=RTOL, atol=0)


@torch.no_grad()
def test_the_bias_chooses_and_does_not_weigh(tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]) -> None:
    """With a bias that only leaves experts 1 and 3, every token goes there, with the weights of its own router."""
    sparse = upcycle(tiny_llava(), 4, 2, "all", router_seed=3)
    bias_experts(sparse, torch.tensor([[0.0, 9.0, 0.0, 9.0]] * 4))
    weights: list[Tensor] = []
    gate = sparse.model.language_model.layers[2].mlp.gate
    hook = gate.register_forward_hook(lambda _module, _inputs, output: weights.append(output[1]))
    with RouterRecorder(sparse) as recorder:
        sparse(**llava_batch)
    hook.remove()
    for ids_Nk in recorder.chosen():
        assert set(ids_Nk.flatten().tolist()) == {1, 3}
    probs_NE = torch.softmax(recorder.logits()[2], dim=-1)
    own_Nk = probs_NE.gather(1, recorder.chosen()[2])
    torch.testing.assert_close(weights[0], own_Nk / own_Nk.sum(dim=-1, keepdim=True), rtol=RTOL, atol=0)
    bias_experts(sparse, None)
    with RouterRecorder(sparse) as recorder:
        sparse(**llava_batch)
    assert len(set(recorder.chosen()[0].flatten().tolist())) > 2


def test_it_evens_the_load_and_leaves_a_stock_model(student_world: Any, metrics_of: Metrics) -> None:
    """A large rate and no balance loss: the load before the bias fades is more even than without it; what is saved is
    an ordinary checkpoint."""
    stage = D2S | {"steps": 40, "log_every": 20, "save_every": 20, "learning_rate": 1e-5, "batch_size": 13}
    other = student_world.train(student_world.train_config(stage, output=str(student_world.folder / "a")))
    folder = student_world.train(
        student_world.train_config(stage | {"bias_rate": 0.005}, output=str(student_world.folder / "b"))
    )
    assert all(
        biased["max_violation"] < unbiased["max_violation"] / 2
        for biased, unbiased in zip(metrics_of(folder)[0]["experts"], metrics_of(other)[0]["experts"], strict=True)
    )
    assert {path.name for path in (folder / "model").iterdir()} == {path.name for path in (other / "model").iterdir()}
    names = [load_file(stage / "model" / "model.safetensors").keys() for stage in (folder, other)]
    assert names[0] == names[1]


def test_a_resumed_stage_goes_on_with_its_bias(
    student_world: Any, monkeypatch: pytest.MonkeyPatch, metrics_of: Metrics
) -> None:
    """Stopped after a checkpoint: the same lines and the same bytes as without the stop."""
    stage = D2S | {"bias_rate": 0.01}
    whole = student_world.train(student_world.train_config(stage, output=str(student_world.folder / "whole")))
    config = student_world.train_config(stage)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "prune_checkpoints", _stop)
        with pytest.raises(StoppedError):
            student_world.train(config)
    resumed = student_world.train(config)
    assert json.loads((resumed / "done.json").read_text())["figures"]["resumed_at_step"] == 5
    assert metrics_of(resumed) == metrics_of(whole)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


class StoppedError(Exception):
    """Where a run ends."""


def _stop(*_: object) -> None:
    raise StoppedError
