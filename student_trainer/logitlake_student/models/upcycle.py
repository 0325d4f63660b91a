"""From a dense student to a sparse one that starts as the same function.

Every expert of a sparse layer is a copy of the dense layer's feed-forward network, and the weights of the
chosen experts sum to 1, so that whatever the fresh router chooses, the layer computes what it computed before
(LLaVA-MoD §3, after arXiv 2212.05055). Routing is dropless: transformers' experts take every token they are given.

An expert that every token sees (`shared_expert`, Qwen2-MoE) starts as the same network behind a gate at sigmoid(0) =
1/2, and the other experts give half of what they gave. Without it that architecture still has one, of eight units that
give nothing at first.

The result is a stock transformers class, saved and loaded without remote code.

Axes: E experts, O outputs and I inputs of a matrix, H hidden, F inner size of a feed-forward network.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logitlake_student.models.load import empty_model
from logitlake_student.models.parts import decoder, decoder_prefix, text_config
from logitlake_student.models.routing import compute_routers_in_float32
from logitlake_student.models.sparse_config import SMALLEST_SHARED, LayerChoice, sparse_config, sparse_layers

__all__ = ["upcycle"]


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
        router_seed: of the routers' weights, normal with the config's `initializer_range`, and of the noise, which is
            drawn after them. Never the global seed.
        shared_expert: whether each sparse layer also keeps an expert that every token sees; Qwen2 only.
        expert_noise: standard deviation of what each expert's matrices are moved by, over that of the matrix; 0 for
            exact copies, with which alone the start is the dense model's.

    Returns:
        The sparse model, of the dense one's type and device, in training or evaluation mode as the dense one,
        its routers computed in float32.

    Raises:
        ConfigError: a language model without a sparse sibling here, or numbers that do not fit together.
    """
    config = sparse_config(dense.config, num_experts, num_experts_per_tok, layers, shared_expert=shared_expert)
    model = empty_model(config).to(device=dense.device, dtype=dense.dtype)
    model.generation_config = dense.generation_config

    dense_text = text_config(dense)
    sparse = sparse_layers(layers, dense_text.num_hidden_layers)
    weights = dict(dense.state_dict())
    generator = torch.Generator().manual_seed(router_seed)
    for index in sparse:
        prefix = f"{decoder_prefix(dense)}layers.{index}.mlp."
        gate_FH, up_FH, down_HF = (weights.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        if hasattr(text_config(model), "shared_expert_intermediate_size"):
            shared, down_HF = _shared_expert(gate_FH, up_FH, down_HF, shared_expert)
            weights |= {f"{prefix}{name}": weight for name, weight in shared.items()}
        router_EH = torch.randn(num_experts, dense_text.hidden_size, generator=generator)
        weights[f"{prefix}gate.weight"] = (router_EH * dense_text.initializer_range).to(gate_FH)
        for name, weight_OI in (("gate_up_proj", torch.cat([gate_FH, up_FH])), ("down_proj", down_HF)):
            weights[f"{prefix}experts.{name}"] = weight_OI.expand(num_experts, -1, -1)
    model.load_state_dict(weights, strict=True)
    if expert_noise:
        for index in sparse:
            experts = decoder(model).layers[index].mlp.experts
            for copies_EOI in (*experts.gate_up_proj.chunk(2, dim=1), experts.down_proj):
                _move_apart(copies_EOI, expert_noise, generator)
    compute_routers_in_float32(model)
    return model.train(dense.training)


def _shared_expert(gate_FH: Tensor, up_FH: Tensor, down_HF: Tensor, wanted: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The weights of the shared expert, and what is left for the others to give."""
    shared = {"shared_expert_gate.weight": torch.zeros_like(gate_FH[:1])}
    if wanted:
        own = (gate_FH, up_FH, down_HF)
        down_HF = down_HF / 2
    else:
        own = (gate_FH[:SMALLEST_SHARED], up_FH[:SMALLEST_SHARED], torch.zeros_like(down_HF[:, :SMALLEST_SHARED]))
    for name, weight in zip(("gate", "up", "down"), own, strict=True):
        shared[f"shared_expert.{name}_proj.weight"] = weight
    return shared, down_HF


@torch.no_grad()
def _move_apart(copies_EOI: Tensor, noise: float, generator: torch.Generator) -> None:
    """Moves each of equal matrices by normal draws of its own, in place."""
    std = noise * float(copies_EOI[0].float().std())
    for weight_OI in copies_EOI:
        drawn_OI = torch.randn(weight_OI.shape, generator=generator) * std
        weight_OI.copy_(weight_OI.float() + drawn_OI.to(weight_OI.device))
