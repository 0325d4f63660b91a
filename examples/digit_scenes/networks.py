"""The demo's networks, written so that stock transformers and stock vLLM both read them.

Everything is a class of the transformers library: a CLIP vision tower, a Qwen3 language model, LLaVA around
the two. Sizes are chosen for two CPU cores; attention heads are 32 wide because vLLM's CPU kernels have no
narrower ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.digit_scenes.tokenizer import PATCH, TOKENS_PER_IMAGE
from examples.digit_scenes.world import SIDE

__all__ = [
    "STUDENT",
    "TEACHER",
    "build_teacher",
    "build_tower",
    "language_config",
    "normalise",
    "save_canonical",
    "tower_features",
]

HEAD_DIM = 32
TOWER = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4}
STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
FEATURE_LAYER = -1
"""Patches are read after the tower's last layer (before its final norm), so nothing in the tower is idle."""

_INITIALIZER_RANGE = 0.05
"""Wider than the usual 0.02, which suits widths ten times these."""


def build_tower() -> Any:
    """A fresh CLIPVisionModel for 32 x 32 pixels in patches of 8."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            **TOWER,
            num_attention_heads=TOWER["hidden_size"] // HEAD_DIM,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",
            initializer_range=_INITIALIZER_RANGE,
        )
    )


def language_config(sizes: dict[str, int], tokenizer: Any) -> Any:
    """The Qwen3Config of these sizes for this tokenizer; embeddings are tied."""
    from transformers import Qwen3Config

    heads = sizes["hidden_size"] // HEAD_DIM
    return Qwen3Config(
        **sizes,
        vocab_size=len(tokenizer),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        initializer_range=_INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3ForCausalLM"],
    )


def build_teacher(tokenizer: Any, tower: Any) -> Any:
    """A LlavaForConditionalGeneration around a trained tower, which it freezes; the rest is fresh."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    teacher = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config,
            text_config=language_config(TEACHER, tokenizer),
            image_seq_length=TOKENS_PER_IMAGE,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=FEATURE_LAYER,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
            tie_word_embeddings=True,
        )
    )
    teacher.model.vision_tower.load_state_dict(tower.state_dict())
    teacher.model.vision_tower.requires_grad_(requires_grad=False)
    teacher.generation_config.eos_token_id = tokenizer.eos_token_id
    teacher.generation_config.pad_token_id = tokenizer.pad_token_id
    return teacher


@torch.inference_mode()
def tower_features(tower: nn.Module, pixels_BHWC: torch.Tensor, chunk: int = 512) -> torch.Tensor:
    """The B x 16 x width patch features that LLaVA takes from the tower, for uint8 pixels."""
    parts = []
    for part_BHWC in torch.split(pixels_BHWC, chunk):
        outputs = tower(pixel_values=normalise(part_BHWC), output_hidden_states=True)
        parts.append(outputs.hidden_states[FEATURE_LAYER][:, 1:])
    return torch.cat(parts)


def normalise(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """What the processor does to a 32 x 32 picture: uint8 B x H x W x C to float32 B x C x H x W in [-1, 1]."""
    return pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def save_canonical(model: Any, folder: Path) -> None:
    """Write config.json and fp32 model.safetensors with the key names of published checkpoints.

    transformers 5 writes a freshly made tower without its `vision_model.` level; it reads both, vLLM only the
    published one.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        tensors[_published_name(name, type(model).__name__)] = tensor.detach().to("cpu", torch.float32).contiguous()
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes for the owner alone
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    if "text_config" in described:
        described["text_config"]["architectures"] = ["Qwen3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _published_name(name: str, model_class: str) -> str:
    if model_class == "CLIPVisionModel":
        return name if name.startswith("vision_model.") else f"vision_model.{name}"
    if model_class == "LlavaForConditionalGeneration":
        name = name.removeprefix("model.")
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if name.startswith("language_model."):
            return name.replace("language_model.", "language_model.model.", 1)
    return name
