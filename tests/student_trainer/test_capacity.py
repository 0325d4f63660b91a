"""Experts with a capacity, as DeepSpeed's top-2 gate fills them: worked by hand, against a slow twin, in training only.

Axes: N positions, E experts, k experts a token.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logitlake_student.models.capacity import Capacity, fitting_choices, weights_within_capacity
from logitlake_student.models.parts import routers
from logitlake_student.models.routing import RouterRecorder, limit_experts
from logitlake_student.models.upcycle import upcycle
from logitlake_student.objectives import RoutingObjective

# One division of float32.
RTOL = 1e-6


def test_top_two_by_hand() -> None:
    """Six tokens, four experts, factor 0.5: C = ceil(0.5 * 2 * 6 / 4) = 2 places an expert.

    token  first  second   queue of each expert (first choices, then second choices)
    0      0      1        expert 0: t0 t1 t2 | t3, t5     -> t0 t1 stay; t2's first and t3's, t5's second are dropped
    1      0      1        expert 1: t3 | t0 t1 t2         -> t3 t0 stay; t1's and t2's second are dropped
    2      0      1        expert 2: t4 |                  -> stays
    3      1      0        expert 3: t5 | t4               -> both stay
    4      2      3
    5      3      0
    Token 2 has lost both choices: weights 0, 0. Token 0 keeps .6 and .2: .75, .25. Token 1 keeps .5 alone: 1, 0.
    """
    probs_NE = torch.tensor(
        [
            [0.60, 0.20, 0.10, 0.10],
            [0.50, 0.30, 0.10, 0.10],
            [0.40, 0.30, 0.20, 0.10],
            [0.30, 0.40, 0.20, 0.10],
            [0.10, 0.20, 0.40, 0.30],
            [0.30, 0.20, 0.10, 0.40],
        ]
    )
    capacity = Capacity(0.5, torch.ones(6, dtype=torch.bool))
    weights_Nk, ids_Nk = choose_within_capacity(probs_NE, 2, capacity)
    assert fitting_choices(ids_Nk, 4, capacity).int().tolist() == [[1, 1], [1, 0], [0, 0], [1, 0], [1, 1], [1, 0]]
    assert ids_Nk.tolist() == [[0, 1], [0, 1], [0, 1], [1, 0], [2, 3], [3, 0]]
    expected_Nk = torch.tensor([[0.75, 0.25], [1, 0], [0, 0], [1, 0], [4 / 7, 3 / 7], [1, 0]])
    torch.testing.assert_close(weights_Nk, expected_Nk, rtol=RTOL, atol=0)


def choose_within_capacity(probs_NE: Tensor, k: int, capacity: Capacity) -> tuple[Tensor, Tensor]:
    probs_Nk, ids_Nk = probs_NE.topk(k, dim=-1)
    return weights_within_capacity(probs_Nk, ids_Nk, probs_NE.shape[1], capacity), ids_Nk


def twin(probs_NE: Tensor, k: int, factor: float, mask_N: Tensor) -> Tensor:
    """One choice after the other, one token after the other; a place is taken even by who is turned away later."""
    num_tokens, num_experts = int(mask_N.sum()), probs_NE.shape[1]
    limit = math.ceil(factor * k * num_tokens / num_experts)
    queued = [0] * num_experts
    ranked = [sorted(range(num_experts), key=lambda e: -float(probs_E[e]))[:k] for probs_E in probs_NE]
    kept = [[0.0] * k for _ in ranked]
    for choice in range(k):
        for n, experts in enumerate(ranked):
            expert = experts[choice]
            if not bool(mask_N[n]):
                kept[n][choice] = float(probs_NE[n, expert])
                continue
            if queued[expert] < limit:
                kept[n][choice] = float(probs_NE[n, expert])
            queued[expert] += 1
    return torch.tensor([[p / sum(row) if sum(row) else 0.0 for p in row] for row in kept])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("k", "factor"), [(1, 1.0), (2, 0.5), (2, 1.5), (3, 0.7)])
def test_equals_its_twin(seed: int, k: int, factor: float) -> None:
    """Random routers that have favourites, padding anywhere."""
    generator = torch.Generator().manual_seed(seed)
    favourite_E = torch.tensor([1.0, 0.5, 0.0, 0.0, -0.5])
    probs_NE = torch.softmax(torch.randn(17, 5, generator=generator) + favourite_E, dim=-1)
    mask_N = torch.rand(17, generator=generator) < 0.8
    weights_Nk, _ = choose_within_capacity(probs_NE, k, Capacity(factor, mask_N))
    torch.testing.assert_close(weights_Nk, twin(probs_NE, k, factor, mask_N), rtol=RTOL, atol=RTOL)


def test_enough_room_is_no_limit() -> None:
    """With a factor of E / k, every expert has room for every token: weights as without capacity."""
    probs_NE = torch.softmax(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights_Nk, _ = choose_within_capacity(probs_NE, 2, Capacity(2.0, torch.ones(12, dtype=torch.bool)))
    top_Nk = probs_NE.topk(2, dim=-1).values
    torch.testing.assert_close(weights_Nk, top_Nk / top_Nk.sum(dim=-1, keepdim=True), rtol=RTOL, atol=0)


@torch.no_grad()
def test_only_training_drops(tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]) -> None:
    """In evaluation an expert takes every token; in training a full one drops, and as many as are told."""
    dense = tiny_llava()
    sparse = upcycle(dense, 4, 2, "all", router_seed=3)
    mask_N = llava_batch["attention_mask"].flatten().bool()
    objective = RoutingObjective(0.0, 0.0, 2, capacity_factor=0.5)
    limit_experts(sparse, objective.capacity(mask_N))
    whole = sparse(**llava_batch).logits
    torch.testing.assert_close(whole, dense(**llava_batch).logits, rtol=0, atol=1e-4)
    weights: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _inputs, output: weights.append(output[1]))
        for router in routers(sparse).values()
    ]
    with RouterRecorder(sparse.train()) as recorder:
        less = sparse(**llava_batch).logits
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(less, whole, atol=1e-2)
    places = math.ceil(0.5 * 2 * int(mask_N.sum()) / 4) * 4
    for weights_Nk, dropped in zip(weights, objective.told(recorder, mask_N).dropped_L, strict=True):
        assert int((weights_Nk[mask_N] == 0).sum()) == int(dropped) > 0
        assert int((weights_Nk[mask_N] > 0).sum()) <= places
    limit_experts(sparse, None)
    torch.testing.assert_close(sparse(**llava_batch).logits, whole, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_small_weight_is_no_dropped_choice(tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]) -> None:
    """C9: routers so sure that the second weight is 0 in float32 drop nothing where experts take everything."""
    sparse = upcycle(tiny_llava(), 4, 2, "all", router_seed=3).train()
    for router in routers(sparse).values():
        router.weight *= 1e4
    with RouterRecorder(sparse) as recorder:
        assert sparse(**llava_batch).logits.isfinite().all()
    told = RoutingObjective(0.01, 0.0, 2).told(recorder, llava_batch["attention_mask"].flatten().bool())
    assert told.dropped_L.tolist() == [0, 0, 0, 0]


def test_faithful_drops_and_says_so(student_world: Any, metrics_of: Callable[[Path], list[dict[str, Any]]]) -> None:
    """The preset's capacity reaches training, and metrics hold the share of choices that were dropped."""
    stage = {"type": "d2s", "capacity_factor": 0.5}
    lines = metrics_of(student_world.train(student_world.train_config(stage, preset="faithful")))
    assert all(0.3 < layer["dropped"] < 0.8 for line in lines for layer in line["experts"])
    config = student_world.train_config({"type": "d2s"}, preset="faithful", output=str(student_world.folder / "other"))
    assert config.stages[0].capacity_factor == 1.5
    dropless = student_world.train_config({"type": "d2s"}, output=str(student_world.folder / "dropless"))
    lines = metrics_of(student_world.train(dropless))
    assert all(layer["dropped"] == 0 for line in lines for layer in line["experts"])


def test_collapsed_experts_are_told(
    student_world: Any, metrics_of: Callable[[Path], list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """C9: every token to the same experts (a router that never learns, far from even): finite losses, an alert in the
    metrics of every line and once on the terminal."""
    sparse = student_world.train(student_world.train_config({"type": "d2s", "steps": 2}))
    folder = student_world.folder / "collapsed"
    _collapse(sparse / "model", folder)
    stage = {"type": "preference", "batch_size": 6, "steps": 2}
    config = student_world.train_config(
        stage, student={"checkpoint": str(folder)}, output=str(student_world.folder / "again")
    )
    capsys.readouterr()
    lines = metrics_of(student_world.train(config))
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert all("2 of 4 experts got no token" in line["alerts"][0] for line in lines)
    assert capsys.readouterr().err.count("warning: stage preference, step 1: sparse layer 0") == 1


def test_uneven_experts_are_told_from_a_threshold_on(
    student_world: Any, metrics_of: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """The violation of two of four experts is 0 for an even share and 1 at most. Each line tells the layers at or above
    `alert_violation` and no other."""
    stage = {"type": "d2s", "steps": 3, "log_every": 1, "save_every": 3, "layers": "all", "balance_weight": 0.0}
    told = {}
    for threshold in (0.01, 0.2, 1.0):
        config = student_world.train_config(
            stage | {"alert_violation": threshold}, output=str(student_world.folder / str(threshold))
        )
        lines = metrics_of(student_world.train(config))
        for line in lines:
            expected = [
                f"sparse layer {place}: one expert gets {2 * max(layer['load']):.0%} of the tokens"
                for place, layer in enumerate(line["experts"])
                if layer["max_violation"] >= threshold and not layer["dead"]
            ]
            assert [alert for alert in line.get("alerts", []) if "got no token" not in alert] == expected
        told[threshold] = sum(len(line.get("alerts", [])) for line in lines)
    assert told[0.01] > told[1.0]


def _collapse(source: Path, folder: Path) -> None:
    """A copy of a sparse student whose routers send everything to experts 0 and 1: equal rows tie, and the first two
    are taken."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if name.endswith("mlp.gate.weight"):
            weights[name] = torch.zeros_like(weight)
    save_file(weights, path, metadata={"format": "pt"})
