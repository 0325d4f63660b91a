"""What a checkpoint folder says about its teacher, read without loading a weight.

Both real engines need the same few facts before the first forward pass (context length, tokens per image), and the
planner needs the identity of a teacher without starting an engine. They come from the JSON files and the bytes of
the folder, so that they are the same whichever library runs the model.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitlake_schemas.fingerprint import fingerprint
from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage

__all__ = ["TeacherCheckpoint", "read_checkpoint", "weights_sha256"]

# Towers whose sequence starts with a class token, which `vision_feature_select_strategy = "default"` drops.
_TOWERS_WITH_CLASS_TOKEN = frozenset({"clip_vision_model"})
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class TeacherCheckpoint:
    """Facts of a checkpoint folder."""

    sees_images: bool
    num_image_tokens: Callable[[DecodedImage], int]
    """tokens that an image becomes"""
    context_length: int
    """positions the language model was made for"""


def read_checkpoint(model_dir: Path) -> TeacherCheckpoint:
    """The facts of the checkpoint in `model_dir`. Raises `EngineError` if it is none, or of a kind we cannot expand."""
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
        return TeacherCheckpoint(False, lambda _: 0, context_length)
    if config.get("model_type") != "llava":
        raise EngineError(
            f"{path}: model_type is {config.get('model_type')!r}; the multimodal teachers of this release are 'llava' "
            "(one resolution, so that every image becomes the same number of tokens)"
        )
    num_tokens = _num_llava_image_tokens(config)
    return TeacherCheckpoint(True, lambda _: num_tokens, context_length)


def _num_llava_image_tokens(config: dict[str, Any]) -> int:
    """Patches of the tower, its class token kept or not, as `vision_feature_select_strategy` says."""
    vision = config["vision_config"]
    num_tokens = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2
    if vision.get("model_type") in _TOWERS_WITH_CLASS_TOKEN:
        num_tokens += 1
    if config.get("vision_feature_select_strategy", "default") == "default":
        num_tokens -= 1
    return num_tokens


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
