"""From a dense student to a sparse one that starts as the same function.

Every expert of a sparse layer is a copy of the dense layer's feed-forward network, and the weights of the
chosen experts sum to 1 (`norm_topk_prob`), so that whatever the fresh router chooses, the layer computes what
it computed before (LLaVA-MoD §3, after arXiv 2212.05055). Routing is dropless: transformers' experts take
every token they are given.

The result is a stock transformers class, saved and loaded without remote code. Which layers are sparse is
written as `mlp_only_layers` (the dense ones), since `decoder_sparse_step` cannot say "layers 0, 2, 4, …".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from logitlake_shared.errors import ConfigError
from logitlake_student.models.parts import decoder_prefix, routers
from logitlake_student.models.routing import compute_routers_in_float32

__all__ = ["LayerChoice", "ParameterReport", "parameter_report", "sparse_layers", "upcycle"]

LayerChoice = Literal["every_other", "all", "first_half", "second_half"]


@dataclass(frozen=True)
class _Family:
    """How one dense language model becomes its sparse sibling. A new pair is a new entry of `_FAMILIES`."""

    model_type: str
    """Of the sparse sibling."""
    architecture: str
    """Its causal language model class, which tools read from `text_config.architectures`."""
    settings: Callable[[Any, int, int, list[int]], dict[str, Any]]
    """(dense text config, num_experts, num_experts_per_tok, dense layers) -> fields that the sibling adds."""
    refuse: Callable[[Any], str | None]
    """(dense text config) -> what the sibling cannot do, or None."""
    dropped: frozenset[str]
    """Fields of the dense config that mean nothing to the sibling."""


def _qwen3_moe_settings(
    config: Any, num_experts: int, num_experts_per_tok: int, dense_layers: list[int]
) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers,
    }


def _qwen3_moe_refusal(config: Any) -> str | None:
    return "sliding-window attention" if config.use_sliding_window else None


_FAMILIES = {
    "qwen3": _Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        settings=_qwen3_moe_settings,
        refuse=_qwen3_moe_refusal,
        dropped=frozenset({"layer_types", "max_window_layers", "model_type", "architectures"}),
    )
}
"""By the model type of the dense language model."""


def sparse_layers(layers: LayerChoice | Sequence[int], num_layers: int) -> list[int]:
    """Indices of the layers that become sparse, in order.

    `every_other` is LLaVA-MoD's choice and begins at 0. For an odd number of layers, the middle one belongs
    to the second half.

    Raises:
        ConfigError: an unknown choice, no layer, a repeated index or one that does not exist.
    """
    choices = {
        "every_other": range(0, num_layers, 2),
        "all": range(num_layers),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    if isinstance(layers, str):
        if layers not in choices:
            raise ConfigError(f"sparse layers: expected one of {sorted(choices)} or indices, got {layers!r}")
        return list(choices[layers])
    indices = sorted(layers)
    if not indices or len(set(indices)) != len(indices) or not all(0 <= i < num_layers for i in indices):
        raise ConfigError(
            f"sparse layers: expected distinct indices of a model of {num_layers} layers, got {list(layers)}"
        )
    return indices


def upcycle(
    llava_dense: Any,
    num_experts: int,
    num_experts_per_tok: int,
    layers: LayerChoice | Sequence[int] = "every_other",
    *,
    router_seed: int,
) -> Any:
    """A sparse `LlavaForConditionalGeneration` that computes what the dense one computes.

    Args:
        llava_dense: a `LlavaForConditionalGeneration`; it is not changed, and shares no memory with the result.
        num_experts: experts of each sparse layer, at least 2.
        num_experts_per_tok: experts that each token is sent to.
        layers: which layers become sparse.
        router_seed: of the routers' weights, normal with the config's `initializer_range`. Never the global seed.

    Returns:
        The sparse model, of the dense one's type and device, in training or evaluation mode as the dense one,
        its routers computed in float32.

    Raises:
        ConfigError: a language model without a sparse sibling here, or numbers that do not fit together.
    """
    dense_config = llava_dense.config.text_config
    family = _family_of(dense_config)
    if not 1 <= num_experts_per_tok <= num_experts or num_experts < 2:
        raise ConfigError(
            "upcycling: expected at least 2 experts and 1 <= num_experts_per_tok <= num_experts, got "
            f"num_experts={num_experts}, num_experts_per_tok={num_experts_per_tok}"
        )
    sparse = sparse_layers(layers, dense_config.num_hidden_layers)
    dense = [i for i in range(dense_config.num_hidden_layers) if i not in sparse]
    settings = family.settings(dense_config, num_experts, num_experts_per_tok, dense)
    model = _empty_model(llava_dense, _sparse_config(llava_dense.config, family, settings))

    weights = dict(llava_dense.state_dict())
    std = dense_config.initializer_range
    generator = torch.Generator().manual_seed(router_seed)
    for index in sparse:
        prefix = f"{decoder_prefix(llava_dense)}layers.{index}.mlp."
        gate, up, down = (weights.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        weights[f"{prefix}experts.gate_up_proj"] = _copies(torch.cat([gate, up]), num_experts)
        weights[f"{prefix}experts.down_proj"] = _copies(down, num_experts)
        router_EH = torch.randn(num_experts, dense_config.hidden_size, generator=generator) * std
        weights[f"{prefix}gate.weight"] = router_EH.to(gate)
    model.load_state_dict(weights, strict=True)
    model.tie_weights()
    compute_routers_in_float32(model)
    return model.train(llava_dense.training)


def _family_of(dense_config: Any) -> _Family:
    family = _FAMILIES.get(dense_config.model_type)
    if family is None:
        raise ConfigError(
            f"upcycling: a language model of type {dense_config.model_type!r} has no sparse sibling here; "
            f"expected one of {sorted(_FAMILIES)}"
        )
    reason = family.refuse(dense_config)
    if reason is not None:
        raise ConfigError(f"upcycling: {family.model_type} cannot do what this dense model uses: {reason}")
    return family


def _sparse_config(llava_config: Any, family: _Family, settings: dict[str, Any]) -> Any:
    """The Llava config with its text config replaced by the sparse sibling's."""
    from transformers import CONFIG_MAPPING, LlavaConfig

    text = {key: v for key, v in llava_config.text_config.to_dict().items() if key not in family.dropped}
    text |= settings | {"architectures": [family.architecture]}
    config = llava_config.to_dict()
    config["text_config"] = CONFIG_MAPPING[family.model_type](**text)
    config["vision_config"] = type(llava_config.vision_config).from_dict(llava_config.vision_config.to_dict())
    for field in ("model_type", "transformers_version"):
        config.pop(field)
    return LlavaConfig(**config)


def _empty_model(like: Any, config: Any) -> Any:
    """A model of a config without initial values, of the type and device of another."""
    from transformers import LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = LlavaForConditionalGeneration(config)
    model.generation_config = like.generation_config
    return model.to(device=like.device, dtype=like.dtype)


def _copies(weight: Tensor, num_experts: int) -> Tensor:
    """[O, I] -> [E, O, I], every expert the same."""
    return weight.unsqueeze(0).expand(num_experts, -1, -1)


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of parameters of a student, vision tower and projector included; tied ones count once."""

    params_total: int
    params_active: int
    """Those that one token meets: of the experts, only `num_experts_per_tok` of `num_experts`."""
    params_trainable: int


def parameter_report(model: Any) -> ParameterReport:
    """Counts a dense or sparse student as it stands, freezing included."""
    parameters = list(model.parameters())  # yields a shared tensor once
    idle = 0
    for router in routers(model):
        experts = model.get_submodule(f"{decoder_prefix(model)}layers.{router}.mlp.experts")
        config = model.config.get_text_config()
        share = config.num_experts - config.num_experts_per_tok
        idle += sum(p.numel() for p in experts.parameters()) * share // config.num_experts
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ParameterReport(total, total - idle, trainable)
