"""The balance loss: transformers' figures on one layer, known values at the extremes, blindness to padding.

Axes: N positions, E experts.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

from logitlake_shared.errors import DataError
from logitlake_student.losses.balance import (
    LayerRouting,
    count_experts,
    load_balancing_loss,
    router_entropies,
    router_z_loss,
    routing_statistics,
)

N, E, TOP_K = 12, 4, 2

# Means of a dozen float32 probabilities.
RTOL = 1e-6

ALL_N = torch.ones(N, dtype=torch.bool)


def random_logits(seed: int) -> Tensor:
    return torch.randn(N, E, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def statistics_of(router_logits: list[Tensor], mask_N: Tensor) -> list[LayerRouting]:
    counts = count_experts(router_logits, mask_N, TOP_K)
    return routing_statistics(counts, router_entropies(router_logits, mask_N), TOP_K)


def test_shares_of_a_batch_add_up_to_its_loss() -> None:
    """Cut anywhere, with the counts of all of it: balance and z-loss of the parts sum to those of the whole, in value
    and gradient. With the counts of each part alone they would not."""
    layers = [random_logits(0), random_logits(1)]
    mask_N = torch.arange(N) % 5 != 0
    counts = count_experts(layers, mask_N, TOP_K)
    parts = [slice(0, 3), slice(3, 10), slice(10, N)]

    def terms(rows: slice, *, whole: bool) -> Tensor:
        own = [layer[rows] for layer in layers]
        balance = load_balancing_loss(own, mask_N[rows], TOP_K, counts if whole else None)
        return balance + 0.1 * router_z_loss(own, mask_N[rows], counts.num_tokens if whole else None)

    together = torch.stack([terms(rows, whole=True) for rows in parts]).sum()
    alone = terms(slice(0, N), whole=False)
    torch.testing.assert_close(together, alone, rtol=RTOL, atol=0)
    for a, b in zip(torch.autograd.grad(together, layers), torch.autograd.grad(alone, layers), strict=True):
        torch.testing.assert_close(a, b, rtol=RTOL, atol=RTOL)
    assert not torch.isclose(torch.stack([terms(rows, whole=False) for rows in parts]).mean(), alone, rtol=1e-3)


def test_counts_add_up() -> None:
    """The counts of two halves are those of the whole."""
    layers = [random_logits(5).detach()]
    halves = count_experts([layers[0][:5]], ALL_N[:5], TOP_K) + count_experts([layers[0][5:]], ALL_N[5:], TOP_K)
    whole = count_experts(layers, ALL_N, TOP_K)
    assert torch.equal(halves.assigned_LE, whole.assigned_LE)
    assert int(halves.num_tokens) == int(whole.num_tokens) == N


@pytest.mark.parametrize(
    "modelling",
    [modeling_mixtral, modeling_qwen2_moe, modeling_qwen3_moe, modeling_qwen3_vl_moe],
    ids=lambda m: m.__name__,
)
def test_equals_transformers_on_each_layer_with_padding(modelling: Any) -> None:
    """Mean over layers of transformers' one-layer loss, in value and gradient, under a padding mask."""
    layers = [random_logits(0), random_logits(1), random_logits(2)]
    mask_N = torch.arange(N) < 9
    ours = load_balancing_loss(layers, mask_N, TOP_K)
    theirs = torch.stack(
        [modelling.load_balancing_loss_func((layer,), E, TOP_K, mask_N.view(2, N // 2)) for layer in layers]
    ).mean()
    torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=0)
    for a, b in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        torch.testing.assert_close(a, b, rtol=RTOL, atol=RTOL)


def test_even_routing_scores_the_number_of_chosen_experts_and_collapse_more() -> None:
    """Each expert first and second choice equally often: E * E * (k/E) * (1/E) = k. All on two: about E."""
    favourites_N = torch.arange(N) % E
    even = 0.01 * (
        torch.nn.functional.one_hot(favourites_N, E) * 2 + torch.nn.functional.one_hot((favourites_N + 1) % E, E)
    )
    collapsed = torch.tensor([20.0, 20.0, 0.0, 0.0]).repeat(N, 1)
    assert float(load_balancing_loss([even], ALL_N, TOP_K)) == pytest.approx(TOP_K, rel=RTOL)
    assert float(load_balancing_loss([collapsed], ALL_N, TOP_K)) == pytest.approx(E, rel=1e-4)


def test_one_layer_does_not_hide_another() -> None:
    """Two layers that collapse on different experts are as bad as two on the same; pooled, they look balanced."""
    first = torch.tensor([20.0, 20.0, 0.0, 0.0]).repeat(N, 1)
    second = torch.tensor([0.0, 0.0, 20.0, 20.0]).repeat(N, 1)
    ours = float(load_balancing_loss([first, second], ALL_N, TOP_K))
    assert ours == pytest.approx(float(load_balancing_loss([first, first], ALL_N, TOP_K)), rel=RTOL)
    assert float(load_balancing_loss_func((first, second), E, TOP_K)) < ours


def test_transformers_compares_the_means_of_all_layers() -> None:
    """The relation between the two: with f and P of layer l, ours is mean_l(E sum_e f_le P_le), theirs
    E sum_e mean_l(f_le) mean_l(P_le)."""
    layers = [random_logits(0).detach(), random_logits(1).detach()]
    f_LE = count_experts(layers, ALL_N, TOP_K).assigned_LE / N
    probs_LE = torch.stack([torch.softmax(layer, dim=-1).mean(dim=0) for layer in layers])
    ours, theirs = load_balancing_loss(layers, ALL_N, TOP_K), load_balancing_loss_func(tuple(layers), E, TOP_K)
    torch.testing.assert_close(ours, (E * (f_LE * probs_LE).sum(dim=1)).mean(), rtol=RTOL, atol=0)
    torch.testing.assert_close(theirs, E * (f_LE.mean(dim=0) * probs_LE.mean(dim=0)).sum(), rtol=RTOL, atol=0)
    assert not torch.isclose(ours, theirs, rtol=RTOL)


def test_padding_changes_nothing() -> None:
    """Whatever a router says about padding, neither loss, z-loss nor figures move."""
    logits = random_logits(3).detach()
    mask_N = torch.arange(N) < 8
    other = torch.where(mask_N[:, None], logits, 100 * torch.randn(N, E, generator=torch.Generator().manual_seed(9)))
    for router in (logits[:8], other):
        mask = mask_N[: len(router)]
        assert torch.equal(load_balancing_loss([router], mask, TOP_K), load_balancing_loss([logits], mask_N, TOP_K))
        assert torch.equal(router_z_loss([router], mask), router_z_loss([logits], mask_N))
        a, b = (statistics_of([r], m)[0] for r, m in ((router, mask), (logits, mask_N)))
        assert torch.equal(a.load_E, b.load_E)
        assert (a.entropy, a.num_dead) == (b.entropy, b.num_dead)


def test_experts_permuted_score_the_same() -> None:
    logits = random_logits(4).detach()
    permuted = logits[:, torch.tensor([2, 0, 3, 1])]
    torch.testing.assert_close(
        load_balancing_loss([logits], ALL_N, TOP_K),
        load_balancing_loss([permuted], ALL_N, TOP_K),
        rtol=RTOL,
        atol=0,
    )


def test_z_loss_by_hand() -> None:
    """Four logits of ln 2 have logsumexp ln 8; layers and tokens are averaged."""
    layer = torch.full((N, E), math.log(2.0))
    expected = (math.log(8) ** 2 + math.log(4) ** 2) / 2
    assert float(router_z_loss([layer, torch.zeros(N, E)], ALL_N)) == pytest.approx(expected, rel=1e-5)


def test_routing_statistics_by_hand() -> None:
    """Tokens 0-5 go to experts 0 and 1, tokens 6-11 to 0 and 2: loads 1/2, 1/4, 1/4, 0; expert 3 is dead."""
    logits = torch.zeros(N, E)
    logits[:, 0] = 60.0
    logits[:6, 1] = 60.0
    logits[6:, 2] = 60.0
    (layer,) = statistics_of([logits.requires_grad_()], ALL_N)
    assert layer.load_E.tolist() == [0.5, 0.25, 0.25, 0.0]
    assert not layer.load_E.requires_grad
    assert layer.num_dead == 1
    assert layer.max_violation == pytest.approx(1.0)  # half of everything where a quarter is even
    assert layer.entropy == pytest.approx(math.log(2), rel=1e-5)  # two experts, even odds


def test_contradictory_input_is_refused() -> None:
    with pytest.raises(DataError, match="at least one sparse layer"):
        load_balancing_loss([], ALL_N, TOP_K)
    with pytest.raises(DataError, match="sparse layer 1"):
        load_balancing_loss([random_logits(0), random_logits(0)[1:]], ALL_N, TOP_K)
    with pytest.raises(DataError, match="at least one real token"):
        router_z_loss([random_logits(0)], ~ALL_N)
    with pytest.raises(DataError, match="bool mask"):
        router_z_loss([random_logits(0)], ALL_N.long())
