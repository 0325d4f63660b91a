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

__all__ = ["LossSums", "TeacherBatch", "distillation_loss", "row_forward_kl"]


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


def row_forward_kl(logits_CV: Tensor, teacher: TeacherBatch, rows: slice) -> Tensor:
    """The forward KL `[C]` of each row at T = 1, the tail as one class: what `distillation_loss` sums by default. For
    looking at; it has no gradient, and the logits are overwritten."""
    return forward_kl(_Student.of(logits_CV, teacher.label_ids_R[rows], teacher, rows).classes)


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
            labels_C = labels_R[rows]
            if teacher is None:
                ce_C, grad_CV = _cross_entropy(head.logits(rows), labels_C, terms.ce_weight)
            else:
                value_C, ce_C, grad_CV = _imitation(head.logits(rows), labels_C, teacher, rows, terms, wants_gradient)
                divergence_sum += value_C.sum()
            ce_sum += ce_C.sum()
            if wants_gradient:
                head.accumulate(rows, grad_CV)
            del grad_CV  # or it would live beside the next chunk's logits
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
            None if grad is None else _scaled(grad, scale, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None, None)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(grad * scale).to(dtype)` without a copy of the gradient in float32."""
    scaled = torch.empty_like(grad, dtype=dtype)
    for start in range(0, len(grad), _SCALED_ROWS):
        scaled[start : start + _SCALED_ROWS] = grad[start : start + _SCALED_ROWS] * scale
    return scaled


_SCALED_ROWS = 8192


def _cross_entropy(logits_CV: Tensor, labels_C: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy, and `weight` times its gradient in the place of the logits."""
    labels_C1 = labels_C[:, None]
    logits_CV.sub_(logits_CV.amax(dim=-1, keepdim=True))
    label_logits_C = logits_CV.gather(1, labels_C1).squeeze(1)
    sum_C = logits_CV.exp_().sum(dim=-1)
    logits_CV.mul_((weight / sum_C)[:, None])
    logits_CV.scatter_add_(1, labels_C1, torch.full_like(sum_C, -weight)[:, None])
    return sum_C.log() - label_logits_C, logits_CV


def _imitation(
    logits_CV: Tensor, labels_C: Tensor, teacher: TeacherBatch, rows: slice, terms: _Terms, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's divergence and cross-entropy, and the gradient of both under their weights, where it is wanted.

    At T = 1 all of it comes from one exponential of the logits, taken in their place.
    """
    temperature = terms.temperature
    if temperature == 1:
        student = _Student.of(logits_CV, labels_C, teacher, rows)
        value_C, grad_CV = _pull(student, labels_C, teacher, rows, terms, wants_gradient, ce_weight=terms.ce_weight)
        return value_C, -student.log_q_label_C, grad_CV
    student = _Student.of(logits_CV / temperature, labels_C, teacher, rows)
    value_C, grad_CV = _pull(student, labels_C, teacher, rows, terms, wants_gradient, ce_weight=0.0)
    ce_C, ce_grad_CV = _cross_entropy(logits_CV, labels_C, terms.ce_weight)
    if wants_gradient and terms.ce_weight:
        grad_CV.add_(ce_grad_CV)
    return value_C, ce_C, grad_CV


class _Student(NamedTuple):
    """What a chunk of rows says of the teacher's classes."""

    classes: Classes
    cached_ids_CK: Tensor
    odds_CV: Tensor
    """its tail as a distribution of its own but for the factor `sum_C`: 0 at the cached ids"""
    sum_C: Tensor
    """of `odds_CV`; 1 where the cached ids are all there are"""
    log_q_label_C: Tensor

    @classmethod
    def of(cls, logits_CV: Tensor, labels_C: Tensor, teacher: TeacherBatch, rows: slice) -> "_Student":
        """From logits, whose place `odds_CV` takes.

        The tail has an exponential to its own maximum, so that it is as exact where the head holds almost everything.
        """
        ids_CK = teacher.topk_ids_RK[rows]
        log_p_CK = teacher.topk_logprobs_RK[rows].to(logits_CV.dtype)
        log_r_C1 = teacher.log_tail_mass_R[rows, None].to(logits_CV.dtype)
        cached_CK = torch.isfinite(log_p_CK)
        label_logits_C1 = logits_CV.gather(1, labels_C[:, None])
        head_logits_CK = logits_CV.gather(1, ids_CK).masked_fill_(~cached_CK, -torch.inf)
        # A padded slot may point at an id that is cached, or at one that is not: `amin` against +inf changes neither.
        ceiling_CK = torch.full_like(log_p_CK, torch.inf).masked_fill_(cached_CK, -torch.inf)
        logits_CV.scatter_reduce_(1, ids_CK, ceiling_CK, "amin")
        outside_max_C1 = logits_CV.amax(dim=-1, keepdim=True)
        has_outside_C1 = torch.isfinite(outside_max_C1)
        no_outside_C1 = ~has_outside_C1
        odds_CV = logits_CV.sub_(outside_max_C1.masked_fill(no_outside_C1, 0.0)).exp_()
        sum_C1 = odds_CV.sum(dim=-1, keepdim=True)
        # All logits relative to the largest of the row: next to 0 a logsumexp is exact.
        max_C1 = torch.maximum(head_logits_CK.amax(dim=-1, keepdim=True), outside_max_C1)
        head_CK, outside_C1 = head_logits_CK - max_C1, outside_max_C1 - max_C1 + sum_C1.log()
        lse_C1 = torch.logaddexp(head_CK.logsumexp(dim=-1, keepdim=True), outside_C1)
        exists_CJ = torch.cat([cached_CK, has_outside_C1], dim=1)
        classes = Classes(
            torch.cat([log_p_CK.masked_fill(~cached_CK, 0.0), log_r_C1], dim=1),
            (torch.cat([head_CK, outside_C1], dim=1) - lse_C1).masked_fill_(~exists_CJ, 0.0),
            exists_CJ,
        )
        total_C = sum_C1.masked_fill_(no_outside_C1, 1.0).squeeze(1)
        return cls(classes, ids_CK, odds_CV, total_C, (label_logits_C1 - max_C1 - lse_C1).squeeze(1))


def _pull(
    student: _Student,
    labels_C: Tensor,
    teacher: TeacherBatch,
    rows: slice,
    terms: _Terms,
    wants_gradient: bool,
    *,
    ce_weight: float,
) -> tuple[Tensor, Tensor]:
    """Each row's divergence under its weight, and the gradient of all in the place of `odds_CV`."""
    classes, odds_CV, temperature = student.classes, student.odds_CV, terms.temperature
    exists_CJ, log_s_C = classes.exists_CJ, classes.log_q_CJ[:, -1]
    tail = None
    if teacher.log_bound_R is None:
        value_C, slopes_CJ = _with_slopes(terms.divergence, classes, wants_gradient)
    else:
        only_head = classes._replace(exists_CJ=exists_CJ.clone())
        only_head.exists_CJ[:, -1] = False
        value_C, slopes_CJ = _with_slopes(forward_kl, only_head, wants_gradient)
        bound_C = teacher.log_bound_R[rows].to(odds_CV.dtype).exp()
        tail = _BoundedTail.of(odds_CV, student.sum_C, classes.log_p_CJ[:, -1].exp(), bound_C)
        value_C = value_C + tail.kl_C(log_s_C)
        slopes_CJ[:, -1] = -tail.scale_C
    counts_C = torch.full_like(value_C, temperature**2)
    if teacher.weight_R is not None:
        counts_C = counts_C * teacher.weight_R[rows]
    value_C = value_C * counts_C
    if not wants_gradient:
        return value_C, odds_CV

    # d(logits / T) is d(logits) / T.
    weight_C = terms.divergence_weight * counts_C / temperature
    q_CJ = classes.log_q_CJ.exp().masked_fill_(~exists_CJ, 0.0)
    s_C, head_slopes_CK = q_CJ[:, -1], slopes_CJ[:, :-1]
    total_C = -head_slopes_CK.sum(dim=1) - (slopes_CJ[:, -1] if tail is None else -tail.mass_C())
    of_q_C = ce_weight + weight_C * total_C
    grad_CV = odds_CV.mul_(((of_q_C * s_C + weight_C * slopes_CJ[:, -1]) / student.sum_C)[:, None])
    if tail is not None:
        of_q_N = (of_q_C * s_C)[tail.row_N] * tail.share_N
        grad_CV[tail.row_N, tail.id_N] = of_q_N - weight_C[tail.row_N] * tail.bound_N
    head_CK = of_q_C[:, None] * q_CJ[:, :-1] + weight_C[:, None] * head_slopes_CK
    grad_CV.scatter_add_(1, student.cached_ids_CK, head_CK)
    if ce_weight:
        grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(value_C, -ce_weight)[:, None])
    return value_C, grad_CV


def _with_slopes(divergence: Divergence, classes: Classes, wants_slopes: bool) -> tuple[Tensor, Tensor]:
    """The divergences `[C]` and their derivatives by the student's log-masses `[C, J]`, 0 where nobody wants them."""
    if not wants_slopes:
        return divergence(classes), torch.zeros_like(classes.log_q_CJ)
    with torch.enable_grad():
        log_q_CJ = classes.log_q_CJ.detach().requires_grad_()
        value_C = divergence(classes._replace(log_q_CJ=log_q_CJ))
        (slopes_CJ,) = torch.autograd.grad(value_C.sum(), log_q_CJ)
    return value_C.detach(), slopes_CJ


class _BoundedTail(NamedTuple):
    """The tails' targets of a chunk, min(c share, bound): c x share but for the N tokens that the bound holds back."""

    scale_C: Tensor
    """c; 0 in rows without a tail"""
    free_C: Tensor
    """the student's share of its tail that is not held back"""
    row_N: Tensor
    id_N: Tensor
    share_N: Tensor
    """the student's, of its row's tail"""
    bound_N: Tensor

    @classmethod
    def of(cls, odds_CV: Tensor, sum_C: Tensor, mass_C: Tensor, bound_C: Tensor) -> "_BoundedTail":
        """The scale with which they sum to `mass`; the student's shares are `odds_CV / sum_C`.

        Each round caps what the last c lifted above the bound and spreads the rest over the others; c only grows, so
        what is capped stays capped, and mass > bound x number of capped holds throughout. Rounds look at the few tokens
        that a somewhat larger c would cap, and at all of them again only where c grew beyond that.
        """
        scale_C, looked_C, num_capped, grew = mass_C, mass_C, 0, True
        for _ in range(_MAX_ROUNDS):
            if grew:
                looked_C = _LOOKED_AHEAD * scale_C
                # A scale of 0 is a row without a tail: nothing is above infinity.
                row_N, id_N = (odds_CV > (bound_C / looked_C * sum_C)[:, None]).nonzero(as_tuple=True)
                odds_N = odds_CV[row_N, id_N]
                # Summed without them: 1 - their sum has no digits where they are nearly all.
                odds_CV[row_N, id_N] = 0
                rest_C = odds_CV.sum(dim=1) / sum_C
                odds_CV[row_N, id_N] = odds_N
                share_N = odds_N / sum_C[row_N]
            capped_N = share_N > (bound_C / scale_C)[row_N]
            free_C = rest_C.index_add(0, row_N, share_N.masked_fill(capped_N, 0.0))
            num_C = torch.zeros_like(mass_C).index_add(0, row_N, capped_N.to(mass_C.dtype))
            left_C = mass_C - bound_C * num_C
            # A student whose tail is one token leaves nothing to spread over.
            scale_C = torch.where((num_C > 0) & (free_C > 0), left_C / free_C.clamp_min(_TINY), scale_C)
            # One wait for the device a round.
            num_now, grew = torch.stack([capped_N.sum(), (scale_C > looked_C).any()]).tolist()
            if num_now == num_capped:
                break
            num_capped = num_now
        row_N, id_N, share_N = row_N[capped_N], id_N[capped_N], share_N[capped_N]
        return cls(scale_C, free_C, row_N, id_N, share_N, bound_C[row_N])

    def mass_C(self) -> Tensor:
        """The sum of each row's targets."""
        return (self.scale_C * self.free_C).index_add(0, self.row_N, self.bound_N)

    def kl_C(self, log_s_C: Tensor) -> Tensor:
        """The tail's part of the divergence: sum of p^ (log p^ - log q), with log q = log share + log s."""
        of_free_C = self.scale_C * self.free_C * (self.scale_C.clamp_min(_TINY).log() - log_s_C)
        log_q_N = self.share_N.log() + log_s_C[self.row_N]
        return of_free_C.index_add(0, self.row_N, self.bound_N * (self.bound_N.clamp_min(_TINY).log() - log_q_N))


# The capped ids grow with each round and settle after three or four; what is left then is below rounding.
_MAX_ROUNDS = 16
# By how much c grows over the rounds, mostly.
_LOOKED_AHEAD = 4.0
# The smallest normal float32: a floor for logarithms whose weight is 0.
_TINY = torch.finfo(torch.float32).tiny
