"""How far the gradient of what is stored lies from the gradient of the full distribution.

The measure of a codec's fidelity: over a batch of about a thousand tokens, the gradient of the student's lm_head under
KL(teacher‖student) with the teacher's whole distribution, and the same with what the lake holds; the angle between
the two, in degrees. Every token's logit gradient is q - p, the student's probabilities less the target's; the lm_head
gradient is their outer product with the student's hidden states, summed over the batch.

What stands outside the stored entries has to be given a target. `bucket` shares the tail mass R as the student
shares its own: c·q. `bounded` uses what a stored *prefix* says beside: no token outside is more probable than the
last one inside (`topk.tail_bound`), so the target is min(c·q, u) with the c that makes it sum to R, the distribution
nearest to the student's of all that agree with what is stored.

The hidden states are projected to fewer dimensions, the same ones for all that is compared: angles keep to a few per
cent, and a case costs a sixth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.logprobs import SYNTH_TEMPERATURE, RealLogprobs, SynthLogprobs
from logitlake_schemas import CodecPolicy
from logitlake_shared.topk import StoredRows, decode, tail_bound

__all__ = ["STUDENTS", "Batch", "Case", "Student", "angles", "real_batch", "synth_batch"]

Student = Literal["short-sighted", "halfway"]
STUDENTS: tuple[Student, ...] = ("short-sighted", "halfway")

_PROJECTED = 96
_CHUNK = 128  # tokens at a time: 25 MB of float32 a full distribution
_MAX_ROUNDS = 20


@dataclass(frozen=True)
class Case:
    """Something stored of a batch, and the target that a loss makes of its tail."""

    stored: StoredRows
    codec: CodecPolicy
    tail: Literal["bucket", "bounded"]


@dataclass(frozen=True)
class Batch:
    """T tokens in full, in chunks: teacher's and student's probabilities (C, V) and the student's states (C, D)."""

    num_tokens: int
    chunk: Callable[[slice], tuple[Tensor, Tensor, Tensor]]
    row_of_id: Tensor | None = None
    """row of the lm_head that a stored id has; None where the id itself is the row"""


def real_batch(data: RealLogprobs, tokens_T: npt.NDArray[np.int64], student: Student) -> Batch:
    """A batch of real tokens."""
    head_DV = torch.from_numpy(data.head_VD).float().T

    def chunk(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        hidden_CD = torch.from_numpy(data.hidden_TD[tokens_T[rows]]).float()
        student_CD = _student_states(data, tokens_T[rows], student)
        return torch.softmax(hidden_CD @ head_DV, -1), torch.softmax(student_CD @ head_DV, -1), student_CD

    return Batch(len(tokens_T), chunk)


def synth_batch(data: SynthLogprobs, source: RealLogprobs, tokens_T: npt.NDArray[np.int64], student: Student) -> Batch:
    """A batch of synthetic tokens. The rows of the lm_head whose ids no token has are left out: they have no error."""
    head_DV = torch.from_numpy(source.head_VD).float().T
    row_of_id = torch.full((int(data.injection.max()) + 1,), -1)
    row_of_id[torch.from_numpy(data.injection).long()] = torch.arange(len(data.injection))

    def mixed(states_C2D: Sequence[Tensor], weight_C1: Tensor) -> Tensor:
        first, second = (torch.softmax(states @ head_DV / SYNTH_TEMPERATURE, -1) for states in states_C2D)
        return first.mul_(weight_C1).add_(second.mul_(1 - weight_C1))

    def chunk(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        parts_C2 = data.parts_T2[tokens_T[rows]]
        weight_C1 = torch.from_numpy(data.weight_T[tokens_T[rows]])[:, None]
        teacher = [torch.from_numpy(source.hidden_TD[parts_C2[:, i]]).float() for i in (0, 1)]
        learner = [_student_states(source, parts_C2[:, i], student) for i in (0, 1)]
        return mixed(teacher, weight_C1), mixed(learner, weight_C1), learner[0]

    return Batch(len(tokens_T), chunk, row_of_id)


def angles(batch: Batch, cases: Sequence[Case]) -> list[float]:
    """The angle of each case in degrees."""
    decoded = [tuple(map(torch.from_numpy, decode(case.stored))) for case in cases]
    bounds = [
        torch.from_numpy(np.exp(tail_bound(case.stored, case.codec))) if case.tail == "bounded" else None
        for case in cases
    ]
    projection_DP: Tensor | None = None
    full: Tensor | None = None
    errors: list[Tensor] = []
    for rows in _chunks(batch.num_tokens):
        p_CV, q_CV, hidden_CD = batch.chunk(rows)
        if projection_DP is None:
            random = torch.Generator().manual_seed(0)
            projection_DP = torch.randn(hidden_CD.shape[1], _PROJECTED, generator=random) / _PROJECTED**0.5
            full = torch.zeros(p_CV.shape[1], _PROJECTED)
            errors = [torch.zeros_like(full) for _ in cases]
        hidden_CP = hidden_CD @ projection_DP
        assert full is not None
        full.addmm_((q_CV - p_CV).T, hidden_CP)
        for error, bound_T, (ids_TK, logprobs_TK, log_tail_T) in zip(errors, bounds, decoded, strict=True):
            ids_CK = ids_TK[rows].long()
            kept_CK = torch.isfinite(logprobs_TK[rows])
            if batch.row_of_id is not None:
                ids_CK = torch.where(kept_CK, batch.row_of_id[torch.where(kept_CK, ids_CK, 0)], 0)
            bound_C = None if bound_T is None else bound_T[rows]
            target_CV = _target(q_CV, ids_CK, kept_CK, logprobs_TK[rows], log_tail_T[rows], bound_C)
            error.addmm_(target_CV.sub_(p_CV).neg_().T, hidden_CP)
    assert full is not None
    return [_angle(full, error) for error in errors]


def _target(
    q_CV: Tensor, ids_CK: Tensor, kept_CK: Tensor, logprobs_CK: Tensor, log_tail_C: Tensor, bound_C: Tensor | None
) -> Tensor:
    """The distribution that the loss pulls the student to."""
    token_N, entry_N = kept_CK.nonzero(as_tuple=True)
    id_N = ids_CK[token_N, entry_N]
    target_CV = q_CV.clone()
    target_CV[token_N, id_N] = 0
    tail_C1 = log_tail_C.exp()[:, None]
    factor_C1 = tail_C1 / target_CV.sum(1, keepdim=True).clamp_min(1e-30)
    if bound_C is None:
        target_CV.mul_(factor_C1)
    else:
        _fill_below(target_CV, tail_C1, factor_C1, bound_C[:, None])
    target_CV[token_N, id_N] = logprobs_CK[token_N, entry_N].exp()
    return target_CV


def _fill_below(target_CV: Tensor, tail_C1: Tensor, factor_C1: Tensor, bound_C1: Tensor) -> None:
    """min(c·q, u) that sums to the tail, in place. What is capped only grows, so c does, and the rounds end."""
    for _ in range(_MAX_ROUNDS):
        capped_CV = target_CV * factor_C1 > bound_C1
        num_C1 = capped_CV.sum(1, keepdim=True)
        free_C1 = (target_CV * ~capped_CV).sum(1, keepdim=True)
        left_C1 = (tail_C1 - bound_C1 * num_C1).clamp_min(0)
        larger_C1 = torch.maximum(factor_C1, left_C1 / free_C1.clamp_min(1e-30))
        if torch.allclose(larger_C1, factor_C1, rtol=1e-4, atol=0):
            break
        factor_C1 = larger_C1
    torch.minimum(target_CV.mul_(factor_C1), bound_C1, out=target_CV)


def _student_states(data: RealLogprobs, tokens_T: npt.NDArray[np.int64], student: Student) -> Tensor:
    states_TD = torch.from_numpy(data.window_hidden_TD[tokens_T]).float()
    if student == "short-sighted":
        return states_TD
    # Logits are linear in the states: halfway between the student's and the teacher's, as later in training.
    return (states_TD + torch.from_numpy(data.hidden_TD[tokens_T]).float()) / 2


def _angle(full: Tensor, error: Tensor) -> float:
    """Between `full` and `full + error`, from the error's part across `full`: exact for small angles."""
    full, error = full.double(), error.double()
    along = (full * error).sum() / (full * full).sum()
    across = (error - along * full).norm()
    return float(torch.rad2deg(torch.atan2(across, (1 + along) * full.norm())))


def _chunks(num_tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, num_tokens)) for start in range(0, num_tokens, _CHUNK))
