"""Which students llama.cpp can run, told from `config.json` alone.

llama.cpp has its own program for each architecture, and what that program does not do cannot be written. Covered here:
Qwen2 and Qwen3 language models, and Qwen3-MoE whose layers are all sparse. The rest is refused with a reason and what
to do instead: a vision tower, dense layers between sparse ones, routing weights that do not sum to 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitlake_shared.errors import ExportError

__all__ = ["ARCHITECTURES", "refuse_unless_covered", "why_not"]

ARCHITECTURES = {"qwen2": "QWEN2", "qwen3": "QWEN3", "qwen3_moe": "QWEN3MOE"}
"""By model type, the name of `gguf.MODEL_ARCH`."""


def refuse_unless_covered(model_dir: Path, config: Mapping[str, Any]) -> None:
    """Raises `ExportError` for a checkpoint that llama.cpp cannot run."""
    reason = why_not(config)
    if reason is not None:
        raise ExportError(f"export to gguf: {model_dir}: {reason}")


def why_not(config: Mapping[str, Any]) -> str | None:
    """Why llama.cpp cannot run a checkpoint with this `config.json`, and what to do; None if it can."""
    if "vision_config" in config:
        return (
            f"{config['model_type']} has a vision tower, and llama.cpp's separate vision files are not written here; "
            "export to=hf or to=vllm"
        )
    model_type = config["model_type"]
    if model_type not in ARCHITECTURES:
        return (
            f"{model_type} is not written as GGUF here (expected one of {', '.join(ARCHITECTURES)}); export to=hf and "
            "try llama.cpp's convert_hf_to_gguf.py on it"
        )
    if config.get("use_sliding_window"):
        return f"llama.cpp's {model_type} has no sliding-window attention, which this student uses; export to=hf"
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        return f"rotary positions of type {rope['rope_type']!r} are not written; export to=hf"
    if config.get("attention_bias") and model_type != "qwen2":
        return f"llama.cpp's {model_type} has no attention bias, which this student has; export to=hf"
    if model_type == "qwen3_moe":
        dense = _dense_layers(config)
        if dense:
            return (
                f"layers {dense} are dense and the others sparse, and llama.cpp's qwen3moe has experts in every layer; "
                'train the stage d2s with layers = "all" for GGUF, or export to=hf or to=vllm'
            )
        if not config.get("norm_topk_prob"):
            return (
                "norm_topk_prob is false, and llama.cpp's qwen3moe always makes routing weights sum to 1; export to=hf"
            )
    return None


def _dense_layers(config: Mapping[str, Any]) -> list[int]:
    step = int(config.get("decoder_sparse_step") or 1)
    only = config.get("mlp_only_layers") or []
    return [i for i in range(int(config["num_hidden_layers"])) if i in only or (i + 1) % step]
