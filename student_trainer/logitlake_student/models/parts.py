"""Where things are inside a student: one place that knows the attribute paths of transformers' classes.

A student is a `LlavaForConditionalGeneration` (vision tower, projector, language model, head), a Qwen-VL (whose
projector are the mergers of its vision tower) or a plain causal language model (no tower, no projector). Everything
else in this package asks here.

Kinds that nobody looked at are refused: their paths may differ, and so may their arithmetic. Losses multiply the final
hidden states by the head's matrix; a model that caps or scales its logits (Gemma, Granite, Cohere) would be another.
"""

from typing import Any

from torch import nn

from logitlake_shared.errors import ConfigError

__all__ = [
    "LANGUAGE_MODELS",
    "PARTS",
    "decoder",
    "decoder_prefix",
    "language_config",
    "part_of",
    "projector_parameters",
    "projector_prefixes",
    "require_known",
    "routers",
    "text_config",
    "vision_parameters",
]

_ROUTER_PATHS = dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text"), "mlp.gate")
"""By text model type, where a sparse decoder layer keeps its router."""

_QWEN_MERGERS = ("model.visual.merger.", "model.visual.deepstack_merger_list.")

_PROJECTORS = {
    "llava": ("model.multi_modal_projector.",),
    "qwen2_vl": _QWEN_MERGERS,
    "qwen2_5_vl": _QWEN_MERGERS,
    "qwen3_vl": _QWEN_MERGERS,
    "qwen3_vl_moe": _QWEN_MERGERS,
}
"""By model type of the whole: what the parameter names of the projector begin with."""

LLAVA_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model"})
"""Model types of the towers that a LLaVA sees with; all images become as many tokens."""

LANGUAGE_MODELS = frozenset({"llama", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
"""Model types of the language models that stand alone or in a LLaVA."""


def require_known(config: Any, where: object) -> None:
    """Raises `ConfigError` for a configuration of a kind that is not listed above; `where` is its place."""
    parts = [("a model", config, LANGUAGE_MODELS | _PROJECTORS.keys())]
    if config.model_type == "llava":
        parts.append(("a LLaVA with a vision tower", config.vision_config, LLAVA_TOWERS))
        parts.append(("a LLaVA with a language model", config.text_config, LANGUAGE_MODELS))
    for what, part, known in parts:
        if part.model_type not in known:
            raise ConfigError(f"{where}: expected {what} of type {', '.join(sorted(known))}; got {part.model_type!r}")


def _is_multimodal(model: Any) -> bool:
    return model.config.model_type in _PROJECTORS


def language_config(config: Any) -> Any:
    """The part of a configuration that is the language model's: the whole where there is nothing else."""
    return config.text_config if config.model_type in _PROJECTORS else config


def text_config(model: Any) -> Any:
    """Configuration of the language model."""
    return language_config(model.config)


def decoder(model: Any) -> Any:
    """The language model without its head: embedding, layers, last norm."""
    return model.model.language_model if _is_multimodal(model) else model.model


def decoder_prefix(model: Any) -> str:
    """What the parameter names of the decoder begin with."""
    return "model.language_model." if _is_multimodal(model) else "model."


def projector_prefixes(model: Any) -> tuple[str, ...]:
    """What the parameter names of the projector begin with; nothing for a model without images."""
    return _PROJECTORS.get(model.config.model_type, ())


def vision_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters of the vision tower; none of a model without images."""
    return [parameter for name, parameter in model.named_parameters() if part_of(model, name) == "vision tower"]


def projector_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters of the projector; none of a model without images."""
    return [parameter for name, parameter in model.named_parameters() if part_of(model, name) == "projector"]


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


PARTS = ("vision tower", "projector", "embeddings", "attention", "dense FFN", "experts", "routers", "norms", "head")
"""What the parameters of a student belong to."""


def part_of(model: Any, name: str) -> str:
    """The one of `PARTS` that the parameter of this name belongs to. A tied head goes by the embedding's name."""
    if name.startswith(projector_prefixes(model)):
        return "projector"
    if name.startswith("lm_head."):
        return "head"
    prefix = decoder_prefix(model)
    if not name.startswith(prefix):
        return "vision tower"
    inside = name.removeprefix(prefix)
    if inside.startswith("embed_tokens."):
        return "embeddings"
    if ".self_attn." in inside:
        return "attention"
    if ".mlp.gate." in inside:
        return "routers"
    if ".mlp.experts." in inside or ".mlp.shared_expert" in inside:
        return "experts"
    return "dense FFN" if ".mlp." in inside else "norms"
