"""What the student is trained on: distillation from the cached top-k, preference, expert balance.

Fast paths are in `distillation` (on the terms of `divergences`), `preference` and `balance`; their slow twins in
`reference`.
"""

from logitlake_student.losses.balance import (
    ExpertCounts,
    LayerRouting,
    count_experts,
    load_balancing_loss,
    router_entropies,
    router_z_loss,
    routing_statistics,
)
from logitlake_student.losses.distillation import LossSums, TeacherBatch, distillation_loss
from logitlake_student.losses.preference import (
    KtoBaseline,
    PreferenceKind,
    PreferenceLosses,
    anchor_loss,
    image_loss,
    kto_baseline,
    nll_loss,
    preference_loss,
    sequence_logprobs,
)

__all__ = [
    "ExpertCounts",
    "KtoBaseline",
    "LayerRouting",
    "LossSums",
    "PreferenceKind",
    "PreferenceLosses",
    "TeacherBatch",
    "anchor_loss",
    "count_experts",
    "distillation_loss",
    "image_loss",
    "kto_baseline",
    "load_balancing_loss",
    "nll_loss",
    "preference_loss",
    "router_entropies",
    "router_z_loss",
    "routing_statistics",
    "sequence_logprobs",
]
