"""Distillation from a cached top-k and its tail mass, without a `[R, V]` tensor.

For each response token the lake holds the teacher's K most likely tokens, their logprobs, and the logarithm
of the mass r of everything else. The student's full softmax q is coarsened the same way, to K tokens and one
bucket of mass s, and the two are compared on these K + 1 classes by one of `losses.divergences`; by default

    forward_kl = sum over K of p_i (log p_i - log q_i)  +  r (log r - log s)

This is a true KL divergence between two distributions over K + 1 classes: never negative, zero only at
equality of head and tail mass, and never above the KL over the full vocabulary (data-processing inequality).
log s is the logsumexp of the logits outside the K ids minus the full logsumexp, never log(1 - sum), which is
noise once the head holds almost everything. Cross-entropy on the response token itself comes from the same
logsumexp.

The bucket hands the tail's mass to whatever the student likes there. But a lake that keeps a prefix of the rank order
also knows a bound u: no token outside the K is more probable than the least cached one, or than the codec's floor.
So the tail's target of the forward KL is the distribution nearest to the student's own tail that obeys it,

    p^_j = min(c q_j, u)  over the ids outside K,  with c such that they sum to r

(the I-projection; the least KL that is possible for what is known), and the tail's part of the divergence is
sum p^_j (log p^_j - log q_j). It lies between that of the bucket and that of the full vocabulary, is still zero where
student and teacher agree, and without a bound p^_j = r q_j / s: the bucket. Measured in docs/decisions/0006.

Gradient. With g_i the derivative of a row's divergence by log q_i and g_s that by log s, G their sum, and the logits z:
    in the head:    g_i - G q_i
    in the tail:    g_s q_j / s - G q_j
For the forward KL g_i = -p_i and g_s = -r; under a bound g_s q_j / s becomes -p^_j (p^ minimises the divergence, so
its own change adds nothing). q_j / s is the softmax over the tail alone, which stays finite where s underflows.

At a temperature T both distributions are softmax(logits / T), and the divergence counts T^2 times, so that its gradient
keeps its size (arXiv 1503.02531). Cross-entropy stays at T = 1.

`losses.reference` holds the slow twin that this file is tested against, in value and gradient.

Axes: R response rows, C rows of one chunk, K cached tokens, J = K + 1 classes, V vocabulary, H hidden.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitlake_shared.errors import DataError
from logitlake_student.losses.chunked import ChunkedHead, accumulation_dtype
from logitlake_student.losses.divergences import Classes, Divergence, forward_kl

__all__ = ["LossSums", "TeacherBatch", "distillation_loss"]


@dataclass(frozen=True)
class TeacherBatch:
    """What the lake knows about the R response rows of a micro-batch. All tensors on the student's device."""

    topk_ids_RK: Tensor
    """int64. Padded slots hold any valid id (0, say); their logprob says that they are padding."""
    topk_logprobs_RK: Tensor
    """float32, normalised over the teacher's full vocabulary, in nats, at the temperature of the loss. -inf in padded
    slots."""
    log_tail_mass_R: Tensor
    """float32, log of the mass outside the K ids at that temperature. -inf where the K ids hold everything."""
    label_ids_R: Tensor
    """int64, the response token that each row predicts."""
    log_bound_R: Tensor | None = None
    """float32, no id outside the K has a greater teacher logprob. None where nothing is known. For `forward_kl`."""
    weight_R: Tensor | None = None
    """float32, how much a row's divergence counts. None: 1."""


class LossSums(NamedTuple):
    """0-d float32 tensors, detached: sums over the rows of a micro-batch, in nats.

    Sums and not means, because a mean over the global batch is made of sums: the trainer divides by the
    number of response tokens of all micro-batches on all ranks.
    """

    divergence_sum: Tensor
    """under the rows' weights, temperature^2 included"""
    ce_sum: Tensor
    num_tokens: Tensor


def distillation_loss(
    hidden_RH: Tensor,
    lm_head_weight_VH: Tensor,
    teacher: TeacherBatch | None,
    *,
    divergence_weight: float,
    ce_weight: float,
    chunk_rows: int,
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
    label_ids_R: Tensor | None = None,
) -> tuple[Tensor, LossSums]:
    """`divergence_weight * sum(T^2 weight divergence) + ce_weight * sum(cross-entropy)` over response rows.

    Args:
        hidden_RH: final hidden states (after the last norm) of the rows that predict response tokens.
        lm_head_weight_VH: weight of the head; float32 or bfloat16; frozen, trainable or tied to the embedding.
            For a head that is padded beyond the tokenizer, pass the slice `weight[:vocab_size]`.
        teacher: cached rows. None leaves cross-entropy only, on `label_ids_R`; the divergence is then 0.
        chunk_rows: rows whose logits are alive at one time; memory, not meaning.
        divergence: one of `losses.divergences`.
        temperature: T, of both distributions in the divergence. What `teacher` holds must be at T.
        label_ids_R: int64, only where there is no teacher.

    Returns:
        The 0-d loss sum, whose backward costs no further pass over the head, and the sums for logs.

    Raises:
        DataError: shapes that do not agree, labels given twice or not at all, a bound with another divergence than
            the forward KL, or a tail mass where the K ids are the whole vocabulary.
    """
    labels_R = _labels(hidden_RH, lm_head_weight_VH, teacher, label_ids_R)
    if teacher is not None and teacher.log_bound_R is not None and divergence is not forward_kl:
        raise DataError("distillation_loss: log_bound_R says what the forward KL's tail is; expected None")
    grad = torch.is_grad_enabled()
    loss, divergence_sum, ce_sum = _DistillationLoss.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        hidden_RH,
        lm_head_weight_VH,
        labels_R,
        teacher,
        _Terms(divergence, divergence_weight, ce_weight, temperature),
        chunk_rows,
        grad and hidden_RH.requires_grad,
        grad and lm_head_weight_VH.requires_grad,
    )
    num_tokens = torch.tensor(float(labels_R.shape[0]), device=hidden_RH.device)
    return loss, LossSums(divergence_sum.float(), ce_sum.float(), num_tokens)


def _labels(hidden_RH: Tensor, weight_VH: Tensor, teacher: TeacherBatch | None, label_ids_R: Tensor | None) -> Tensor:
    """The labels, wherever they came from, after checking that everything has R rows."""
    if (teacher is None) == (label_ids_R is None):
        raise DataError("distillation_loss: labels come with the teacher, or as label_ids_R where there is none")
    if teacher is None:
        assert label_ids_R is not None
        shapes = {"label_ids_R": label_ids_R.shape}
        labels_R = label_ids_R
    else:
        shapes = {
            "topk_ids_RK": teacher.topk_ids_RK.shape[:1],
            "topk_logprobs_RK": teacher.topk_logprobs_RK.shape[:1],
            "log_tail_mass_R": teacher.log_tail_mass_R.shape,
            "label_ids_R": teacher.label_ids_R.shape,
        }
        for name in ("log_bound_R", "weight_R"):
            if (given_R := getattr(teacher, name)) is not None:
                shapes[name] = given_R.shape
        labels_R = teacher.label_ids_R
        if teacher.topk_ids_RK.shape != teacher.topk_logprobs_RK.shape:
            raise DataError(
                f"distillation_loss: topk_ids_RK {tuple(teacher.topk_ids_RK.shape)} and topk_logprobs_RK "
                f"{tuple(teacher.topk_logprobs_RK.shape)} differ in shape"
            )
        if teacher.topk_ids_RK.shape[1] >= weight_VH.shape[0]:
            _refuse_mass_on_nothing(teacher, weight_VH.shape[0])
    num_rows = hidden_RH.shape[0]
    for name, shape in shapes.items():
        if tuple(shape) != (num_rows,):
            raise DataError(f"distillation_loss: {name} has {tuple(shape)} rows, the hidden states have {num_rows}")
    return labels_R


def _refuse_mass_on_nothing(teacher: TeacherBatch, vocab_size: int) -> None:
    """With every id in the head there is no tail, and mass on it would be an infinite divergence."""
    full_R = torch.isfinite(teacher.topk_logprobs_RK).sum(dim=1) >= vocab_size
    bad = int((full_R & torch.isfinite(teacher.log_tail_mass_R)).sum())
    if bad:
        raise DataError(
            f"distillation_loss: {bad} rows hold all {vocab_size} ids of the vocabulary and still a tail mass;"
            " expected log_tail_mass = -inf there"
        )


class _Terms(NamedTuple):
    divergence: Divergence
    divergence_weight: float
    ce_weight: float
    temperature: float


class _DistillationLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales what forward accumulated."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        labels_R: Tensor,
        teacher: TeacherBatch | None,
        terms: _Terms,
        chunk_rows: int,
        grad_hidden: bool,
        grad_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = ChunkedHead(
            hidden_RH, weight_VH, chunk_rows=chunk_rows, grad_hidden=grad_hidden, grad_weight=grad_weight
        )
        divergence_sum = hidden_RH.new_zeros((), dtype=accumulation_dtype(hidden_RH))
        ce_sum = torch.zeros_like(divergence_sum)
        wants_gradient = grad_hidden or grad_weight
        for rows in head.chunks():
            logits_CV = head.logits(rows)
            lse_C = torch.logsumexp(logits_CV, dim=-1)
            labels_C1 = labels_R[rows, None]
            ce_sum += (lse_C - logits_CV.gather(1, labels_C1).squeeze(1)).sum()
            pull = None
            if teacher is not None:
                pull = _Pull.of(logits_CV, lse_C, teacher, rows, terms, wants_gradient)
                divergence_sum += pull.value_C.sum()
            if wants_gradient:
                head.accumulate(rows, _logit_gradient(logits_CV, lse_C, labels_C1, pull, terms))
        ctx.dtypes = hidden_RH.dtype, weight_VH.dtype
        ctx.save_for_backward(head.grad_hidden_RH, head.grad_weight_VH)
        ctx.mark_non_differentiable(divergence_sum, ce_sum)
        loss = terms.divergence_weight * divergence_sum + terms.ce_weight * ce_sum
        return loss, divergence_sum, ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grads = [
            None if grad is None else (grad * scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None, None)


class _Pull(NamedTuple):
    """What the teacher does to a chunk's rows: their divergence, and its derivatives by the student's logprobs.

    Weights of the rows and T^2 are in the value, and in the derivatives once more 1/T, which the logits are divided by.
    """

    value_C: Tensor
    ids_CK: Tensor
    head_CK: Tensor
    """by the logprobs of the cached ids"""
    tail_CV: Tensor
    """by the tail's, spread over its ids; 0 at the cached ones"""
    total_C: Tensor
    """sum of both, with the sign turned"""

    @classmethod
    def of(
        cls,
        logits_CV: Tensor,
        lse_C: Tensor,
        teacher: TeacherBatch,
        rows: slice,
        terms: _Terms,
        wants_slopes: bool,
    ) -> "_Pull":
        temperature = terms.temperature
        tempered_CV = logits_CV
        if temperature != 1:
            tempered_CV = logits_CV / temperature
            lse_C = torch.logsumexp(tempered_CV, dim=-1)
        classes, share_CV = _coarsen(tempered_CV, lse_C, teacher, rows)
        if teacher.log_bound_R is None:
            value_C, slopes_CJ = _with_slopes(terms.divergence, classes, wants_slopes)
            tail_CV = share_CV.mul_(slopes_CJ[:, -1:])
        else:
            log_r_C, log_s_C = classes.log_p_CJ[:, -1], classes.log_q_CJ[:, -1]
            bound_C = teacher.log_bound_R[rows].to(share_CV.dtype).exp()
            only_head = classes._replace(exists_CJ=classes.exists_CJ.clone())
            only_head.exists_CJ[:, -1] = False
            value_C, slopes_CJ = _with_slopes(forward_kl, only_head, wants_slopes)
            tail_CV, tail_C = _bounded_tail(share_CV, log_r_C.exp(), bound_C, log_s_C)
            tail_CV.neg_()
            value_C = value_C + tail_C
        head_CK = slopes_CJ[:, :-1]
        total_C = -head_CK.sum(dim=1) - tail_CV.sum(dim=1)
        if teacher.weight_R is None and temperature == 1:
            return cls(value_C, teacher.topk_ids_RK[rows], head_CK, tail_CV, total_C)
        scale_C = torch.full_like(lse_C, temperature)
        if teacher.weight_R is not None:
            scale_C = scale_C * teacher.weight_R[rows]
        scale_C1 = scale_C[:, None]
        return cls(
            value_C * scale_C * temperature,
            teacher.topk_ids_RK[rows],
            head_CK * scale_C1,
            tail_CV.mul_(scale_C1),
            total_C * scale_C,
        )


def _coarsen(logits_CV: Tensor, lse_C: Tensor, teacher: TeacherBatch, rows: slice) -> tuple[Classes, Tensor]:
    """The classes of some rows, and `share_CV`: the student's tail as a distribution of its own, 0 at cached ids."""
    ids_CK = teacher.topk_ids_RK[rows]
    log_p_CK = teacher.topk_logprobs_RK[rows].to(logits_CV.dtype)
    log_r_C1 = teacher.log_tail_mass_R[rows, None].to(logits_CV.dtype)
    cached_CK = torch.isfinite(log_p_CK)
    # A padded slot may point at an id that is cached, or at one that is not: `amin` against +inf changes neither.
    infinity_CK = torch.full_like(log_p_CK, torch.inf)
    ceiling_CK = torch.where(cached_CK, -infinity_CK, infinity_CK)
    outside_CV = logits_CV.scatter_reduce(1, ids_CK, ceiling_CK, "amin")
    lse_outside_C1 = torch.logsumexp(outside_CV, dim=-1, keepdim=True)
    has_outside_C1 = torch.isfinite(lse_outside_C1)
    lse_outside_C1 = torch.where(has_outside_C1, lse_outside_C1, 0.0)
    share_CV = outside_CV.sub_(lse_outside_C1).exp_()
    log_q_CK = logits_CV.gather(1, ids_CK)
    classes = Classes(
        torch.cat([torch.where(cached_CK, log_p_CK, 0.0), log_r_C1], dim=1),
        torch.cat([log_q_CK, lse_outside_C1], dim=1) - lse_C[:, None],
        torch.cat([cached_CK, has_outside_C1], dim=1),
    )
    return classes, share_CV


def _with_slopes(divergence: Divergence, classes: Classes, wants_slopes: bool) -> tuple[Tensor, Tensor]:
    """The divergences `[C]` and their derivatives by the student's log-masses `[C, J]`, 0 where nobody wants them."""
    if not wants_slopes:
        return divergence(classes), torch.zeros_like(classes.log_q_CJ)
    with torch.enable_grad():
        log_q_CJ = classes.log_q_CJ.requires_grad_()
        value_C = divergence(classes)
        (slopes_CJ,) = torch.autograd.grad(value_C.sum(), log_q_CJ)
    return value_C.detach(), slopes_CJ


def _logit_gradient(logits_CV: Tensor, lse_C: Tensor, labels_C1: Tensor, pull: _Pull | None, terms: _Terms) -> Tensor:
    """The loss's gradient by the logits, which are overwritten."""
    weight, ce_weight = terms.divergence_weight, terms.ce_weight
    total_CV: Tensor | None = None
    if pull is not None and terms.temperature != 1:
        total_CV = torch.softmax(logits_CV / terms.temperature, dim=-1).mul_((weight * pull.total_C)[:, None])
    grad_CV = logits_CV.sub_(lse_C[:, None]).exp_()  # q; the logits are not needed any more
    if pull is None:
        grad_CV.mul_(ce_weight)
    else:
        if total_CV is None:
            grad_CV.mul_((ce_weight + weight * pull.total_C)[:, None])
        else:
            grad_CV.mul_(ce_weight).add_(total_CV)
        grad_CV.add_(pull.tail_CV, alpha=weight)
        grad_CV.scatter_add_(1, pull.ids_CK, weight * pull.head_CK)
    return grad_CV.scatter_add_(1, labels_C1, torch.full_like(lse_C, -ce_weight)[:, None])


# The capped ids grow with each round and settle after three or four; what is left then is below rounding.
_MAX_ROUNDS = 16


def _bounded_tail(share_CV: Tensor, mass_C: Tensor, bound_C: Tensor, log_s_C: Tensor) -> tuple[Tensor, Tensor]:
    """`(tail_CV, kl_C)`: min(c share, bound) with the sum `mass`, and its share of the divergence.

    `share_CV` sums to 1 (0 where the cached ids are all there are) and is overwritten; log q_j = log share_j + log s.
    Each round caps what the last scale c lifted above the bound and spreads the rest over the others; c only grows, so
    what is capped stays capped, and mass > bound x number of capped holds throughout.
    """
    scale_C = mass_C
    capped_CV = share_CV * scale_C[:, None] > bound_C[:, None]
    num_capped_C = capped_CV.sum(dim=1)
    for _ in range(_MAX_ROUNDS):
        if not bool(num_capped_C.any()):
            break
        free_C = torch.where(capped_CV, 0.0, share_CV).sum(dim=1)
        left_C = mass_C - bound_C * num_capped_C
        # A student whose tail is one token leaves nothing to spread over.
        scale_C = torch.where((num_capped_C > 0) & (free_C > 0), left_C / free_C.clamp_min(_TINY), scale_C)
        wider_CV = share_CV * scale_C[:, None] > bound_C[:, None]
        wider_C = wider_CV.sum(dim=1)
        if torch.equal(wider_C, num_capped_C):
            break
        capped_CV, num_capped_C = wider_CV, wider_C
    log_capped_C = torch.where(capped_CV, share_CV, 1.0).clamp_min(_TINY).log().sum(dim=1)
    free_mass_C = scale_C * torch.where(capped_CV, 0.0, share_CV).sum(dim=1)
    tail_CV = torch.where(capped_CV, bound_C[:, None], share_CV.mul_(scale_C[:, None]))
    kl_C = torch.where(
        mass_C > 0,
        free_mass_C * (scale_C.clamp_min(_TINY).log() - log_s_C)
        + bound_C * (num_capped_C * (bound_C.clamp_min(_TINY).log() - log_s_C) - log_capped_C),
        0.0,
    )
    return tail_CV, kl_C


# The smallest normal float32: a floor for logarithms whose weight is 0.
_TINY = torch.finfo(torch.float32).tiny
