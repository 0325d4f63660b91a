"""Loads any student, and any teacher of the same family, from its folder. Code in a checkpoint is never run."""

from pathlib import Path
from typing import Any

import torch

from logitlake_shared.errors import ConfigError
from logitlake_student.models.parts import require_known
from logitlake_student.models.routing import compute_routers_in_float32

__all__ = ["empty_model", "load_student", "quiet_transformers", "read_config"]


def quiet_transformers() -> None:
    """Silences transformers' progress bars and advice; the commands show their own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_config(model_dir: Path) -> Any:
    """The configuration in `model_dir`. Raises `ConfigError` where there is none, or one of a kind unknown here."""
    from transformers import AutoConfig

    if not (model_dir / "config.json").is_file():
        raise ConfigError(f"{model_dir}: no checkpoint there (config.json is missing)")
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model_dir}: config.json is not that of a stock class, and code of a checkpoint is never run "
            f"({_first_line(error)})"
        ) from error
    require_known(config, model_dir)
    return config


def load_student(model_dir: Path, *, dtype: torch.dtype) -> Any:
    """The model in `model_dir` (LLaVA, Qwen-VL, or a text-only language model), its routers computed in float32.

    Raises `ConfigError` when the folder is no checkpoint, or its weights and its classes do not agree.
    """
    from safetensors import SafetensorError

    quiet_transformers()
    auto = _auto_class(read_config(model_dir))
    try:
        model, loading = auto.from_pretrained(model_dir, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{model_dir}: no weights that can be read ({_first_line(error)})") from error
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ConfigError(
            f"{model_dir}: weights and classes do not agree: missing {sorted(loading['missing_keys'])[:4]}, "
            f"unexpected {sorted(loading['unexpected_keys'])[:4]}"
        )
    compute_routers_in_float32(model)
    return model


def empty_model(config: Any) -> Any:
    """A model of a configuration, without initial values. Inside `torch.device("meta")` it takes no memory either."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = _auto_class(config).from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
