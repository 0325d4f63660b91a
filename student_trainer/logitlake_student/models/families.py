"""Which dense language model becomes which sparse one: the one table, and what each sibling cannot do.

A new pair is a new entry of `FAMILIES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logitlake_shared.errors import ConfigError

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """How one dense language model becomes its sparse sibling."""

    text_type: str
    """model type of the sparse language model"""
    architecture: str
    """its causal language model class, which tools read from `text_config.architectures`"""
    dropped: frozenset[str]
    """fields of the dense configuration that mean nothing to the sibling"""
    unsupported: Mapping[str, str]
    """fields of the dense configuration that must be off, and what they switch on"""
    interleaves: bool = True
    """whether dense and sparse layers may stand in one stack"""
    shares: bool = False
    """whether a sparse layer has an expert that every token sees"""
    whole_type: str | None = None
    """model type of the whole where the sibling has one of its own; else the whole stays what it is"""
    ffn_size: str = "moe_intermediate_size"
    """field of an expert's inner size"""


_NO_WINDOW = {"use_sliding_window": "sliding-window attention"}
_OWN = frozenset({"model_type", "architectures"})

FAMILIES = {
    "qwen2": Family(
        text_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        dropped=_OWN | {"layer_types", "max_window_layers"},
        unsupported=_NO_WINDOW,
        shares=True,
    ),
    "qwen3": Family(
        text_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        dropped=_OWN | {"layer_types", "max_window_layers"},
        unsupported=_NO_WINDOW,
    ),
    "llama": Family(
        text_type="mixtral",
        architecture="MixtralForCausalLM",
        dropped=_OWN | {"pretraining_tp", "attention_bias", "mlp_bias"},
        unsupported={"attention_bias": "biases in its attention", "mlp_bias": "biases in its feed-forward networks"},
        interleaves=False,
        ffn_size="intermediate_size",
    ),
    "qwen3_vl_text": Family(
        text_type="qwen3_vl_moe_text",
        architecture="Qwen3VLMoeForConditionalGeneration",
        dropped=_OWN,
        unsupported={},
        whole_type="qwen3_vl_moe",
    ),
}
"""By the model type of the dense language model."""


def family_of(dense_text_config: Any) -> Family:
    """The entry for a dense language model. Raises `ConfigError` where there is none, or it cannot do the same."""
    family = FAMILIES.get(dense_text_config.model_type)
    if family is None:
        raise ConfigError(
            f"upcycling: a language model of type {dense_text_config.model_type!r} has no sparse sibling here; "
            f"expected one of {sorted(FAMILIES)}"
        )
    for field, meaning in family.unsupported.items():
        if getattr(dense_text_config, field, False):
            raise ConfigError(f"upcycling: {family.text_type} cannot do what this dense model uses: {meaning}")
    return family
