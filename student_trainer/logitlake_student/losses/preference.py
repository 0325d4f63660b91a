"""Preference losses over pairs of responses, against a cached reference.

A pair's log-ratios are r_w = log pi(chosen) - log ref(chosen) and r_l likewise for the rejected response. The
reference is whatever the caller's logprobs come from: LLaVA-MoD's is the teacher, whose logprobs lie in the
lake. With

    dpo       -log sigmoid(beta (r_w - r_l))                                    arXiv 2305.18290
    ipo       (r_w - r_l - 1 / (2 beta))^2                                      arXiv 2310.12036
    hinge     max(0, 1 - beta (r_w - r_l))                                      arXiv 2305.10425
    kto_pair  mean of 1 - sigmoid(beta (r_w - z_l)) and 1 - sigmoid(beta (z_w - r_l)),
              z = max(0, mean of r over pairs), a constant                      LLaVA-MoD, after arXiv
              2402.01306

`kto_pair` saturates when the student is far below its reference on both responses (at r = -60 and beta = 0.1
its gradient is a two-hundredth of DPO's): watch the margins, or normalise by length first. LLaVA-MoD takes z
over one pair and lets gradients through it; here z is detached and may come from all pairs of the global
batch.

Per-token logprobs become per-sequence sums in `sequence_logprobs`, which shares the chunked head of the
distillation loss: it recomputes each chunk's logits in backward, since its gradient depends on what is done
with the sums.

Axes: P pairs, R response rows, C rows of one chunk, V vocabulary, H hidden, N sequences.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitlake_shared.errors import DataError
from logitlake_student.losses.chunked import ChunkedHead, accumulation_dtype

__all__ = [
    "KtoBaseline",
    "PreferenceKind",
    "PreferenceLosses",
    "anchor_loss",
    "image_loss",
    "kto_baseline",
    "nll_loss",
    "preference_loss",
    "sequence_logprobs",
]

PreferenceKind = Literal["dpo", "ipo", "hinge", "kto_pair"]


class KtoBaseline(NamedTuple):
    """The constants z of `kto_pair`: 0-d, at least 0, without gradient."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class PreferenceLosses:
    """What came of P pairs. Only `losses_P` carries a gradient."""

    losses_P: Tensor
    chosen_rewards_P: Tensor
    """beta * r_w."""
    rejected_rewards_P: Tensor
    """beta * r_l."""

    @property
    def margins_P(self) -> Tensor:
        """Reward of the chosen response minus that of the rejected one: positive where the order is right."""
        return self.chosen_rewards_P - self.rejected_rewards_P


def kto_baseline(chosen_log_ratios_P: Tensor, rejected_log_ratios_P: Tensor) -> KtoBaseline:
    """z_w and z_l from the log-ratios of all pairs that count as one batch; the caller gathers over ranks."""
    return KtoBaseline(
        chosen_log_ratios_P.detach().float().mean().clamp(min=0),
        rejected_log_ratios_P.detach().float().mean().clamp(min=0),
    )


def preference_loss(
    policy_chosen_logp_P: Tensor,
    policy_rejected_logp_P: Tensor,
    reference_chosen_logp_P: Tensor,
    reference_rejected_logp_P: Tensor,
    *,
    kind: PreferenceKind,
    beta: float,
    baseline: KtoBaseline | None = None,
) -> PreferenceLosses:
    """One loss a pair; formulas above. All inputs are float32 sums (or, where the caller divides, means) in
    nats.

    Args:
        kind: which loss.
        beta: strength of the pull towards the reference, > 0.
        baseline: `kto_pair` only: z from more pairs than these. None takes z from these pairs.

    Raises:
        DataError: inputs of different shapes, no pairs, or beta not positive.
    """
    inputs = (
        policy_chosen_logp_P,
        policy_rejected_logp_P,
        reference_chosen_logp_P,
        reference_rejected_logp_P,
    )
    if len({tuple(t.shape) for t in inputs}) != 1 or inputs[0].dim() != 1 or not len(inputs[0]):
        raise DataError(
            f"preference_loss: expected four tensors [P] with P >= 1, got {[tuple(t.shape) for t in inputs]}"
        )
    if not beta > 0:
        raise DataError(f"preference_loss: expected beta > 0, got {beta}")
    chosen_P = policy_chosen_logp_P - reference_chosen_logp_P
    rejected_P = policy_rejected_logp_P - reference_rejected_logp_P
    difference_P = chosen_P - rejected_P
    if kind == "dpo":
        losses_P = -F.logsigmoid(beta * difference_P)
    elif kind == "ipo":
        losses_P = (difference_P - 1 / (2 * beta)) ** 2
    elif kind == "hinge":
        losses_P = torch.relu(1 - beta * difference_P)
    elif kind == "kto_pair":
        z = baseline or kto_baseline(chosen_P, rejected_P)
        # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) is nearly 1.
        losses_P = (torch.sigmoid(beta * (z.rejected - chosen_P)) + torch.sigmoid(beta * (rejected_P - z.chosen))) / 2
    else:
        raise DataError(f"preference_loss: expected kind dpo, ipo, hinge or kto_pair, got {kind!r}")
    return PreferenceLosses(losses_P, beta * chosen_P.detach(), beta * rejected_P.detach())


def anchor_loss(policy_chosen_logp_P: Tensor, reference_chosen_logp_P: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta r_w) [P]: keeps the chosen response's reward above 0 (mDPO, arXiv 2406.11839)."""
    return -F.logsigmoid(beta * (policy_chosen_logp_P - reference_chosen_logp_P))


def image_loss(
    policy_chosen_logp_P: Tensor,
    policy_blind_logp_P: Tensor,
    reference_chosen_logp_P: Tensor,
    reference_blind_logp_P: Tensor,
    *,
    beta: float,
) -> Tensor:
    """-log sigmoid(beta (r_w - r_b)) [P], r_b that of the chosen response to the prompt without its images.

    The chosen response must gain more where the images are seen than where they are not: the conditional pair of mDPO
    (arXiv 2406.11839, eq. 3), whose other image is here none at all, as the teacher scored it.
    """
    chosen_P = policy_chosen_logp_P - reference_chosen_logp_P
    return -F.logsigmoid(beta * (chosen_P - (policy_blind_logp_P - reference_blind_logp_P)))


def nll_loss(policy_chosen_logp_P: Tensor, chosen_lengths_P: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of the chosen response [P], from sums and numbers of tokens."""
    return -policy_chosen_logp_P / chosen_lengths_P


def sequence_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    label_ids_R: Tensor,
    row_pair_index_R: Tensor,
    num_sequences: int,
    chunk_rows: int,
) -> Tensor:
    """Sums of the label logprobs of each sequence's rows, float32 [N], with gradient.

    Args:
        hidden_RH: final hidden states of the rows that predict response tokens.
        weight_VH: weight of the head.
        label_ids_R: int64, the token each row predicts.
        row_pair_index_R: int64, the sequence (one response of a pair) each row belongs to, 0 <= n < num_sequences.
        num_sequences: N; a sequence without rows sums to 0.
        chunk_rows: rows whose logits are alive at one time.
    """
    num_rows = hidden_RH.shape[0]
    if label_ids_R.shape != (num_rows,) or row_pair_index_R.shape != (num_rows,):
        raise DataError(
            f"sequence_logprobs: expected {num_rows} labels and sequence indices, "
            f"got {tuple(label_ids_R.shape)} and {tuple(row_pair_index_R.shape)}"
        )
    logp_R: Tensor = _LabelLogprobs.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        hidden_RH, weight_VH, label_ids_R, chunk_rows
    )
    return logp_R.new_zeros(num_sequences).index_add(0, row_pair_index_R, logp_R)


class _LabelLogprobs(torch.autograd.Function):
    """log softmax at the labels [R]. Keeps no logits; backward makes each chunk's again."""

    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor, chunk_rows: int) -> Tensor:
        head = ChunkedHead(hidden_RH, weight_VH, chunk_rows=chunk_rows, grad_hidden=False, grad_weight=False)
        logp_R = hidden_RH.new_empty(hidden_RH.shape[0], dtype=accumulation_dtype(hidden_RH))
        for rows in head.chunks():
            logits_CV = head.centred_logits(rows)
            label_logits_C = logits_CV.gather(1, labels_R[rows, None]).squeeze(1)
            logp_R[rows] = label_logits_C - torch.logsumexp(logits_CV, dim=-1)
        ctx.save_for_backward(hidden_RH, weight_VH, labels_R)
        ctx.chunk_rows = chunk_rows
        return logp_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_R = grad_outputs[0]
        hidden_RH, weight_VH, labels_R = ctx.saved_tensors
        head = ChunkedHead(
            hidden_RH,
            weight_VH,
            chunk_rows=ctx.chunk_rows,
            grad_hidden=ctx.needs_input_grad[0],
            grad_weight=ctx.needs_input_grad[1],
        )
        for rows in head.chunks():
            grad_C1 = grad_R[rows, None]
            grad_CV = torch.softmax(head.centred_logits(rows), dim=-1).mul_(-grad_C1)
            head.accumulate(rows, grad_CV.scatter_add_(1, labels_R[rows, None], grad_C1))
        hidden_grad, weight_grad = head.grad_hidden_RH, head.grad_weight_VH
        return (
            None if hidden_grad is None else hidden_grad.to(hidden_RH.dtype),
            None if weight_grad is None else weight_grad.to(weight_VH.dtype),
            None,
            None,
        )
