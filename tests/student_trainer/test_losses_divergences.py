"""Laws of the divergences on K tokens and everything else, through the fused loss that training uses.

Axes: R response rows, K cached tokens, V vocabulary, H hidden.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logitlake_schemas import CodecPolicy, SampledPolicy
from logitlake_shared.draws import encode_draws
from logitlake_shared.errors import DataError
from logitlake_shared.topk import DrawnRows, TeacherRows, decode, encode
from logitlake_student.losses import divergences
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.losses.divergences import Classes, Divergence
from logitlake_student.losses.reference import distillation_loss_reference

R, V, H = 9, 31, 6


class Case(NamedTuple):
    """A divergence, its name in the twin, and its parameter."""

    name: str
    divergence: Divergence
    parameter: float = 0.5


TRUE = [
    Case("forward_kl", divergences.forward_kl),
    Case("reverse_kl", divergences.reverse_kl),
    Case("jsd", partial(divergences.jsd, beta=0.5), 0.5),
    Case("jsd", partial(divergences.jsd, beta=0.1), 0.1),
    Case("skew_kl", partial(divergences.skew_kl, alpha=0.1), 0.1),
    Case("skew_reverse_kl", partial(divergences.skew_reverse_kl, alpha=0.1), 0.1),
    Case("tvd", divergences.tvd),
]
BIASED = [
    Case("truncated_kl", divergences.truncated_kl),
    Case("renormalised_kl", divergences.renormalised_kl),
]
EVERY = TRUE + BIASED

# Sums of a few dozen float32 terms of order 1, each rounded at about 1e-7; T^2 = 16 times that at T = 4.
RTOL, ATOL = 3e-5, 5e-6
# A gradient at a minimum is a difference of equal float32 terms: their rounding, times T at most 4.
STATIONARY_ATOL = 1e-5


def named(cases: list[Case]) -> dict[str, object]:
    return {"argvalues": cases, "ids": [f"{case.name}-{case.parameter}" for case in cases]}


def teacher_of(logits_RV: Tensor, k: int, temperature: float = 1.0) -> TeacherBatch:
    """The exact top-k rows of a dense teacher at a temperature."""
    logp_RV = torch.log_softmax(logits_RV.double() / temperature, dim=-1)
    top = logp_RV.topk(k, dim=-1)
    log_tail_R = torch.logsumexp(logp_RV.scatter(1, top.indices, -math.inf), dim=-1)
    labels_R = torch.arange(len(logits_RV))
    return TeacherBatch(top.indices, top.values.float(), log_tail_R.float(), labels_R)


def padded(teacher: TeacherBatch, num: int) -> TeacherBatch:
    """The same rows with `num` slots of padding."""
    ids_RP = torch.zeros(len(teacher.topk_ids_RK), num, dtype=torch.long)
    return TeacherBatch(
        torch.cat([teacher.topk_ids_RK, ids_RP], dim=1),
        torch.cat([teacher.topk_logprobs_RK, torch.full(ids_RP.shape, -math.inf)], dim=1),
        teacher.log_tail_mass_R,
        teacher.label_ids_R,
    )


def stored(logits_RV: Tensor, k: int, temperature: float) -> TeacherBatch:
    """The rows as a lake holds and decodes them: adaptive k, companded grid, tails at several temperatures."""
    logp_RV = torch.log_softmax(logits_RV.double(), dim=-1)
    top = logp_RV.topk(k, dim=-1)

    def log_tail(t: float) -> Tensor:
        return torch.logsumexp(
            torch.log_softmax(logits_RV.double() / t, dim=-1).scatter(1, top.indices, -math.inf), dim=-1
        )

    rows = TeacherRows(
        topk_ids_TK=top.indices.numpy().astype(np.int32),
        topk_logprobs_TK=top.values.numpy().astype(np.float32),
        log_tail_mass_T=log_tail(1).numpy().astype(np.float32),
        label_logprob_T=top.values[:, 0].numpy().astype(np.float32),
        label_rank_T=np.ones(len(logits_RV), np.int32),
        log_tail_mass_TX=torch.stack([log_tail(2), log_tail(4)], dim=1).numpy().astype(np.float32),
    )
    policy = CodecPolicy(k_max=k, k_min=1, p_min=0.05, max_mean_kl=1.0, temperatures=(2, 4))
    ids_RK, logprobs_RK, log_tail_R = decode(
        encode(rows, policy), 1 if temperature == 1 else 2 if temperature == 2 else 4
    )
    return TeacherBatch(
        torch.from_numpy(ids_RK).long(),
        torch.from_numpy(logprobs_RK),
        torch.from_numpy(log_tail_R),
        torch.arange(len(logits_RV)),
    )


def random_logits(seed: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(R, V, generator=torch.Generator().manual_seed(seed))


def loss_and_gradient(
    logits_RV: Tensor, teacher: TeacherBatch, case: Case, temperature: float = 1.0, ce_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Of the fused loss, by the student's logits: the head is the identity."""
    logits_RV = logits_RV.detach().clone().requires_grad_()
    loss, _ = distillation_loss(
        logits_RV,
        torch.eye(V),
        teacher,
        divergence=case.divergence,
        divergence_weight=1.0,
        ce_weight=ce_weight,
        temperature=temperature,
        chunk_rows=4,
    )
    (gradient_RV,) = torch.autograd.grad(loss, logits_RV)
    return loss.detach(), gradient_RV


def student_that_is(teacher: TeacherBatch, temperature: float) -> Tensor:
    """Logits of a student whose distribution at T agrees with the teacher's on all that is known of it.

    The tail's mass is spread evenly over the ids that are not cached.
    """
    logq_RV = torch.empty(R, V)
    for row in range(R):
        cached_K = torch.isfinite(teacher.topk_logprobs_RK[row])
        ids_K = teacher.topk_ids_RK[row][cached_K]
        spread = teacher.log_tail_mass_R[row] - math.log(max(V - len(ids_K), 1))
        logq_RV[row] = spread
        logq_RV[row, ids_K] = teacher.topk_logprobs_RK[row][cached_K]
    return temperature * logq_RV


ENCODINGS: dict[str, Callable[[Tensor, float], TeacherBatch]] = {
    "top-1": lambda logits_RV, t: teacher_of(logits_RV, 1, t),
    "top-7": lambda logits_RV, t: teacher_of(logits_RV, 7, t),
    "top-7, padded": lambda logits_RV, t: padded(teacher_of(logits_RV, 7, t), 3),
    "all ids": lambda logits_RV, t: teacher_of(logits_RV, V, t),
    "grid": lambda logits_RV, t: stored(logits_RV, 7, t),
}


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("case", **named([*TRUE, BIASED[1]]))
def test_nothing_pulls_a_student_that_agrees(case: Case, encoding: str, temperature: int) -> None:
    """Value and gradient are zero at student == teacher: every divergence, encoding and temperature."""
    teacher = ENCODINGS[encoding](random_logits(1), temperature)
    value, gradient_RV = loss_and_gradient(student_that_is(teacher, temperature), teacher, case, temperature)
    assert float(value) == pytest.approx(0.0, abs=R * temperature**2 * ATOL)
    torch.testing.assert_close(gradient_RV, torch.zeros_like(gradient_RV), rtol=0, atol=STATIONARY_ATOL)


def test_the_truncated_kl_pulls_a_student_that_agrees() -> None:
    """Why it is called biased: its slope at the teacher is the tail's mass, not zero.

    By hand: with G = -sum of p over the head = -(1 - r), the gradient is -p_i + (1 - r) p_i = -r p_i in the head.
    """
    teacher = teacher_of(random_logits(1), 3)
    student_RV = student_that_is(teacher, 1)
    _, gradient_RV = loss_and_gradient(student_RV, teacher, BIASED[0])
    head_RK = -teacher.log_tail_mass_R.exp()[:, None] * teacher.topk_logprobs_RK.exp()
    torch.testing.assert_close(gradient_RV.gather(1, teacher.topk_ids_RK), head_RK, rtol=RTOL, atol=ATOL)


def test_the_renormalised_kl_is_blind_to_the_tail() -> None:
    """Why it is called biased: a student that moves all its tail into the head, or out of it, pays nothing."""
    teacher = teacher_of(random_logits(1), 5)
    student_RV = student_that_is(teacher, 1)
    heavier_RV = student_RV.scatter_add(1, teacher.topk_ids_RK, torch.full((R, 5), -3.0))
    for logits_RV in (student_RV, heavier_RV):
        value, _ = loss_and_gradient(logits_RV, teacher, BIASED[1])
        assert float(value) == pytest.approx(0.0, abs=R * ATOL)
    assert float(loss_and_gradient(heavier_RV, teacher, TRUE[0])[0]) > 1


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (6, 1.0), (6, 6.0), (V, 1.0)])
@pytest.mark.parametrize("case", **named(EVERY))
def test_equals_its_twin_in_value_and_gradient(case: Case, k: int, scale: float, temperature: int) -> None:
    """Weighted rows, cross-entropy beside it, every temperature; `scale` 6 saturates most rows."""
    generator = torch.Generator().manual_seed(k)
    hidden_RH = torch.randn(R, H, generator=generator).requires_grad_()
    weight_VH = torch.randn(V, H, generator=generator).requires_grad_()
    teacher = padded(teacher_of(random_logits(2, scale), k, temperature), 2)
    teacher = TeacherBatch(
        teacher.topk_ids_RK,
        teacher.topk_logprobs_RK,
        teacher.log_tail_mass_R,
        teacher.label_ids_R,
        weight_R=torch.linspace(0, 2, R),
    )
    weights = {"divergence_weight": 0.7, "ce_weight": 0.3, "temperature": float(temperature)}
    fast, fast_sums = distillation_loss(
        hidden_RH, weight_VH, teacher, divergence=case.divergence, chunk_rows=4, **weights
    )
    slow, slow_sums = distillation_loss_reference(
        hidden_RH, weight_VH, teacher, divergence=case.name, parameter=case.parameter, **weights
    )
    rtol, atol = RTOL * temperature, ATOL * temperature**2 * R
    torch.testing.assert_close(fast.double(), slow, rtol=rtol, atol=atol)
    torch.testing.assert_close(fast_sums.divergence_sum, slow_sums.divergence_sum, rtol=rtol, atol=atol)
    inputs = (hidden_RH, weight_VH)
    for a, b in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", **named(EVERY))
def test_gradcheck_in_float64(case: Case) -> None:
    """The gradient is that of the value, by finite differences."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(3, V, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = padded(teacher_of(random_logits(3)[:3], 5, 2), 1)

    def loss(logits_RV: Tensor) -> Tensor:
        value, _ = distillation_loss(
            logits_RV,
            torch.eye(V, dtype=torch.float64),
            teacher,
            divergence=case.divergence,
            divergence_weight=1.0,
            ce_weight=0.5,
            temperature=2.0,
            chunk_rows=2,
        )
        return value

    assert torch.autograd.gradcheck(loss, (logits_RV,))


@pytest.mark.parametrize("case", **named(TRUE))
@pytest.mark.parametrize("seed", range(5))
def test_rises_with_k_to_the_divergence_of_the_whole_distributions(case: Case, seed: int) -> None:
    """0 <= what K tokens and a rest say <= what K' > K say <= the full divergence (data processing)."""
    student_RV, teacher_RV = random_logits(seed), random_logits(100 + seed)
    values = [float(loss_and_gradient(student_RV, teacher_of(teacher_RV, k), case)[0]) for k in (1, 3, 8, 20, V - 1, V)]
    assert values[0] >= 0
    for lower, upper in itertools.pairwise(values):
        assert lower <= upper * (1 + RTOL)
    assert values[-2] == pytest.approx(values[-1], rel=RTOL)  # a rest of one token is that token


def test_torchs_kl_in_both_directions() -> None:
    """With all ids cached they are `F.kl_div`, which takes the second argument's side for the first of the KL."""
    student_RV, teacher_RV = random_logits(4), random_logits(5)
    log_q_RV, log_p_RV = (F.log_softmax(logits_RV, dim=-1) for logits_RV in (student_RV, teacher_RV))
    teacher = teacher_of(teacher_RV, V)
    for case, inputs in ((TRUE[0], (log_q_RV, log_p_RV)), (TRUE[1], (log_p_RV, log_q_RV))):
        expected = F.kl_div(*inputs, log_target=True, reduction="sum")
        assert float(loss_and_gradient(student_RV, teacher, case)[0]) == pytest.approx(float(expected), rel=RTOL)


def test_the_ends_of_the_mixtures() -> None:
    """jsd / beta -> KL(p‖q) as beta -> 0 (and reversed at 1); skewed by nothing, the skew divergences are the KLs."""
    small = 1e-4
    student_RV, teacher = random_logits(4), teacher_of(random_logits(5), 6)
    forward, reverse = (float(loss_and_gradient(student_RV, teacher, case)[0]) for case in TRUE[:2])
    for expected, divergence, scale in (
        (forward, partial(divergences.jsd, beta=small), small),
        (reverse, partial(divergences.jsd, beta=1 - small), small),
        (forward, partial(divergences.skew_kl, alpha=small), 1),
        (reverse, partial(divergences.skew_reverse_kl, alpha=small), 1),
    ):
        value, _ = loss_and_gradient(student_RV, teacher, Case("", divergence))
        # What is left is of first order in `small`, with a factor that p/q of a rare token makes large.
        assert float(value) / scale == pytest.approx(expected, rel=0.02)


def test_by_hand() -> None:
    """One row, two cached tokens and the rest: p = (1/2, 1/4; 1/4), q = (1/4, 1/4; 1/2).

    forward KL   1/2 log 2 + 0 - 1/4 log 2 = 1/4 log 2;  reverse: -1/4 log 2 + 1/2 log 2 = 1/4 log 2
    tvd          1/2 (1/4 + 0 + 1/4) = 1/4
    jsd at 1/2   m = (3/8, 1/4; 3/8): 1/2 [1/2 log 4/3 + 1/4 log 2/3] * 2 by symmetry = 1/2 log 4/3 + 1/4 log 2/3
    truncated    1/2 log 2;  renormalised: (2/3, 1/3) and (1/2, 1/2): 2/3 log 4/3 + 1/3 log 2/3
    """
    classes = Classes(
        torch.tensor([[0.5, 0.25, 0.25]]).log(),
        torch.tensor([[0.25, 0.25, 0.5]]).log(),
        torch.ones(1, 3, dtype=torch.bool),
    )
    third = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    for divergence, expected in (
        (divergences.forward_kl, math.log(2) / 4),
        (divergences.reverse_kl, math.log(2) / 4),
        (divergences.tvd, 0.25),
        (partial(divergences.jsd, beta=0.5), math.log(4 / 3) / 2 + math.log(2 / 3) / 4),
        (divergences.truncated_kl, math.log(2) / 2),
        (divergences.renormalised_kl, third),
    ):
        assert float(divergence(classes)) == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("case", **named(EVERY))
def test_a_teacher_without_a_tail_gives_finite_numbers(case: Case) -> None:
    """A rest to which the teacher gives nothing is no infinite divergence, whatever the student puts there."""
    teacher = teacher_of(random_logits(1), 5)
    without = TeacherBatch(
        teacher.topk_ids_RK,
        teacher.topk_logprobs_RK.log_softmax(dim=1),
        torch.full((R,), -math.inf),
        teacher.label_ids_R,
    )
    for scale in (1.0, 100.0):
        value, gradient_RV = loss_and_gradient(random_logits(2, scale), without, case)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient_RV).all()


def test_temperature_squared_keeps_the_gradients_size() -> None:
    """T^2 makes the gradient at a high T that of half the squared distance of the centred logits over V.

    Hinton et al., section 2.1: T^2 dKL/dz -> (z - v) / V for logits of mean zero, as T grows.
    """
    student_RV, teacher_RV = (logits - logits.mean(dim=1, keepdim=True) for logits in map(random_logits, (1, 2)))
    temperature = 1e3
    _, gradient_RV = loss_and_gradient(student_RV, teacher_of(teacher_RV, V, temperature), TRUE[0], temperature)
    # First order in logits / T, about 5e-3 of the largest.
    torch.testing.assert_close(gradient_RV, (student_RV - teacher_RV) / V, rtol=0, atol=2e-3)


def test_draws_are_unbiased_in_the_gradient_of_the_forward_kl() -> None:
    """The mean gradient over many draws is that of the full distribution (RS-KD); one draw's is not."""
    num_draws, num_repeats = 20, 4000
    student_RV, teacher_RV = random_logits(4)[:1], random_logits(5)[:1]
    p_V = torch.softmax(teacher_RV[0].double(), dim=-1).numpy()
    drawn_ids_TN = np.random.default_rng(0).choice(V, size=(num_repeats, num_draws), p=p_V / p_V.sum())
    zeros_T = np.zeros(num_repeats, np.float32)
    policy = SampledPolicy(type="sampled", draws=num_draws)
    rows = DrawnRows(
        drawn_ids_TN=drawn_ids_TN.astype(np.int32),
        label_logprob_T=zeros_T,
        label_rank_T=np.ones(num_repeats, np.int32),
        entropy_T=zeros_T,
    )
    assert policy.draws == num_draws
    ids_RK, logprobs_RK, log_tail_R = decode(encode_draws(rows))
    teacher = TeacherBatch(
        torch.from_numpy(ids_RK).long(),
        torch.from_numpy(logprobs_RK),
        torch.from_numpy(log_tail_R),
        torch.zeros(num_repeats, dtype=torch.long),
    )
    _, gradient_TV = loss_and_gradient(student_RV.expand(num_repeats, -1), teacher, TRUE[0])
    full_V = torch.softmax(student_RV[0], dim=-1) - torch.from_numpy(p_V).float()
    # The standard error of a mean of shares; five of them over 31 ids is a chance of 2e-5.
    error_V = torch.from_numpy(np.sqrt(p_V * (1 - p_V) / (num_draws * num_repeats))).float()
    assert bool(((gradient_TV.mean(dim=0) - full_V).abs() <= 5 * error_V + ATOL).all())
    assert float((gradient_TV[0] - full_V).abs().max()) > 0.05


def test_a_bound_belongs_to_the_forward_kl() -> None:
    """A bound on the tail's tokens means nothing to another divergence, and is refused there."""
    teacher = teacher_of(random_logits(1), 5)
    bounded = TeacherBatch(
        *(getattr(teacher, n) for n in ("topk_ids_RK", "topk_logprobs_RK", "log_tail_mass_R")),
        teacher.label_ids_R,
        torch.zeros(R),
    )
    with pytest.raises(DataError, match="log_bound_R"):
        loss_and_gradient(random_logits(2), bounded, TRUE[1])
