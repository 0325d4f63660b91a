"""The losses written the obvious way: full logits, float64, row by row, plain autograd. Slow on purpose.

Every fast path of this package is compared with its twin here, in value and gradient. Nothing in training
calls this file. Where a fast path and its twin disagree, the twin is right.

Axes: R response rows, K cached tokens, V vocabulary, H hidden, P pairs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from logitlake_student.losses.distillation import LossSums, TeacherBatch

__all__ = [
    "bounded_tail",
    "distillation_loss_reference",
    "divergence_reference",
    "full_kl",
    "preference_loss_reference",
    "sequence_logprobs_reference",
]


def full_kl(logits_student_RV: Tensor, logits_teacher_RV: Tensor) -> Tensor:
    """Sum over rows of KL(teacher || student) over the whole vocabulary, in nats, float64."""
    log_q_RV = torch.log_softmax(logits_student_RV.double(), dim=-1)
    log_p_RV = torch.log_softmax(logits_teacher_RV.double(), dim=-1)
    return (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum()


def distillation_loss_reference(
    hidden_RH: Tensor,
    lm_head_weight_VH: Tensor,
    teacher: TeacherBatch | None,
    *,
    divergence: str = "forward_kl",
    parameter: float = 0.5,
    divergence_weight: float,
    ce_weight: float,
    temperature: float = 1.0,
    label_ids_R: Tensor | None = None,
) -> tuple[Tensor, LossSums]:
    """Twin of `losses.distillation.distillation_loss`; it has no chunks, and a divergence goes by its name."""
    labels_R = teacher.label_ids_R if teacher is not None else label_ids_R
    assert labels_R is not None
    logits_RV = hidden_RH.double() @ lm_head_weight_VH.double().t()
    divergence_sum = logits_RV.new_zeros(())
    ce_sum = logits_RV.new_zeros(())
    for row, logits_V in enumerate(logits_RV):
        ce_sum = ce_sum - torch.log_softmax(logits_V, dim=-1)[labels_R[row]]
        if teacher is not None:
            weight = 1.0 if teacher.weight_R is None else float(teacher.weight_R[row])
            log_q_V = torch.log_softmax(logits_V / temperature, dim=-1)
            value = _coarsened(log_q_V, teacher, row, divergence, parameter)
            divergence_sum = divergence_sum + weight * temperature**2 * value
    loss = divergence_weight * divergence_sum + ce_weight * ce_sum
    num_tokens = torch.tensor(float(len(labels_R)))
    return loss, LossSums(divergence_sum.detach().float(), ce_sum.detach().float(), num_tokens)


def _coarsened(log_q_V: Tensor, teacher: TeacherBatch, row: int, divergence: str, parameter: float) -> Tensor:
    """Divergence of teacher and student over the K cached tokens of a row, and what is known of all others."""
    cached_K = torch.isfinite(teacher.topk_logprobs_RK[row])
    ids_K = teacher.topk_ids_RK[row][cached_K]
    log_p_K = teacher.topk_logprobs_RK[row][cached_K].double()
    log_r = teacher.log_tail_mass_R[row].double()
    in_tail_V = torch.ones_like(log_q_V, dtype=torch.bool)
    in_tail_V[ids_K] = False
    log_q_K, log_q_tail = log_q_V[ids_K], log_q_V[in_tail_V]
    if teacher.log_bound_R is not None:
        assert divergence == "forward_kl", divergence
        target = bounded_tail(log_q_tail.detach(), float(log_r.exp()), float(teacher.log_bound_R[row].double().exp()))
        in_tail = (target * (target.clamp_min(1e-300).log() - log_q_tail)).sum()
        return divergence_reference("forward_kl", log_p_K, log_q_K) + in_tail
    if divergence == "truncated_kl":
        return divergence_reference("forward_kl", log_p_K, log_q_K)
    if divergence == "renormalised_kl":
        return divergence_reference("forward_kl", log_p_K.log_softmax(dim=0), log_q_K.log_softmax(dim=0))
    if len(log_q_tail):
        log_p_K = torch.cat([log_p_K, log_r[None]])
        log_q_K = torch.cat([log_q_K, torch.logsumexp(log_q_tail, dim=-1)[None]])
    return divergence_reference(divergence, log_p_K, log_q_K, parameter)


def divergence_reference(divergence: str, log_p_J: Tensor, log_q_J: Tensor, parameter: float = 0.5) -> Tensor:
    """The divergences of `losses.divergences` by their names, one class after the other; log p may be -inf."""

    def kl(log_a_J: Sequence[Tensor], log_b_J: Sequence[Tensor]) -> Tensor:
        terms = [a.exp() * (a - b) for a, b in zip(log_a_J, log_b_J, strict=True) if a > -math.inf]
        return torch.stack(terms).sum()

    def mixture(log_a_J: Sequence[Tensor], log_b_J: Sequence[Tensor]) -> list[Tensor]:
        share = torch.tensor(parameter, dtype=torch.float64)
        return [torch.logaddexp(a + share.log(), b + (1 - share).log()) for a, b in zip(log_a_J, log_b_J, strict=True)]

    p, q = list(log_p_J), list(log_q_J)
    if divergence == "forward_kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, [log_p.clamp_min(-24 * math.log(2)) for log_p in p])
    if divergence == "jsd":
        return parameter * kl(p, mixture(p, q)) + (1 - parameter) * kl(q, mixture(p, q))
    if divergence == "skew_kl":
        return kl(p, mixture(p, q))
    if divergence == "skew_reverse_kl":
        return kl(q, mixture(q, p))
    assert divergence == "tvd", divergence
    return (log_p_J.exp() - log_q_J.exp()).abs().sum() / 2


def bounded_tail(log_q_tail: Tensor, mass: float, bound: float) -> Tensor:
    """min(c q, bound) with the sum `mass`: c found by bisection, in float64."""
    q = log_q_tail.exp()
    if len(q) * bound <= mass:
        return torch.full_like(q, bound)
    low, high = 0.0, bound / float(q.min().clamp_min(1e-300))
    for _ in range(2000):
        middle = (low * high) ** 0.5 if low > 0 else high / 2**40
        if float(torch.minimum(middle * q, torch.tensor(bound)).sum()) < mass:
            low = middle
        else:
            high = middle
        if low > 0 and high / low < 1 + 1e-15:
            break
    return torch.minimum(high * q, torch.tensor(bound, dtype=q.dtype))


def sequence_logprobs_reference(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    label_ids_R: Tensor,
    row_pair_index_R: Tensor,
    num_sequences: int,
) -> Tensor:
    """Twin of `losses.preference.sequence_logprobs`: float64 sums of label logprobs, one a sequence."""
    log_q_RV = torch.log_softmax(hidden_RH.double() @ weight_VH.double().t(), dim=-1)
    sums = [log_q_RV.new_zeros(()) for _ in range(num_sequences)]
    for row, (label, sequence) in enumerate(zip(label_ids_R.tolist(), row_pair_index_R.tolist(), strict=True)):
        sums[sequence] = sums[sequence] + log_q_RV[row, label]
    return torch.stack(sums)


def preference_loss_reference(
    policy_chosen: Sequence[float],
    policy_rejected: Sequence[float],
    reference_chosen: Sequence[float],
    reference_rejected: Sequence[float],
    *,
    kind: str,
    beta: float,
) -> list[float]:
    """Twin of `losses.preference.preference_loss` in Python floats: one loss a pair."""
    chosen = [policy - reference for policy, reference in zip(policy_chosen, reference_chosen, strict=True)]
    rejected = [policy - reference for policy, reference in zip(policy_rejected, reference_rejected, strict=True)]
    z_chosen = max(0.0, sum(chosen) / len(chosen))
    z_rejected = max(0.0, sum(rejected) / len(rejected))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    losses = []
    for w, l in zip(chosen, rejected, strict=True):  # noqa: E741  # the letters of the papers
        if kind == "dpo":
            losses.append(-math.log(sigmoid(beta * (w - l))))
        elif kind == "ipo":
            losses.append((w - l - 1 / (2 * beta)) ** 2)
        elif kind == "hinge":
            losses.append(max(0.0, 1 - beta * (w - l)))
        else:
            assert kind == "kto_pair", kind
            losses.append(((1 - sigmoid(beta * (w - z_rejected))) + (1 - sigmoid(beta * (z_chosen - l)))) / 2)
    return losses
