"""Distillation: sums over response tokens of the divergence from the teacher and of the cross-entropy."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from logitlake_schemas import CaptureSpec, SampledPolicy
from logitlake_shared.errors import ConfigError
from logitlake_student.config import D2DStage, D2SStage, InitStage
from logitlake_student.config.targets import DivergenceConfig, ForwardKl, Jsd, SkewKl, SkewReverseKl, VisualAdvantage
from logitlake_student.data import Batch
from logitlake_student.losses import divergences
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.losses.divergences import Divergence
from logitlake_student.models.forward import hidden_response_rows
from logitlake_student.objectives.sums import StepTotals, Sums, count

__all__ = ["DistillationObjective", "check_targets_fit"]


def check_targets_fit(stage: InitStage | D2DStage | D2SStage, spec: CaptureSpec) -> None:
    """Raises `ConfigError` where the lake's rows cannot give what the stage compares by."""
    if not stage.divergence_weight:
        return
    where, kind, codec = f"stages.{stage.type}", stage.divergence.type, spec.codec
    if isinstance(codec, SampledPolicy):
        if kind != "forward_kl" or stage.temperature != 1:
            raise ConfigError(
                f"{where}: this lake holds draws from the teacher, whose shares estimate only the forward KL at "
                f"temperature 1 without bias; got {kind} at {stage.temperature}. Capture a top-k for it"
            )
    elif stage.temperature not in (1, *codec.temperatures):
        raise ConfigError(
            f"{where}.temperature: this lake holds the tail's mass at {sorted({1, *codec.temperatures})}, got "
            f"{stage.temperature}; capture with codec.temperatures=[{stage.temperature}]"
        )
    if isinstance(stage.token_weights, VisualAdvantage) and not spec.no_image_pass:
        raise ConfigError(
            f"{where}.token_weights: `visual_advantage` needs the teacher's logprobs without the image, which this "
            "lake does not hold; capture with no_image_pass=true"
        )


class DistillationObjective:
    """Implements `objectives.step.Objective`; an item is a response token. Logged: the divergence by its name, `ce`,
    and `cached_mass`, the teacher's mass on the cached tokens."""

    needs_survey = False

    def __init__(self, stage: InitStage | D2DStage | D2SStage, vocab_size: int) -> None:
        self._stage, self._vocab_size = stage, vocab_size
        self._divergence = _divergence(stage.divergence)
        self._bounds_tail = isinstance(stage.divergence, ForwardKl) and stage.divergence.tail == "bounded"

    def count(self, batch: Batch) -> Sums:
        """Response tokens of the batch, and the sum of their weights."""
        weight_R = batch["weight_R"]
        return {"items": count(len(weight_R), weight_R), "weight": weight_R.double().sum()}

    def survey(self, student: Any, batch: Batch) -> Sums:
        """See `Objective.survey`: there is nothing to compare with."""
        # The student's forward pass all the same: its routers are overheard.
        hidden_response_rows(student, batch)
        return {}

    def __call__(self, student: Any, batch: Batch, totals: StepTotals) -> tuple[Tensor, Sums]:
        """See `Objective`."""
        stage = self._stage
        # What is divided by the number of tokens afterwards becomes a mean over weights.
        mean_weight = totals.counted["weight"] / totals.num_items
        teacher = TeacherBatch(
            topk_ids_RK=batch["topk_ids_RK"],
            topk_logprobs_RK=batch["topk_logprobs_RK"],
            log_tail_mass_R=batch["log_tail_mass_R"],
            label_ids_R=batch["label_ids_R"],
            log_bound_R=batch["log_bound_R"] if self._bounds_tail else None,
            weight_R=None if stage.token_weights is None else (batch["weight_R"] / mean_weight).float(),
        )
        loss_sum, sums = distillation_loss(
            hidden_response_rows(student, batch),
            student.lm_head.weight[: self._vocab_size],
            teacher,
            divergence=self._divergence,
            divergence_weight=stage.divergence_weight,
            ce_weight=stage.ce_weight,
            temperature=stage.temperature,
            chunk_rows=stage.chunk_rows,
        )
        cached_mass_R = -torch.expm1(teacher.log_tail_mass_R)
        return loss_sum, {
            stage.divergence.type: sums.divergence_sum,
            "ce": sums.ce_sum,
            "cached_mass": cached_mass_R.sum(),
        }


def _divergence(config: DivergenceConfig) -> Divergence:
    if isinstance(config, Jsd):
        return partial(divergences.jsd, beta=config.beta)
    if isinstance(config, SkewKl):
        return partial(divergences.skew_kl, alpha=config.alpha)
    if isinstance(config, SkewReverseKl):
        return partial(divergences.skew_reverse_kl, alpha=config.alpha)
    of_one_kind: dict[str, Divergence] = {
        "forward_kl": divergences.forward_kl,
        "reverse_kl": divergences.reverse_kl,
        "tvd": divergences.tvd,
        "truncated_kl": divergences.truncated_kl,
        "renormalised_kl": divergences.renormalised_kl,
    }
    return of_one_kind[config.type]
