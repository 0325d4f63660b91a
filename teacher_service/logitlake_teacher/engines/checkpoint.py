"""What a checkpoint folder says about its teacher, read without loading a weight.

Both real engines need the same few facts before the first forward pass (context length, tokens per image), and the
planner needs the identity of a teacher without starting an engine. They come from the JSON files and the bytes of
the folder, so that they are the same whichever library runs the model. What an image becomes is a function of its
size: a constant for LLaVA, and for Qwen-VL what its own image processor answers, which is loaded when the first image
is asked about.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from logitlake_schemas.fingerprint import fingerprint
from logitlake_shared.errors import EngineError, ImageError
from logitlake_shared.pixels import load_image_processor
from logitlake_teacher.engines.base import CountImageTokens

__all__ = ["CountImageTokens", "TeacherCheckpoint", "read_checkpoint", "weights_sha256"]

# Towers whose sequence starts with a class token, which `vision_feature_select_strategy = "default"` drops.
_TOWERS_WITH_CLASS_TOKEN = frozenset({"clip_vision_model"})
# Their image processors keep an image's shape and merge neighbouring patches into one token.
_QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
# Sizes of images that are remembered: photographs come in a few hundred.
_SIZES_REMEMBERED = 1 << 16
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class TeacherCheckpoint:
    """Facts of a checkpoint folder."""

    sees_images: bool
    num_image_tokens: CountImageTokens
    """tokens that an image of a width and height becomes"""
    context_length: int
    """positions the language model was made for"""


def read_checkpoint(model_dir: Path, image_options: Mapping[str, Any] | None = None) -> TeacherCheckpoint:
    """The facts of the checkpoint in `model_dir`, its image processor run with `image_options` over its own.

    Raises `EngineError` if it is none, or of a kind we cannot expand.
    """
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{path}: no such file; expected the folder of a teacher checkpoint") from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read: {error}") from None
    text = config.get("text_config", config)
    context_length = text.get("max_position_embeddings")
    if not isinstance(context_length, int):
        raise EngineError(f"{path}: has no max_position_embeddings; set engine.context_length")
    if "vision_config" not in config:
        return TeacherCheckpoint(False, lambda _width, _height: 0, context_length)
    model_type = config.get("model_type")
    if model_type == "llava":
        num_tokens = _num_llava_image_tokens(config)
        return TeacherCheckpoint(True, lambda _width, _height: num_tokens, context_length)
    if model_type in _QWEN_VL:
        return TeacherCheckpoint(True, _qwen_vl_counter(model_dir, dict(image_options or {})), context_length)
    raise EngineError(
        f"{path}: model_type is {model_type!r}; the multimodal teachers of this release are 'llava' and "
        f"{', '.join(map(repr, _QWEN_VL))}: how many tokens an image of another becomes is not known here"
    )


def _num_llava_image_tokens(config: dict[str, Any]) -> int:
    """Patches of the tower, its class token kept or not, as `vision_feature_select_strategy` says."""
    vision = config["vision_config"]
    num_tokens = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2
    if vision.get("model_type") in _TOWERS_WITH_CLASS_TOKEN:
        num_tokens += 1
    if config.get("vision_feature_select_strategy", "default") == "default":
        num_tokens -= 1
    return num_tokens


def _qwen_vl_counter(model_dir: Path, options: dict[str, Any]) -> CountImageTokens:
    """Tokens by the processor's own rule: patches after its resizing, `merge_size` squared of them a token."""

    @cache
    def processor() -> Any:
        return load_image_processor(model_dir)

    @lru_cache(_SIZES_REMEMBERED)
    def count(width: int, height: int) -> int:
        try:
            num_patches = processor().get_number_of_image_patches(height, width, options)
        except ValueError as error:
            raise ImageError(f"image_shape: {width}x{height} pixels: {error}") from None
        return int(num_patches) // int(processor().merge_size) ** 2

    return count


def weights_sha256(model_dir: Path) -> str:
    """Digest over the bytes of `config.json` and every `*.safetensors` file. Raises `EngineError` if there are none."""
    weights = sorted(model_dir.glob("*.safetensors"))
    if not weights:
        raise EngineError(f"{model_dir}: holds no *.safetensors file; expected the folder of a teacher checkpoint")
    return fingerprint({path.name: _sha256_of_file(path) for path in [model_dir / "config.json", *weights]})


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
