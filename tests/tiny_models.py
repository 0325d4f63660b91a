"""Random checkpoints of a few hundred kilobytes, stock in every respect: transformers and vLLM load them unchanged.

`save_tiny_llava` is a teacher whose images all become 16 tokens; `save_tiny_qwen_vl` one whose images keep their shape
and become as many tokens as they have pixels for; `save_tiny_text` one that reads text only. All speak a byte-level
vocabulary of 300 tokens, so that any text is representable, and are drawn wide, so that a random teacher has opinions.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["noise_png", "save_tiny_llava", "save_tiny_qwen_vl", "save_tiny_text"]

CONTEXT_LENGTH = 256
# The smallest that vLLM's CPU attention takes.
HEAD_DIM = 32
INITIALIZER_RANGE = 0.15

_CORPUS = (
    "what is in the picture?",
    "a red seven and a blue two",
    "how many digits are there? three",
    "yes no none",
)
_ROLES = ("<system>", "<user>", "<assistant>")
_LLAVA_IMAGE = ("<image>",)
_QWEN_IMAGE = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def noise_png(seed: int) -> bytes:
    """A 32x32 picture of noise."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(buffer, "PNG")
    return buffer.getvalue()


def save_tiny_llava(folder: Path) -> None:
    """LLaVA: a CLIP tower of 32x32 pixels, Qwen3, 16 tokens an image, 256 positions."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = _tokenizer("<image>", (*_LLAVA_IMAGE, *_ROLES))
    side = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    _save_llava_weights(tokenizer, folder)


def save_tiny_qwen_vl(folder: Path, family: str = "qwen3_vl", **text: Any) -> None:
    """A Qwen-VL with patches of 4x4 pixels merged by two: an image is a token for each 8x8 pixels, 4 to 32 of them.

    Deep-stacked image features, interleaved M-RoPE and the file layout are those of the released checkpoints.
    `family` is the model type: `qwen3_vl`, `qwen3_vl_moe`, `qwen2_5_vl` or `qwen2_vl`; `text` are options of its
    language model.
    """
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = _tokenizer("<|vision_start|><|image_pad|><|vision_end|>", (*_QWEN_IMAGE, *_ROLES))
    tokenizer.save_pretrained(folder)
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    size = {"shortest_edge": 4 * 64, "longest_edge": 32 * 64}
    Qwen2VLImageProcessorPil(**patches, size=size).save_pretrained(folder)
    # vLLM loads the whole processor, videos included, even where only images are asked about. Its class needs
    # torchvision to be made, its configuration does not.
    video = {"video_processor_type": "Qwen3VLVideoProcessor", **patches, "size": size}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video), encoding="utf-8")
    _save_qwen_vl_weights(tokenizer, family, folder, text)


def save_tiny_text(folder: Path, family: str = "qwen2", **options: Any) -> None:
    """A language model without eyes; `family` is its model type, `options` are those of its configuration.

    Unless they say otherwise, two layers, embeddings tied to the head.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    tokenizer = _tokenizer("", _ROLES)
    tokenizer.save_pretrained(folder)
    text = {name: value for name, value in _text_options(tokenizer).items() if name != "head_dim" or family != "qwen2"}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**({"num_hidden_layers": 2, "tie_word_embeddings": True} | text | options))
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)


def _tokenizer(image_text: str, special_tokens: Sequence[str]) -> Any:
    """A byte-level BPE whose template writes `image_text` for an image."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<end>", *special_tokens],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=list(special_tokens),
        chat_template=_template(image_text),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
    )


def _template(image_text: str) -> str:
    return (
        "{%- for message in messages -%}{{- '<' + message['role'] + '>' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- '" + image_text + "' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- if message['role'] == 'assistant' -%}{{- '<end>' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
    )


def _text_options(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": INITIALIZER_RANGE,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def _save_llava_weights(tokenizer: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

    text = Qwen3Config(**_text_options(tokenizer), num_hidden_layers=2, architectures=["Qwen3ForCausalLM"])
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    # transformers 5 leaves `vision_model.` out of a fresh checkpoint's names; released ones, and vLLM, have it.
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model" not in name else name: tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def _save_qwen_vl_weights(tokenizer: Any, family: str, folder: Path, options: dict[str, Any]) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 4, "initializer_range": INITIALIZER_RANGE}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        vision |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
        # Windows of two merged patches a side, so that some of its layers see a part of an image only.
        vision |= {"window_size": 16}
    else:
        vision |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64, "num_position_embeddings": 64}
        vision |= {"deepstack_visual_indexes": [0, 1]}
    text = {
        **_text_options(tokenizer),
        # Image features join after the first layers of Qwen3-VL; what follows must be able to react to them.
        "num_hidden_layers": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
    }
    if family == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = CONFIG_MAPPING[family](
        text_config=text | options,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).float().save_pretrained(folder)
