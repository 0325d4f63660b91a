"""Loads any student, and any teacher of the same family, from its folder."""

from pathlib import Path
from typing import Any

import torch

from logitlake_shared.errors import ConfigError
from logitlake_student.models.routing import compute_routers_in_float32

__all__ = ["load_student", "quiet_transformers"]


def quiet_transformers() -> None:
    """Silences transformers' progress bars and advice; the commands show their own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_student(model_dir: Path, *, dtype: torch.dtype) -> Any:
    """The model in `model_dir` (LLaVA, Qwen-VL, or a text-only language model), its routers computed in float32.

    Raises `ConfigError` when the folder is no checkpoint, or its weights and its classes do not agree.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    quiet_transformers()
    if not (model_dir / "config.json").is_file():
        raise ConfigError(f"{model_dir}: no checkpoint there (config.json is missing)")
    sees_images = hasattr(AutoConfig.from_pretrained(model_dir), "vision_config")
    cls = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    model, loading = cls.from_pretrained(model_dir, dtype=dtype, output_loading_info=True)
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ConfigError(
            f"{model_dir}: weights and classes do not agree: missing {sorted(loading['missing_keys'])[:4]}, "
            f"unexpected {sorted(loading['unexpected_keys'])[:4]}"
        )
    compute_routers_in_float32(model)
    return model
