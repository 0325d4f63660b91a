"""Tiny students built in code, so that no test waits for a file or a network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

IMAGE_TOKEN_ID = 60
NUM_IMAGE_TOKENS = 16
VOCAB_SIZE = 64


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    """Progress bars and advice of transformers are not what a failing test should show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def tiny_llava() -> Callable[..., Any]:
    """Makes a seeded random LLaVA: CLIP tower of 16 patches, `model_type` language model; keyword = text config."""

    def make(model_type: str = "qwen3", seed: int = 0, **text: Any) -> Any:
        from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

        torch.manual_seed(seed)
        settings = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,  # the smallest that vLLM's CPU kernels take
            "max_position_embeddings": 256,
            "initializer_range": 0.2,  # large enough that a wrong wiring shows in the logits
            "tie_word_embeddings": True,
            "eos_token_id": 1,
        }
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            projection_dim=32,
        )
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=CONFIG_MAPPING[model_type](**(settings | text)),
                image_token_index=IMAGE_TOKEN_ID,
                image_seq_length=NUM_IMAGE_TOKENS,
                vision_feature_layer=-2,
            )
        )
        return model.eval()

    return make


@pytest.fixture
def llava_batch() -> dict[str, torch.Tensor]:
    """Two right-padded sequences, each with one image: 16 placeholders, then text."""
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 50, (2, NUM_IMAGE_TOKENS + 8), generator=g)
    ids[:, 1 : NUM_IMAGE_TOKENS + 1] = IMAGE_TOKEN_ID
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    pixels = torch.randn(2, 3, 16, 16, generator=g)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.fixture
def processor_files() -> Callable[[Path], None]:
    """Writes a word-level tokenizer with `<image>` at 60, a chat template and CLIP's image processor config."""

    def write(model_dir: Path) -> None:
        words = [f"w{i}" for i in range(VOCAB_SIZE)]
        words[0], words[1], words[IMAGE_TOKEN_ID] = "<pad>", "<eos>", "<image>"
        vocab = {word: i for i, word in enumerate(words)}
        special = [
            {"id": vocab[w], "content": w, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for w in ("<pad>", "<eos>", "<image>")
        ]
        model_dir.mkdir(parents=True, exist_ok=True)
        tokenizer = {
            "version": "1.0",
            "added_tokens": special,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<pad>"},
        }
        (model_dir / "tokenizer.json").write_text(json.dumps(tokenizer))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "extra_special_tokens": {"image_token": "<image>"},
        }
        (model_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        (model_dir / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        image_processor = {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": 16, "width": 16},
            "size": {"shortest_edge": 16},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 1 / 255,
        }
        (model_dir / "preprocessor_config.json").write_text(json.dumps(image_processor))

    return write
