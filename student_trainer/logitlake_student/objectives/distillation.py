"""Distillation: sums over response tokens of the divergence from the teacher and of the cross-entropy."""

from typing import Any

from torch import Tensor

from logitlake_student.config import D2DStage, D2SStage, InitStage
from logitlake_student.data import Batch
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.models.forward import hidden_response_rows
from logitlake_student.objectives.sums import Complete, Sums

__all__ = ["DistillationObjective"]


class DistillationObjective:
    """Implements `objectives.step.Objective`; an item is a response token. Logged: `kl` and `ce`, in nats."""

    needs_survey = False

    def __init__(self, stage: InitStage | D2DStage | D2SStage, vocab_size: int) -> None:
        self._stage, self._vocab_size = stage, vocab_size

    def num_items(self, batch: Batch) -> int:
        """Response tokens of the batch."""
        return len(batch["label_ids_R"])

    def survey(self, student: Any, batch: Batch) -> Sums:
        """See `Objective.survey`: there is nothing to compare with."""
        # The student's forward pass all the same: its routers are overheard.
        hidden_response_rows(student, batch)
        return {}

    def __call__(self, student: Any, batch: Batch, complete: Complete) -> tuple[Tensor, Sums]:
        """See `Objective`."""
        del complete
        stage = self._stage
        teacher = TeacherBatch(
            topk_ids_RK=batch["topk_ids_RK"],
            topk_logprobs_RK=batch["topk_logprobs_RK"],
            log_tail_mass_R=batch["log_tail_mass_R"],
            label_ids_R=batch["label_ids_R"],
            log_bound_R=batch["log_bound_R"] if stage.tail == "bounded" else None,
        )
        loss_sum, sums = distillation_loss(
            hidden_response_rows(student, batch),
            student.lm_head.weight[: self._vocab_size],
            teacher,
            kl_weight=stage.kl_weight,
            ce_weight=stage.ce_weight,
            chunk_rows=stage.chunk_rows,
        )
        return loss_sum, {"kl": sums.kl_sum, "ce": sums.ce_sum}
