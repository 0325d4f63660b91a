"""What a student is made of."""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from logitlake_shared.config import StrictModel

__all__ = ["StudentConfig"]


class StudentConfig(StrictModel):
    """What the student is made of: a whole checkpoint, or a vision tower and a language model."""

    checkpoint: Path | None = None
    """a whole student (LLaVA, Qwen-VL, or a text-only language model): its folder, or `organisation/name` on the hub,
    with `@revision` if need be"""
    vision_tower: Path | None = None
    """a CLIP or SigLIP vision tower with its image processor: folder or name"""
    language_model: Path | None = None
    """a causal language model with tokenizer and chat template: folder or name"""
    vision_feature_layer: int = -2
    """hidden layer of the tower that the language model sees"""
    projector_seed: int = 0
    """seed of the fresh projector"""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        num_parts = (self.vision_tower is not None) + (self.language_model is not None)
        if num_parts != (2 if self.checkpoint is None else 0):
            raise ValueError("give either `checkpoint`, or both `vision_tower` and `language_model`")
        return self
