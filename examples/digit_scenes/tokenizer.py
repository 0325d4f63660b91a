"""The tokenizer and image processor of every digit-scenes model, and the chat template they share.

A byte-level BPE: its alphabet is the 256 bytes, so any text is representable and comes back unchanged, and
the merges learnt on the corpus make every common word of the world one token. Roles are marked by special
tokens, which keeps token borders where messages meet the same however a conversation is cut. Teacher and
student share these files, as offline distillation needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.digit_scenes.world import SIDE

__all__ = [
    "CHAT_TEMPLATE",
    "MAX_VOCABULARY",
    "PATCH",
    "TOKENS_PER_IMAGE",
    "build_processor",
    "save_processor",
    "train_tokenizer",
]

MAX_VOCABULARY = 512
PATCH = 8
"""Side of the vision tower's patches in pixels."""
TOKENS_PER_IMAGE = (SIDE // PATCH) ** 2

_SPECIAL = ("<pad>", "<end>", "<image>", "<system>", "<user>", "<assistant>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<' + message['role'] + '>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- '<end>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A `PreTrainedTokenizerFast` learnt from texts (prompts and answers apart, as they are tokenised apart)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<image>", "<system>", "<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )


def build_processor(tokenizer: Any) -> Any:
    """The `LlavaProcessor`: any image to 32 x 32 pixels in [-1, 1], each <image> to 16 image tokens."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )
    # The tower puts a class token before the patches; "default" drops it again.
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(processor: Any, folder: Path) -> None:
    """Write tokenizer, template and image settings in the file names that transformers and vLLM look for."""
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
