"""Fixtures that more than one package's tests use: a small lake, written through the real writer."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from logitlake_schemas import (
    CaptureSpec,
    CodecPolicy,
    DatasetIdentity,
    EngineIdentity,
    TokenizerIdentity,
)
from logitlake_shared.images import inspect_image
from logitlake_shared.lake import UnitResult
from logitlake_shared.rows import LakePair, LakeSample
from logitlake_shared.topk import TeacherRows, concatenate, encode, stored_error

# The same examples every time, and no deadline: a busy machine is not a failure.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")

# Nothing in the suite may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB_SIZE = 40
EOS_ID = 1


def make_png(seed: int) -> bytes:
    """A small PNG with a colour of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (seed * 37 % 256, seed * 91 % 256, seed * 53 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def make_teacher_rows(
    num_tokens: int, k: int, seed: int, vocab_size: int = VOCAB_SIZE, labels: Sequence[int] | None = None
) -> TeacherRows:
    """A seeded teacher: the k best of a full distribution over `vocab_size`, with the exact tail."""
    logits_TV = np.random.default_rng(seed).normal(scale=3, size=(num_tokens, vocab_size))
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    order_TV = np.argsort(-logprobs_TV, axis=1)
    labels_T = np.arange(num_tokens) % vocab_size if labels is None else np.array(labels)
    topk_ids_TK = order_TV[:, :k]
    tail_T = np.exp(np.take_along_axis(logprobs_TV, order_TV[:, k:], 1)).sum(1)
    with np.errstate(divide="ignore"):
        log_tail_T = np.log(tail_T)
    return TeacherRows(
        topk_ids_TK=topk_ids_TK.astype(np.int32),
        topk_logprobs_TK=np.take_along_axis(logprobs_TV, topk_ids_TK, 1).astype(np.float32),
        label_logprob_T=logprobs_TV[np.arange(num_tokens), labels_T].astype(np.float32),
        label_rank_T=(order_TV == labels_T[:, None]).argmax(1).astype(np.int32) + 1,
        log_tail_mass_T=log_tail_T.astype(np.float32),
    )


@pytest.fixture
def capture_spec() -> CaptureSpec:
    """A spec of samples, complete and small."""
    return CaptureSpec(
        kind="samples",
        tokenizer=TokenizerIdentity(
            token_map_sha256="a" * 64,
            chat_template_sha256="b" * 64,
            renderer="test/1",
            vocab_size=VOCAB_SIZE,
            eos_id=EOS_ID,
            image_token_id=2,
        ),
        engine=EngineIdentity(
            engine="fake",
            engine_version="1",
            model="teacher",
            weights_sha256="c" * 64,
            dtype="float32",
            image_processor_sha256=None,
        ),
        codec=CodecPolicy(k_max=8, k_min=2),
        dataset=DatasetIdentity(snapshot_sha256="d" * 64, num_samples=6, unit_tokens=100),
    )


@pytest.fixture
def make_unit() -> Callable[..., UnitResult]:
    """`make_unit(3)`: unit 3 with two samples of one image, four response tokens each."""

    def make(number: int, codec: CodecPolicy | None = None, num_samples: int = 2) -> UnitResult:
        policy = codec or CodecPolicy(k_max=8, k_min=2)
        image = inspect_image(make_png(number))
        samples, captured = [], []
        for place in range(num_samples):
            seed = 10 * number + place
            rows = make_teacher_rows(4, policy.k_max, seed, labels=(7, 8, 9, EOS_ID))
            stored = encode(rows, policy)
            captured.append(rows)
            samples.append(
                LakeSample(
                    sample_id=f"sample-{seed:04d}",
                    task=("caption", "reading")[place % 2],
                    source="made",
                    split="train" if number % 2 else "test",
                    messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
                    prompt_ids=np.array([5, 2, 6], np.int32),
                    prompt_lengths=np.array([3], np.int32),
                    response_ids=np.array([7, 8, 9, EOS_ID], np.int32),
                    response_lengths=np.array([4], np.int32),
                    expanded_length=22,
                    image_sha256=(image.image_sha256,),
                    rows=stored,
                    finish_reason="given",
                )
            )
        return UnitResult(
            unit=f"{number:06d}-test",
            samples=samples,
            images=[image],
            stored_error=stored_error(concatenate(captured), encode(concatenate(captured), policy)),
        )

    return make


@pytest.fixture
def make_pair_unit() -> Callable[[int], UnitResult]:
    """`make_pair_unit(3)`: unit 3 with one preference pair."""

    def make(number: int) -> UnitResult:
        image = inspect_image(make_png(number))
        pair = LakePair(
            pair_id=f"pair-{number:04d}",
            task="caption",
            source="made",
            split="train",
            messages=[{"role": "user", "content": "?"}],
            prompt_ids=np.array([5, 2, 6], np.int32),
            image_sha256=(image.image_sha256,),
            chosen_ids=np.array([7, EOS_ID], np.int32),
            rejected_ids=np.array([8, 9, EOS_ID], np.int32),
            chosen_logprobs=np.array([-0.5, -0.25], np.float32),
            rejected_logprobs=np.array([-1.5, -0.5, -0.25], np.float32),
            made_by="dataset",
        )
        return UnitResult(unit=f"{number:06d}-test", pairs=[pair], images=[image])

    return make


@pytest.fixture
def teacher_rows() -> Callable[..., TeacherRows]:
    """`teacher_rows(num_tokens, k, seed)`: see `make_teacher_rows`."""
    return make_teacher_rows


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """`png(seed)`: see `make_png`."""
    return make_png


_TINY_CORPUS = (
    "what is in the picture?",
    "a red seven and a blue two",
    "how many digits are there? three",
    "yes no none",
)
_TINY_TEMPLATE = (
    "{%- for message in messages -%}{{- '<' + message['role'] + '>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- if message['role'] == 'assistant' -%}{{- '<end>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)
_TINY_SPECIAL = ("<pad>", "<end>", "<image>", "<system>", "<user>", "<assistant>")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random LLaVA (CLIP tower, Qwen3, 16 tokens an image, 256 positions), stock in every respect."""
    folder = tmp_path_factory.mktemp("models") / "tiny-teacher"
    tokenizer = _tiny_tokenizer()
    _save_tiny_processor(tokenizer, folder)
    _save_tiny_llava(tokenizer, folder)
    return folder


def _tiny_tokenizer() -> Any:
    """A byte-level BPE of about 300 tokens, so that any text is representable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        _TINY_CORPUS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(_TINY_SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=list(_TINY_SPECIAL[2:]),
        chat_template=_TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _save_tiny_processor(tokenizer: Any, folder: Path) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=_TINY_TEMPLATE,
    )
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def _save_tiny_llava(tokenizer: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=256,
        initializer_range=0.15,  # wide, so that the random teacher has opinions
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )
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


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`run_command("logitlake-teacher", "plan", config, "a.b=c")`: a console script, run to its end in this process."""
    mains = {"logitlake-teacher": "logitlake_teacher.cli", "logitlake-student": "logitlake_student.cli"}

    def run(program: str, *arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            import_module(mains[program]).main()
        out, err = capsys.readouterr()
        return Finished(int(ended.value.code or 0), out, err)

    return run
