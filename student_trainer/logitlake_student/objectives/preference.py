"""Preference distillation: sums over pairs of the preference loss, the anchor and the likelihood of the chosen."""

from typing import Any

import torch
from torch import Tensor

from logitlake_student.config import PreferenceStage
from logitlake_student.data import Batch
from logitlake_student.losses.preference import (
    KtoBaseline,
    anchor_loss,
    image_loss,
    nll_loss,
    preference_loss,
    sequence_logprobs,
)
from logitlake_student.models.forward import hidden_response_rows
from logitlake_student.objectives.sums import StepTotals, Sums, count

__all__ = ["PreferenceObjective"]


class PreferenceObjective:
    """Implements `objectives.step.Objective`; an item is a pair.

    `reference` is the student as it was when the stage began, where its logprobs are what rewards are measured against.
    Logged: `preference`, `nll`, `margin`, `chosen_reward`, `rejected_reward`, `preferred` (pairs in the right order),
    and `image` where images are asked about.
    """

    def __init__(self, stage: PreferenceStage, vocab_size: int, reference: Any | None) -> None:
        self._stage, self._vocab_size, self._reference = stage, vocab_size, reference
        # Chosen, rejected, and where images are asked about, the chosen once more without them.
        self._num_sides = 3 if stage.image_weight else 2
        self.needs_survey = stage.loss == "kto_pair"

    def count(self, batch: Batch) -> Sums:
        """Pairs of the batch."""
        return {"items": count(len(batch["reference_logp_B"]) // self._num_sides, batch["reference_logp_B"])}

    def survey(self, student: Any, batch: Batch) -> Sums:
        """See `Objective.survey`: sums of the log-ratios, whose mean over all pairs is the baseline of `kto_pair`."""
        (chosen_P, rejected_P, *_), (reference_chosen_P, reference_rejected_P, *_), _ = self._logprobs(student, batch)
        return _log_ratio_sums(chosen_P - reference_chosen_P, rejected_P - reference_rejected_P)

    def __call__(self, student: Any, batch: Batch, totals: StepTotals) -> tuple[Tensor, Sums]:
        """See `Objective`."""
        stage = self._stage
        policy, reference, nll_P = self._logprobs(student, batch)
        (chosen_P, rejected_P), (reference_chosen_P, reference_rejected_P) = policy[:2], reference[:2]
        baseline = None
        if self.needs_survey:
            own = _log_ratio_sums(chosen_P - reference_chosen_P, rejected_P - reference_rejected_P)
            baseline = _baseline(totals.complete(own))
        losses = preference_loss(
            chosen_P,
            rejected_P,
            reference_chosen_P,
            reference_rejected_P,
            kind=stage.loss,
            beta=stage.beta,
            baseline=baseline,
        )
        loss_P = losses.losses_P + stage.nll_weight * nll_P
        if stage.anchor_weight:
            loss_P = loss_P + stage.anchor_weight * anchor_loss(chosen_P, reference_chosen_P, beta=stage.beta)
        images: Sums = {}
        if stage.image_weight:
            of_image_P = image_loss(chosen_P, policy[2], reference_chosen_P, reference[2], beta=stage.beta)
            of_image_P = of_image_P * batch["has_image_P"]
            loss_P = loss_P + stage.image_weight * of_image_P
            images["image"] = of_image_P.detach().sum()
        return loss_P.sum(), images | {
            "preference": losses.losses_P.detach().sum(),
            "nll": nll_P.detach().sum(),
            "margin": losses.margins_P.sum(),
            "chosen_reward": losses.chosen_rewards_P.sum(),
            "rejected_reward": losses.rejected_rewards_P.sum(),
            "preferred": (losses.margins_P > 0).float().sum(),
        }

    def _logprobs(self, student: Any, batch: Batch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """The student's and the reference's logprobs by side, and `nll_P` of the chosen responses."""
        length_B = batch["length_B"]
        policy_B = self._sequence_logprobs(student, batch)
        scale_B = 1 / length_B if self._stage.length_normalised else torch.ones_like(length_B)
        num = self._num_sides
        nll_P = nll_loss(policy_B.chunk(num)[0], length_B.chunk(num)[0])
        return (policy_B * scale_B).chunk(num), (self._reference_logprobs(batch) * scale_B).chunk(num), nll_P

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if self._stage.reference == "teacher":
            return batch["reference_logp_B"]
        if self._reference is None:
            return torch.zeros_like(batch["reference_logp_B"])
        with torch.no_grad():
            return self._sequence_logprobs(self._reference, batch)

    def _sequence_logprobs(self, model: Any, batch: Batch) -> Tensor:
        return sequence_logprobs(
            hidden_response_rows(model, batch),
            model.lm_head.weight[: self._vocab_size],
            batch["label_ids_R"],
            batch["sequence_R"],
            len(batch["length_B"]),
            self._stage.chunk_rows,
        )


def _log_ratio_sums(chosen_P: Tensor, rejected_P: Tensor) -> Sums:
    return {
        "chosen": chosen_P.detach().double().sum(),
        "rejected": rejected_P.detach().double().sum(),
        "pairs": torch.tensor(float(len(chosen_P)), dtype=torch.float64, device=chosen_P.device),
    }


def _baseline(surveyed: Sums) -> KtoBaseline:
    chosen, rejected = ((surveyed[name] / surveyed["pairs"]).float().clamp(min=0) for name in ("chosen", "rejected"))
    return KtoBaseline(chosen, rejected)
