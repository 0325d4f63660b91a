"""What a distillation stage compares student and teacher by, and which tokens count more.

Alternatives on `type`; `logitlake_student.losses.divergences` has the formulas.
"""

from typing import Annotated, Literal

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["DivergenceConfig", "ForwardKl", "TokenWeights"]


class ForwardKl(StrictModel):
    """KL(teacher‖student)."""

    type: Literal["forward_kl"] = "forward_kl"
    """which divergence"""
    tail: Literal["bounded", "bucket"] = "bounded"
    """what it makes of the mass outside the cached entries: `bucket` compares it as one class, as every other
    divergence does, `bounded` also uses that no token in it is more probable than the least cached one or the codec's
    floor"""


class ReverseKl(StrictModel):
    """KL(student‖teacher): the student keeps to what the teacher finds likely."""

    type: Literal["reverse_kl"]
    """which divergence"""


class Jsd(StrictModel):
    """The generalised Jensen-Shannon divergence (GKD)."""

    type: Literal["jsd"]
    """which divergence"""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """share of the teacher in the mixture that both are compared with"""


class SkewKl(StrictModel):
    """KL(teacher‖a mixture of both) (DistiLLM)."""

    type: Literal["skew_kl"]
    """which divergence"""
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """share of the teacher in the mixture"""


class SkewReverseKl(StrictModel):
    """KL(student‖a mixture of both) (DistiLLM)."""

    type: Literal["skew_reverse_kl"]
    """which divergence"""
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """share of the student in the mixture"""


class TotalVariation(StrictModel):
    """Half the sum of |p - q|."""

    type: Literal["tvd"]
    """which divergence"""


class TruncatedKl(StrictModel):
    """The cached tokens' terms of the forward KL alone: biased, here to be compared with (docs/decisions/0004)."""

    type: Literal["truncated_kl"]
    """which divergence"""


class RenormalisedKl(StrictModel):
    """The forward KL as if there were only the cached tokens: biased, here to be compared with."""

    type: Literal["renormalised_kl"]
    """which divergence"""


DivergenceConfig = Annotated[
    ForwardKl | ReverseKl | Jsd | SkewKl | SkewReverseKl | TotalVariation | TruncatedKl | RenormalisedKl,
    Field(discriminator="type"),
]


class VisualAdvantage(StrictModel):
    """What the image says counts more: 1 + strength x the logprob that the label loses without the image."""

    type: Literal["visual_advantage"]
    """how tokens are weighed in the divergence"""
    strength: float = Field(default=1.0, gt=0)
    """weight of a nat of advantage; negative advantage counts as none"""
    max_advantage: float = Field(default=5.0, gt=0)
    """nats above which advantage counts no more"""


class EntropyWeights(StrictModel):
    """What the teacher is unsure of counts more: 1 + strength x its entropy."""

    type: Literal["entropy"]
    """how tokens are weighed in the divergence"""
    strength: float = Field(default=1.0, gt=0)
    """weight of a nat of entropy"""


TokenWeights = Annotated[VisualAdvantage | EntropyWeights, Field(discriminator="type")]
