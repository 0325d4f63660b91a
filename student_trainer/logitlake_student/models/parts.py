"""Where things are inside a student: one place that knows the attribute paths of transformers' classes.

A student is a `LlavaForConditionalGeneration` (vision tower, projector, language model, head) or a plain
causal language model (no tower, no projector). Everything else in this package asks here.
"""

from typing import Any

from torch import nn

__all__ = ["decoder", "decoder_prefix", "projector_prefix", "routers", "text_config"]

_ROUTER_PATHS = {"qwen3_moe": "mlp.gate"}
"""By text model type, where a sparse decoder layer keeps its router."""

_MULTIMODAL_TYPES = {"llava"}


def _is_multimodal(model: Any) -> bool:
    return model.config.model_type in _MULTIMODAL_TYPES


def text_config(model: Any) -> Any:
    """Configuration of the language model."""
    return model.config.text_config if _is_multimodal(model) else model.config


def decoder(model: Any) -> Any:
    """The language model without its head: embedding, layers, last norm."""
    return model.model.language_model if _is_multimodal(model) else model.model


def decoder_prefix(model: Any) -> str:
    """What the parameter names of the decoder begin with."""
    return "model.language_model." if _is_multimodal(model) else "model."


def projector_prefix(model: Any) -> str | None:
    """What the parameter names of the projector begin with; None for a model without images."""
    return "model.multi_modal_projector." if _is_multimodal(model) else None


def routers(model: Any) -> dict[int, nn.Module]:
    """The routers of the sparse decoder layers by layer index, in order. Empty for a dense model."""
    path = _ROUTER_PATHS.get(text_config(model).model_type)
    if path is None:
        return {}
    block, _, gate = path.rpartition(".")
    found = {}
    for index, layer in enumerate(decoder(model).layers):
        router = getattr(layer.get_submodule(block), gate, None)
        if router is not None:
            found[index] = router
    return found
