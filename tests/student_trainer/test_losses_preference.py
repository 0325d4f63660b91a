"""The preference losses against sums done by hand, their Python-float twin, and each other's known limits.

Axes: P pairs, R response rows, V vocabulary, H hidden, N sequences.
"""

import math

import pytest
import torch
from torch import Tensor

from logitlake_shared.errors import DataError
from logitlake_student.losses.preference import (
    KtoBaseline,
    PreferenceKind,
    anchor_loss,
    image_loss,
    kto_baseline,
    nll_loss,
    preference_loss,
    sequence_logprobs,
)
from logitlake_student.losses.reference import preference_loss_reference, sequence_logprobs_reference

# One sigmoid or logarithm of numbers up to 100 in float32.
RTOL, ATOL = 1e-5, 1e-6
# Sums of a few float32 logprobs.
SUM_ATOL = 1e-5

KINDS: list[PreferenceKind] = ["dpo", "ipo", "hinge", "kto_pair"]


def log_ratio_pairs(chosen: list[float], rejected: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and reference logprobs whose log-ratios are the given ones."""
    reference_chosen_P = torch.arange(len(chosen)) - 30.0
    reference_rejected_P = torch.arange(len(chosen)) - 25.0
    return (
        reference_chosen_P + torch.tensor(chosen),
        reference_rejected_P + torch.tensor(rejected),
        reference_chosen_P,
        reference_rejected_P,
    )


def test_worked_example_of_each_loss() -> None:
    """r_w = 2, r_l = -1, beta = 0.5, one pair.

    dpo      -log sigmoid(0.5 * 3) = log(1 + e^-1.5) = 0.2014
    ipo      (3 - 1)^2 = 4
    hinge    max(0, 1 - 1.5) = 0
    kto_pair z_w = 2, z_l = max(0, -1) = 0: both terms are 1 - sigmoid: of 0.5 * (2 - 0) = 1 and 0.5 * (2 + 1)
    = 1.5
             (0.2689 + 0.1824) / 2 = 0.2257
    """
    expected = {"dpo": 0.2014133, "ipo": 4.0, "hinge": 0.0, "kto_pair": 0.2256838}
    for kind in KINDS:
        result = preference_loss(*log_ratio_pairs([2.0], [-1.0]), kind=kind, beta=0.5)
        assert float(result.losses_P) == pytest.approx(expected[kind], rel=RTOL, abs=ATOL)
        assert result.chosen_rewards_P.tolist() == pytest.approx([1.0])
        assert result.rejected_rewards_P.tolist() == pytest.approx([-0.5])
        assert result.margins_P.tolist() == pytest.approx([1.5])


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_scalar_twin(kind: PreferenceKind) -> None:
    """Also far from the reference, where a sigmoid saturates."""
    inputs = log_ratio_pairs([2.0, -60.0, 7.0, 0.0, -120.0], [-1.0, -60.0, 9.0, 0.0, -110.0])
    fast = preference_loss(*inputs, kind=kind, beta=0.1).losses_P
    slow = preference_loss_reference(*(t.tolist() for t in inputs), kind=kind, beta=0.1)
    assert fast.tolist() == pytest.approx(slow, rel=RTOL, abs=ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_raises_the_chosen_and_lowers_the_rejected(kind: PreferenceKind) -> None:
    """Descent on any of the losses moves the two logprobs apart, from a margin of zero."""
    policy_chosen_P, policy_rejected_P, *reference = log_ratio_pairs([0.5, -3.0], [0.5, -3.0])
    policy_chosen_P.requires_grad_()
    policy_rejected_P.requires_grad_()
    losses_P = preference_loss(policy_chosen_P, policy_rejected_P, *reference, kind=kind, beta=0.2).losses_P
    chosen_grad_P, rejected_grad_P = torch.autograd.grad(losses_P.sum(), (policy_chosen_P, policy_rejected_P))
    assert (chosen_grad_P < 0).all()
    assert (rejected_grad_P > 0).all()


def test_dpo_at_the_reference_is_log_two() -> None:
    losses_P = preference_loss(*log_ratio_pairs([0.0, 0.0], [0.0, 0.0]), kind="dpo", beta=0.1).losses_P
    assert losses_P.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(("chosen", "rejected", "dpo", "kto"), [(-5, -5, 0.050, 0.0235), (-60, -60, 0.050, 0.00025)])
def test_kto_pair_saturates_below_the_reference_and_dpo_does_not(
    chosen: float, rejected: float, dpo: float, kto: float
) -> None:
    """The gradient with respect to r_w at beta = 0.1. kto: half of 0.1 sigmoid'(0.1 r)."""
    figures_rtol = 0.03  # the figures are given to two digits
    for kind, expected in (("dpo", dpo), ("kto_pair", kto / 2)):
        policy_chosen_P, *rest = log_ratio_pairs([chosen], [rejected])
        policy_chosen_P.requires_grad_()
        losses_P = preference_loss(policy_chosen_P, *rest, kind=kind, beta=0.1).losses_P  # type: ignore[arg-type]
        (grad_P,) = torch.autograd.grad(losses_P.sum(), policy_chosen_P)
        assert -float(grad_P) == pytest.approx(expected, rel=figures_rtol)


def test_kto_baseline_is_detached_clamped_and_may_come_from_the_global_batch() -> None:
    """Pairs judged two at a time under the global z give what they give all at once."""
    inputs = log_ratio_pairs([2.0, -1.0, 4.0, 3.0], [-1.0, -5.0, 0.5, -7.0])
    for t in inputs[:2]:
        t.requires_grad_()
    z = kto_baseline(inputs[0] - inputs[2], inputs[1] - inputs[3])
    assert float(z.chosen) == pytest.approx(2.0)
    assert float(z.rejected) == 0.0
    assert not z.chosen.requires_grad
    whole = preference_loss(*inputs, kind="kto_pair", beta=0.3).losses_P
    parts = [
        preference_loss(*(t[rows] for t in inputs), kind="kto_pair", beta=0.3, baseline=z).losses_P
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    other = preference_loss(*inputs, kind="kto_pair", beta=0.3, baseline=KtoBaseline(z.chosen + 1, z.rejected))
    assert (other.losses_P < whole).all()


def test_anchor_and_nll() -> None:
    """anchor: r_w = ln 3, beta = 1: -log(3/4). nll: 12 nats over 4 tokens are 3 nats a token."""
    policy_P = torch.tensor([math.log(3.0) - 9.0])
    assert float(anchor_loss(policy_P, torch.tensor([-9.0]), beta=1.0)) == pytest.approx(math.log(4 / 3), rel=1e-4)
    assert nll_loss(torch.tensor([-12.0]), torch.tensor([4])).tolist() == [3.0]


def test_contradictory_input_is_refused() -> None:
    inputs = log_ratio_pairs([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(DataError, match=r"four tensors \[P\]"):
        preference_loss(inputs[0][:1], *inputs[1:], kind="dpo", beta=0.1)
    with pytest.raises(DataError, match="P >= 1"):
        preference_loss(*(t[:0] for t in inputs), kind="dpo", beta=0.1)
    with pytest.raises(DataError, match="beta > 0"):
        preference_loss(*inputs, kind="dpo", beta=0.0)
    with pytest.raises(DataError, match="got 'orpo'"):
        preference_loss(*inputs, kind="orpo", beta=0.1)  # type: ignore[arg-type]  # that is the point


def sequences() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seven rows of three sequences, interleaved; sequence 2 has none."""
    g = torch.Generator().manual_seed(0)
    hidden_RH = torch.randn(7, 5, generator=g).requires_grad_()
    weight_VH = torch.randn(11, 5, generator=g).requires_grad_()
    return hidden_RH, weight_VH, torch.randint(11, (7,), generator=g), torch.tensor([0, 0, 1, 3, 3, 1, 0])


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_sequence_logprobs_equal_their_twin_in_value_and_gradient(chunk_rows: int) -> None:
    """Under a gradient that differs from sequence to sequence; a sequence without rows sums to zero."""
    hidden_RH, weight_VH, labels_R, row_pair_index_R = sequences()
    fast_N = sequence_logprobs(hidden_RH, weight_VH, labels_R, row_pair_index_R, 4, chunk_rows=chunk_rows)
    slow_N = sequence_logprobs_reference(hidden_RH, weight_VH, labels_R, row_pair_index_R, 4)
    assert float(fast_N.detach()[2]) == 0.0
    torch.testing.assert_close(fast_N.double(), slow_N, rtol=RTOL, atol=SUM_ATOL)
    upstream_N = torch.tensor([1.0, -2.0, 5.0, 0.5])
    fast = torch.autograd.grad((fast_N * upstream_N).sum(), (hidden_RH, weight_VH))
    slow = torch.autograd.grad((slow_N * upstream_N).sum(), (hidden_RH, weight_VH))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=RTOL, atol=SUM_ATOL)


def test_sequence_logprobs_pass_gradcheck() -> None:
    hidden_RH, weight_VH, labels_R, row_pair_index_R = sequences()

    def sums(hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        return sequence_logprobs(hidden_RH, weight_VH, labels_R, row_pair_index_R, 4, chunk_rows=3)

    inputs = (hidden_RH.detach().double().requires_grad_(), weight_VH.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(sums, inputs)


def test_sequence_logprobs_leave_a_frozen_head_alone() -> None:
    hidden_RH, weight_VH, labels_R, row_pair_index_R = sequences()
    frozen_VH = weight_VH.detach()
    sequence_logprobs(hidden_RH, frozen_VH, labels_R, row_pair_index_R, 4, chunk_rows=3).sum().backward()
    assert hidden_RH.grad is not None
    assert frozen_VH.grad is None
    with pytest.raises(DataError, match="expected 7 labels"):
        sequence_logprobs(hidden_RH, weight_VH, labels_R[1:], row_pair_index_R, 4, chunk_rows=3)


def test_image_loss_by_hand() -> None:
    """beta = 0.5, the chosen gained 2 with its image and 1 without: -log sigmoid(0.5) = log(1 + e^-0.5) = 0.4741.

    An image that changes nothing costs log 2, and pulls the two apart with equal force.
    """
    chosen, blind, reference_chosen, reference_blind = (torch.tensor([x]) for x in (-10.0, -14.0, -12.0, -15.0))
    value = image_loss(chosen, blind, reference_chosen, reference_blind, beta=0.5)
    assert float(value) == pytest.approx(0.4740770, rel=RTOL)
    seen, unseen = torch.tensor([-9.0], requires_grad=True), torch.tensor([-9.0], requires_grad=True)
    same = image_loss(seen, unseen, torch.tensor([-9.0]), torch.tensor([-9.0]), beta=0.5)
    assert float(same.detach()) == pytest.approx(math.log(2), rel=RTOL)
    same.backward()
    assert float(seen.grad) == -float(unseen.grad) == pytest.approx(-0.25, rel=RTOL)  # type: ignore[arg-type]
