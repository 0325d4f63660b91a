"""How many parameters a student has, meets and trains, in all and part by part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logitlake_student.models.parts import PARTS, part_of, text_config

__all__ = ["ParameterReport", "PartReport", "parameter_report"]


@dataclass(frozen=True)
class PartReport:
    """Numbers of parameters of one part."""

    total: int
    active: int
    """those that one token meets: of the routed experts, only `num_experts_per_tok` of `num_experts`"""
    trainable: int


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of parameters of a student, vision tower and projector included; tied ones count once."""

    parts: Mapping[str, PartReport]
    """by the names in `parts.PARTS`, without those that the student does not have"""

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """Of all parts, those that one token meets."""
        return sum(part.active for part in self.parts.values())

    @property
    def trainable(self) -> int:
        """Of all parts, those that the stage trains."""
        return sum(part.trainable for part in self.parts.values())


def parameter_report(model: Any) -> ParameterReport:
    """Counts a dense or sparse student as it stands, freezing included."""
    config = text_config(model)
    counts = {part: [0, 0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():  # yields a shared tensor once
        size = parameter.numel()
        is_routed = ".mlp.experts." in name
        met = size * config.num_experts_per_tok // config.num_experts if is_routed else size
        count = counts[part_of(model, name)]
        for place, number in enumerate((size, met, size * parameter.requires_grad)):
            count[place] += number
    return ParameterReport({part: PartReport(*count) for part, count in counts.items() if count[0]})
