"""One forward pass of training: a student and what it is trained for, as one module.

Data parallel wrappers synchronise what passes through the `forward` of the module that they wrap. Our losses call the
decoder inside the student and the head's weight by itself, so both happen inside this module's forward.

Some terms compare with all of the global batch: expert frequencies, the baseline of `kto_pair`. Where a rank has one
micro-batch a step, the ranks exchange these sums in the forward pass. Where it has several, the sums must be known
before the first of them is learned from, and the step begins with a survey: a pass without gradients over each.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from logitlake_student.data import Batch
from logitlake_student.losses.balance import ExpertCounts
from logitlake_student.models.routing import RouterRecorder, limit_experts
from logitlake_student.objectives.routing import RoutingObjective, RoutingSums
from logitlake_student.objectives.sums import StepTotals, Sums

__all__ = ["Objective", "StepResult", "StudentStep"]


class Objective(Protocol):
    """What a kind of stage minimises."""

    needs_survey: bool
    """whether it compares with sums over the global batch"""

    def count(self, batch: Batch) -> Sums:
        """`items`: what the loss of a step is divided by, summed over micro-batches and ranks; and what else the
        objective wants to know the sum of before the first forward pass. All 0-d."""

    def survey(self, student: Any, batch: Batch) -> Sums:
        """The micro-batch's part of the sums that it compares with."""

    def __call__(self, student: Any, batch: Batch, totals: StepTotals) -> tuple[Tensor, Sums]:
        """The loss and, detached, what is logged: sums over the items of the micro-batch."""


@dataclass(frozen=True)
class StepResult:
    """What a micro-batch gave."""

    loss: Tensor
    """its share of the step's loss, 0-d, with the gradient"""
    sums: Sums
    """its shares of what is logged, detached"""
    routing: RoutingSums | None
    """what its routers did, where they are trained"""


class StudentStep(nn.Module):
    """A student, its objective and what is asked of its routers (None where they are not trained)."""

    def __init__(self, student: Any, objective: Objective, routing: RoutingObjective | None) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.routing = routing
        self.step_counts: ExpertCounts | None = None
        """of the global batch, once a forward pass has been"""

    @property
    def needs_survey(self) -> bool:
        """Whether a step of several micro-batches begins with a survey."""
        return self.objective.needs_survey or self.routing is not None

    def forward(self, batch: Batch, totals: StepTotals | None) -> StepResult | Sums:
        """A micro-batch's share of the step; without `totals` its part of the survey, and no gradients are wanted."""
        # Entered by hand: the routers are heard during the student's forward pass only, not during backward.
        mask_N = batch["attention_mask"].flatten().bool()
        recorder = RouterRecorder(self.student) if self.routing is not None else None
        if self.routing is not None:
            limit_experts(self.student, self.routing.capacity(mask_N))
        with recorder or contextlib.nullcontext():
            if totals is None:
                surveyed = self.objective.survey(self.student, batch)
            else:
                loss_sum, sums = self.objective(self.student, batch, totals)
        if totals is None:
            if self.routing is None or recorder is None:
                return surveyed
            return surveyed | _as_sums(self.routing.count(recorder, mask_N))
        loss = loss_sum / totals.num_items
        sums = {name: value / totals.num_items for name, value in sums.items()}
        told = None
        if self.routing is not None and recorder is not None:
            told = self.routing.told(recorder, mask_N)
            self.step_counts = _as_counts(totals.complete(_as_sums(told.counts)))
            routing_loss, balance = self.routing(recorder.logits(), mask_N, self.step_counts)
            loss = loss + routing_loss
            sums["balance"] = balance
        return StepResult(loss, sums | {"loss": loss.detach()}, told)


def _as_sums(counts: ExpertCounts) -> Sums:
    return {"assigned_LE": counts.assigned_LE, "num_tokens": counts.num_tokens}


def _as_counts(sums: Sums) -> ExpertCounts:
    return ExpertCounts(sums["assigned_LE"], sums["num_tokens"])
