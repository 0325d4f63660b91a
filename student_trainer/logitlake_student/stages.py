"""The four stages of the recipe, and what trains in each.

    init        projector only                                   the adaptor learns to show images
    d2d         language model and projector                     dense to dense
    d2s         feed-forward networks, experts, routers, projector   dense to sparse
    preference  the same as d2s

The vision tower never trains. In `d2s` and `preference` the feed-forward networks of the dense layers train
as well as the experts; attention, norms, embeddings and head stay as d2d left them. This is LLaVA-MoD's list
(its scripts train every parameter whose name contains `mlp.gate_proj`, `mlp.up_proj`, `mlp.down_proj` or the
router's name).
"""

from typing import Any, Literal, get_args

from torch import nn

from logitlake_shared.errors import ConfigError
from logitlake_student.models.parts import decoder_prefix, projector_prefixes

__all__ = ["STAGES", "Stage", "freeze_for_stage", "trainable_parameters"]

Stage = Literal["init", "d2d", "d2s", "preference"]

STAGES: tuple[Stage, ...] = get_args(Stage)


def trainable_parameters(model: Any, stage: Stage) -> list[tuple[str, nn.Parameter]]:
    """Names and tensors of the parameters that a stage trains, in the model's order; nothing is changed.

    A language model without images has no projector: then `init` has nothing to train.

    Raises:
        ConfigError: an unknown stage, or one that has nothing to train on this model.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage: expected one of {list(STAGES)}, got {stage!r}")
    projector = projector_prefixes(model)
    decoder = decoder_prefix(model)

    def trains(name: str) -> bool:
        if name.startswith(projector):
            return True
        if stage == "init":
            return False
        if stage == "d2d":
            return name.startswith((decoder, "lm_head."))
        return name.startswith(f"{decoder}layers.") and ".mlp." in name

    chosen = [(name, parameter) for name, parameter in model.named_parameters() if trains(name)]
    if not chosen:
        raise ConfigError(f"stage {stage}: a model of type {model.config.model_type!r} has nothing that it trains")
    return chosen


def freeze_for_stage(model: Any, stage: Stage) -> list[str]:
    """Sets `requires_grad` on every parameter as the stage wants it. Returns the names of those that train."""
    chosen = trainable_parameters(model, stage)
    model.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    return [name for name, _ in chosen]
