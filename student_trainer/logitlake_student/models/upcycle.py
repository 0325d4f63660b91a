"""From a dense student to a sparse one that starts as the same function.

Every expert of a sparse layer is a copy of the dense layer's feed-forward network, and the weights of the
chosen experts sum to 1, so that whatever the fresh router chooses, the layer computes what it computed before
(LLaVA-MoD §3, after arXiv 2212.05055). Routing is dropless: transformers' experts take every token they are given.

An expert that every token sees (`shared_expert`, Qwen2-MoE) starts as the same network behind a gate at sigmoid(0) =
1/2, and the other experts give half of what they gave. Without it that architecture still has one, of eight units that
give nothing at first.

The result is a stock transformers class, saved and loaded without remote code. Which layers are sparse is
written as `mlp_only_layers` (the dense ones), since `decoder_sparse_step` cannot say "layers 0, 2, 4, …".

Axes: E experts, H hidden, F inner size of a feed-forward network.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from logitlake_shared.errors import ConfigError
from logitlake_student.models.families import Family, family_of
from logitlake_student.models.parts import decoder_prefix, text_config
from logitlake_student.models.routing import compute_routers_in_float32

__all__ = ["LayerChoice", "sparse_layers", "upcycle"]

LayerChoice = Literal["every_other", "all", "first_half", "second_half"]

# Units of a shared expert that nobody asked for: the fewest that matrix kernels like.
_SMALLEST_SHARED = 8


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
    dense: Any,
    num_experts: int,
    num_experts_per_tok: int,
    layers: LayerChoice | Sequence[int] = "every_other",
    *,
    router_seed: int,
    shared_expert: bool = False,
    expert_noise: float = 0.0,
) -> Any:
    """A sparse student that computes what the dense one computes.

    Args:
        dense: a LLaVA, a Qwen3-VL or a causal language model; it is not changed, and shares no memory with the result.
        num_experts: experts of each sparse layer, at least 2.
        num_experts_per_tok: experts that each token is sent to.
        layers: which layers become sparse.
        router_seed: of the routers' weights, normal with the config's `initializer_range`, and of the noise. Never the
            global seed.
        shared_expert: whether each sparse layer also keeps an expert that every token sees; Qwen2 only.
        expert_noise: standard deviation of what each expert's weights are moved by, over that of the weights; 0 for
            exact copies, with which alone the start is the dense model's.

    Returns:
        The sparse model, of the dense one's type and device, in training or evaluation mode as the dense one,
        its routers computed in float32.

    Raises:
        ConfigError: a language model without a sparse sibling here, or numbers that do not fit together.
    """
    dense_config = text_config(dense)
    family = family_of(dense_config)
    if not 1 <= num_experts_per_tok <= num_experts or num_experts < 2:
        raise ConfigError(
            "upcycling: expected at least 2 experts and 1 <= num_experts_per_tok <= num_experts, got "
            f"num_experts={num_experts}, num_experts_per_tok={num_experts_per_tok}"
        )
    if shared_expert and not family.shares:
        raise ConfigError(f"upcycling: {family.text_type} has no shared expert; set shared_expert=false")
    sparse = sparse_layers(layers, dense_config.num_hidden_layers)
    still_dense = [i for i in range(dense_config.num_hidden_layers) if i not in sparse]
    if still_dense and not family.interleaves:
        raise ConfigError(
            f"upcycling: every layer of {family.text_type} is sparse, got dense layers {still_dense}; set "
            'layers = "all"'
        )
    model = _empty_model(
        dense, _sparse_config(dense, family, num_experts, num_experts_per_tok, still_dense, shared_expert)
    )

    weights = dict(dense.state_dict())
    std = dense_config.initializer_range
    generator = torch.Generator().manual_seed(router_seed)
    for index in sparse:
        prefix = f"{decoder_prefix(dense)}layers.{index}.mlp."
        gate_FH, up_FH, down_HF = (weights.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        if family.shares:
            shared, down_HF = _shared_expert(gate_FH, up_FH, down_HF, shared_expert)
            weights |= {f"{prefix}{name}": weight for name, weight in shared.items()}
        router_EH = torch.randn(num_experts, dense_config.hidden_size, generator=generator) * std
        weights[f"{prefix}gate.weight"] = router_EH.to(gate_FH)
        for name, weight in (("gate_up_proj", torch.cat([gate_FH, up_FH])), ("down_proj", down_HF)):
            weights[f"{prefix}experts.{name}"] = _copies(weight, num_experts, expert_noise, generator)
    model.load_state_dict(weights, strict=True)
    model.tie_weights()
    compute_routers_in_float32(model)
    return model.train(dense.training)


def _shared_expert(gate_FH: Tensor, up_FH: Tensor, down_HF: Tensor, wanted: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The weights of the shared expert, and what is left for the others to give."""
    shared = {"shared_expert_gate.weight": torch.zeros_like(gate_FH[:1])}
    if wanted:
        own = (gate_FH, up_FH, down_HF)
        down_HF = down_HF / 2
    else:
        own = (gate_FH[:_SMALLEST_SHARED], up_FH[:_SMALLEST_SHARED], torch.zeros_like(down_HF[:, :_SMALLEST_SHARED]))
    for name, weight in zip(("gate", "up", "down"), own, strict=True):
        shared[f"shared_expert.{name}_proj.weight"] = weight
    return shared, down_HF


def _sparse_config(
    dense: Any, family: Family, num_experts: int, num_experts_per_tok: int, still_dense: list[int], shared_expert: bool
) -> Any:
    """The dense student's configuration with its language model's replaced by the sparse sibling's."""
    from transformers import CONFIG_MAPPING

    dense_text = text_config(dense)
    text = {key: value for key, value in dense_text.to_dict().items() if key not in family.dropped}
    text |= {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        family.ffn_size: dense_text.intermediate_size,
        "architectures": [family.architecture],
    }
    if family.interleaves:
        text |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": still_dense}
    if family.shares:
        text["shared_expert_intermediate_size"] = dense_text.intermediate_size if shared_expert else _SMALLEST_SHARED
    sparse_text = CONFIG_MAPPING[family.text_type](**text)
    if dense_text is dense.config:
        return sparse_text
    whole = dense.config.to_dict()
    for field in ("model_type", "transformers_version", "architectures"):
        whole.pop(field, None)
    whole["text_config"] = sparse_text
    vision = dense.config.vision_config.to_dict()
    if family.whole_type is None:
        whole["vision_config"] = type(dense.config.vision_config).from_dict(vision)
        return type(dense.config)(**whole)
    # The sibling of the whole names its tower after itself; it is the same tower.
    vision.pop("model_type", None)
    whole["vision_config"] = vision
    whole["text_config"] = sparse_text.to_dict()
    return CONFIG_MAPPING[family.whole_type](**whole)


def _empty_model(like: Any, config: Any) -> Any:
    """A model of a config without initial values, of the type and device of another."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with no_init_weights():
        model = auto.from_config(config)
    model.generation_config = like.generation_config
    return model.to(device=like.device, dtype=like.dtype)


def _copies(weight: Tensor, num_experts: int, noise: float, generator: torch.Generator) -> Tensor:
    """[O, I] -> [E, O, I], every expert the same but for its own noise."""
    copies_EOI = weight.unsqueeze(0).expand(num_experts, -1, -1)
    if not noise:
        return copies_EOI
    drawn_EOI = torch.randn(copies_EOI.shape, generator=generator) * (noise * weight.float().std().cpu())
    return (copies_EOI.float() + drawn_EOI.to(weight.device)).to(weight.dtype)
