"""A LLaVA student from its parts: a vision tower, a fresh projector, a language model.

The parts are ordinary checkpoints; the whole is a stock `LlavaForConditionalGeneration`. Tokenizer, chat
template and image processor files travel unchanged, byte for byte: the lake's fingerprint is taken from them,
and a tokenizer that was loaded and saved again need not be the same file.
"""

import json
import shutil
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitlake_shared.errors import ConfigError
from logitlake_student.models.load import empty_model, load_student, read_config
from logitlake_student.models.parts import LANGUAGE_MODELS

__all__ = [
    "PROCESSOR_FILES",
    "assemble_llava",
    "assembled_config",
    "copy_processor_files",
    "save_assembled",
    "save_student",
]

PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Everything besides weights and model config that a checkpoint folder may hold."""

_TOWERS = frozenset({"clip", "clip_vision_model", "siglip", "siglip_vision_model"})


def assembled_config(
    vision_tower_dir: Path, language_model_dir: Path, *, vision_feature_layer: int, image_token: str = "<image>"
) -> Any:
    """The `LlavaConfig` of a student made of two parts; no weights are read. Arguments and errors: `assemble_llava`."""
    from transformers import AutoTokenizer, CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

    has_class_token = _require_type(vision_tower_dir, _TOWERS, "vision tower").startswith("clip")
    _require_type(language_model_dir, LANGUAGE_MODELS, "language model")
    vision = (CLIPVisionConfig if has_class_token else SiglipVisionConfig).from_pretrained(vision_tower_dir)
    num_layers = vision.num_hidden_layers
    if not -num_layers - 1 <= vision_feature_layer <= num_layers:
        raise ConfigError(
            f"student.vision_feature_layer: {vision_tower_dir} has {num_layers} layers and what goes into the first, "
            f"expected {-num_layers - 1} to {num_layers}; got {vision_feature_layer}"
        )
    text = read_config(language_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(language_model_dir, trust_remote_code=False)
    image_token_id = tokenizer.get_vocab().get(image_token)
    if image_token_id is None or image_token_id >= text.vocab_size:
        raise ConfigError(
            f"{language_model_dir}: expected the placeholder {image_token!r} in the tokenizer, within the "
            f"{text.vocab_size} rows of the embedding; got id {image_token_id}"
        )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default" if has_class_token else "full",
    )


def assemble_llava(
    vision_tower_dir: Path,
    language_model_dir: Path,
    *,
    projector_seed: int,
    vision_feature_layer: int,
    image_token: str = "<image>",
) -> Any:
    """A `LlavaForConditionalGeneration` in float32 on the CPU, with a fresh two-layer GELU projector.

    Args:
        vision_tower_dir: checkpoint of a CLIP or SigLIP vision model (or a whole one, of which the vision half is
            taken). CLIP's class token is dropped, as in LLaVA; SigLIP has none, and all its tokens are shown.
        language_model_dir: checkpoint and tokenizer of a causal language model of the types `parts.LANGUAGE_MODELS`.
        projector_seed: of the projector's weights, uniform within 1/sqrt(fan-in), biases too, as
            `torch.nn.Linear` and LLaVA have them. Never the global seed.
        vision_feature_layer: hidden layer of the tower that is shown to the language model, -2 in LLaVA.
        image_token: the placeholder token, which the tokenizer must know.

    Raises:
        ConfigError: a part that is missing, of another kind or without all its weights, a layer that the tower does
            not have, a tokenizer that lacks the placeholder.
    """
    config = assembled_config(
        vision_tower_dir, language_model_dir, vision_feature_layer=vision_feature_layer, image_token=image_token
    )
    tower = _load_tower(vision_tower_dir, config.vision_config.model_type)
    language_model = load_student(language_model_dir, dtype=torch.float32)
    model = empty_model(config).float()
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    model.model.language_model.load_state_dict(language_model.model.state_dict(), strict=True)
    model.lm_head.load_state_dict(language_model.lm_head.state_dict(), strict=True)
    _initialise_projector(model.model.multi_modal_projector, projector_seed)
    model.generation_config = language_model.generation_config
    return model


def _load_tower(model_dir: Path, model_type: str) -> Any:
    """A whole model's text half is not looked at; a tensor that the tower lacks would be a random one."""
    from transformers import CLIPVisionModel, SiglipVisionModel

    tower_class = CLIPVisionModel if model_type.startswith("clip") else SiglipVisionModel
    tower, loading = tower_class.from_pretrained(model_dir, dtype=torch.float32, output_loading_info=True)
    if loading["missing_keys"]:
        raise ConfigError(f"vision tower: {model_dir} lacks the weights {sorted(loading['missing_keys'])[:4]}")
    return tower


def _require_type(model_dir: Path, expected: Set[str], part: str) -> str:
    config_path = model_dir / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"{part}: no checkpoint at {model_dir} (expected {config_path.name} there)")
    model_type = json.loads(config_path.read_text()).get("model_type")
    if model_type not in expected:
        raise ConfigError(f"{part}: expected a model of type {sorted(expected)}, got {model_type!r} at {model_dir}")
    return str(model_type)


@torch.no_grad()
def _initialise_projector(projector: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for linear in (projector.linear_1, projector.linear_2):
        bound = linear.in_features**-0.5
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)


def save_student(model: Any, out_dir: Path, *, files_from: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Saves a student with the tokenizer and processor files of the checkpoint that it came from.

    `weights` are its state where the model itself holds a part only.
    """
    model.save_pretrained(out_dir, state_dict=weights)
    copy_processor_files([files_from], out_dir)


def save_assembled(model: Any, out_dir: Path, *, vision_tower_dir: Path, language_model_dir: Path) -> None:
    """Saves a freshly assembled student: tokenizer from the language model, image processor from the tower.

    Where neither brings a processor config, one is written that stock transformers and vLLM read.

    Raises:
        ConfigError: no image processor beside the tower.
    """
    model.save_pretrained(out_dir)
    copy_processor_files([vision_tower_dir, language_model_dir], out_dir)
    processor_config = out_dir / "processor_config.json"
    if processor_config.is_file():
        return
    image_processor = out_dir / "preprocessor_config.json"
    if not image_processor.is_file():
        raise ConfigError(
            f"vision tower: expected {image_processor.name} or {processor_config.name} at {vision_tower_dir}"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language_model_dir, trust_remote_code=False)
    content = {
        "processor_class": "LlavaProcessor",
        "image_processor": json.loads(image_processor.read_text()),
        "image_token": tokenizer.convert_ids_to_tokens(model.config.image_token_id),
        # The class token, which `default` then drops.
        "num_additional_image_tokens": int(model.config.vision_feature_select_strategy == "default"),
        "patch_size": model.config.vision_config.patch_size,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
    }
    processor_config.write_text(json.dumps(content, indent=2) + "\n")


def copy_processor_files(sources: Sequence[Path], out_dir: Path) -> None:
    """Copies `PROCESSOR_FILES` that exist; where two sources have one, the later source's stands."""
    for source in sources:
        for name in PROCESSOR_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, out_dir / name)
