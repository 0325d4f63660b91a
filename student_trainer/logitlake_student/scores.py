"""What a student makes of a lake's samples, token by token, for people who want to see where it differs.

The file (`logitlake_shared.student_scores`) is what a viewer shows beside the teacher. `forward_kl` is the quantity
that distillation lowers, by the loss that trains the student; its own figures are over its whole vocabulary.

Axes: R response rows, C rows of one chunk, T tokens of a sample, K entries, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from logitlake_schemas import ScoresRecord
from logitlake_shared.errors import TrainingError
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rows import LakeSample
from logitlake_shared.student_scores import ScoredSample, ScoresWriter, write_scores
from logitlake_student.answers import Examinee, forced_batches
from logitlake_student.losses.chunked import ChunkedHead
from logitlake_student.losses.distillation import TeacherBatch, row_forward_kl
from logitlake_student.models.forward import hidden_response_rows

__all__ = ["RowScores", "row_scores", "score_samples"]

# Response rows whose logits are alive at one time.
_CHUNK_ROWS = 1024
Advance = Callable[[int], None]


@dataclass(frozen=True)
class RowScores:
    """A student on R response rows, float32 and int64 on its device; see `ScoredSample`."""

    label_logprob_R: Tensor
    label_rank_R: Tensor
    entropy_R: Tensor
    forward_kl_R: Tensor
    topk_ids_RK: Tensor
    topk_logprobs_RK: Tensor


def row_scores(hidden_RH: Tensor, weight_VH: Tensor, teacher: TeacherBatch, *, top: int) -> RowScores:
    """Scores of the rows whose final hidden states these are. `top` is at most V."""
    head = ChunkedHead(hidden_RH, weight_VH, chunk_rows=_CHUNK_ROWS, grad_hidden=False, grad_weight=False)
    chunks = []
    for rows in head.chunks():
        logits_CV = head.centred_logits(rows)
        logprobs_CV = torch.log_softmax(logits_CV, dim=-1)
        label_C1 = logprobs_CV.gather(1, teacher.label_ids_R[rows, None])
        topk = logprobs_CV.topk(top, dim=-1)
        chunks.append(
            (
                label_C1.squeeze(1),
                (logprobs_CV > label_C1).sum(dim=-1) + 1,
                torch.special.entr(logprobs_CV.exp()).sum(dim=-1),
                row_forward_kl(logits_CV, teacher, rows),
                topk.indices,
                topk.values,
            )
        )
    return RowScores(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def score_samples(
    examinee: Examinee, dataset: LakeDataset, out: Path, record: ScoresRecord, *, batch_size: int, advance: Advance
) -> None:
    """Scores every sample of `dataset` into the file `out`; `advance(n)` is called after each batch of n.

    Raises `FingerprintMismatchError`, `TrainingError` for a sample that the student cannot take or whose logits are not
    finite, `OSError`.
    """
    with write_scores(out, record) as scores:
        _score(examinee, dataset, scores, record, batch_size, advance)


@torch.inference_mode()
def _score(
    examinee: Examinee,
    dataset: LakeDataset,
    scores: ScoresWriter,
    record: ScoresRecord,
    batch_size: int,
    advance: Advance,
) -> None:
    weight_VH = examinee.model.lm_head.weight[: examinee.renderer.vocab_size]
    for samples, batch, teacher in forced_batches(examinee, dataset, batch_size=batch_size):
        rows = row_scores(hidden_response_rows(examinee.model, batch), weight_VH, teacher, top=record.top)
        _check_finite(rows, samples, record)
        stops = np.cumsum([len(sample.response_ids) for sample in samples])[:-1]
        figures = (np.split(values_R.cpu().numpy(), stops) for values_R in vars(rows).values())
        scores.add(
            [
                ScoredSample(sample.sample_id, sample.task, *its_figures)
                for sample, *its_figures in zip(samples, *figures, strict=True)
            ]
        )
        advance(len(samples))


def _check_finite(rows: RowScores, samples: Sequence[LakeSample], record: ScoresRecord) -> None:
    """No comparison with NaN is true, so a token of which nothing is known would be the student's first choice."""
    bad_R = ~(torch.isfinite(rows.label_logprob_R) & torch.isfinite(rows.forward_kl_R))
    if num_bad := int(bad_R.sum()):
        stops = np.cumsum([len(sample.response_ids) for sample in samples])
        first = samples[int(np.searchsorted(stops, int(bad_R.nonzero()[0]), side="right"))]
        raise TrainingError(
            f"sample {first.sample_id}: the logits of {record.student} are not finite in {record.dtype}, at {num_bad} "
            f"of {len(bad_R)} tokens in its batch; score it in float32, or train it again"
        )
