"""Tensor names and layouts as the released checkpoints of an architecture have them.

What transformers saves is not quite what vLLM loads. Three traps, each of which leaves files that look complete:

* a LLaVA's tower is saved as `vision_tower.embeddings…`; released checkpoints, and vLLM, have
  `vision_tower.vision_model.embeddings…`. transformers reads both.
* a Qwen3-VL-MoE's experts are saved as [E, 2I, H] and [E, H, I]; released checkpoints, and vLLM, have [E, H, 2I] and
  [E, I, H]. transformers tells the two apart by their shape.
* which it cannot where the matrix is square: there transformers takes a released layout for its own, and vLLM takes
  transformers' for the released one, and both compute nonsense without a word. No file suits both.

Axes: E experts, H hidden, I width of an expert.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

__all__ = ["Target", "ambiguous_experts", "canonical_layout", "canonical_name"]

Target = Literal["hf", "vllm"]

_STACKED_EXPERTS = {"qwen3_vl_moe"}
"""Model types whose released checkpoints hold all experts of a layer in one transposed tensor."""


def canonical_name(name: str) -> str:
    """The name under which released LLaVA checkpoints, and vLLM, know a tensor that transformers saved."""
    tower = "vision_tower."
    if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
        return f"{tower}vision_model.{name.removeprefix(tower)}"
    return name


def canonical_layout(config: Mapping[str, Any], target: Target) -> Callable[[str, Tensor], Tensor]:
    """What gives each tensor of a checkpoint with this `config.json` the layout that `target` reads.

    A square expert matrix is transposed for vLLM and left alone for transformers.
    """
    if config["model_type"] not in _STACKED_EXPERTS:
        return lambda _name, tensor: tensor
    text = config["text_config"]
    hidden, width = int(text["hidden_size"]), int(text["moe_intermediate_size"])

    def lay_out(name: str, tensor: Tensor) -> Tensor:
        own = _own_shapes(hidden, width).get(name.rpartition(".")[2]) if ".mlp.experts." in name else None
        if own is None or tuple(tensor.shape[1:]) != own or (own[0] == own[1] and target == "hf"):
            return tensor
        return tensor.transpose(1, 2).contiguous()

    return lay_out


def ambiguous_experts(config: Mapping[str, Any]) -> list[str]:
    """Which stacked expert matrices are square, so that transformers and vLLM read one file differently."""
    if config["model_type"] not in _STACKED_EXPERTS:
        return []
    text = config["text_config"]
    shapes = _own_shapes(int(text["hidden_size"]), int(text["moe_intermediate_size"]))
    return [name for name, (rows, columns) in shapes.items() if rows == columns]


def _own_shapes(hidden: int, width: int) -> dict[str, tuple[int, int]]:
    """One expert's matrices as transformers saves them."""
    return {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
