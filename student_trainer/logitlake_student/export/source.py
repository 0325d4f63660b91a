"""The trained checkpoint as it lies on disk: its configuration and its weight files. Imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

from logitlake_shared.errors import ExportError

__all__ = ["INDEX", "read_config", "weight_files"]

INDEX = "model.safetensors.index.json"
"""Names the weight files where there are several."""


def read_config(model_dir: Path) -> dict[str, Any]:
    """The checkpoint's `config.json` with what others look for and transformers leaves out.

    The language model's class, by which converters go; that a Qwen3-VL-MoE's routing weights sum to 1, which is so
    without a word in transformers and a field in released checkpoints and vLLM. Raises `ExportError` where there is
    no configuration.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise ExportError(f"export: {model_dir} is not a checkpoint (expected {path.name} there)")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config")
    if text is not None and not text.get("architectures"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text["model_type"])
        if architecture is not None:  # Qwen-VL's language models have no class of their own
            text["architectures"] = [architecture]
    if config["model_type"] == "qwen3_vl_moe":
        config["text_config"]["norm_topk_prob"] = True
    return config


def weight_files(model_dir: Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The checkpoint's weight files in order, and the index that names them if there are several.

    Raises `ExportError` for one that is missing.
    """
    index_path = model_dir / INDEX
    index = json.loads(index_path.read_text(encoding="utf-8")) if index_path.is_file() else None
    files = [model_dir / name for name in sorted(set(index["weight_map"].values()))] if index else []
    files = files or [model_dir / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ExportError(f"export: {model_dir} holds no weights (expected {file.name} there)")
    return files, index
