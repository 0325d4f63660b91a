"""Fixtures that more than one package's tests use: a small lake, written through the real writer."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from tests.tiny_models import save_tiny_llava, save_tiny_qwen_vl

from logitlake_schemas import (
    CacheKind,
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


def make_spec(kind: CacheKind = "samples") -> CaptureSpec:
    """A spec, complete and small."""
    return CaptureSpec(
        kind=kind,
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
def capture_spec() -> CaptureSpec:
    """A spec of samples."""
    return make_spec()


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


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random LLaVA (CLIP tower, Qwen3, 16 tokens an image, 256 positions), stock in every respect."""
    folder = tmp_path_factory.mktemp("models") / "tiny-teacher"
    save_tiny_llava(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Qwen3-VL (a token for each 8x8 pixels, 4 to 32 an image, 256 positions), stock too."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen-vl"
    save_tiny_qwen_vl(folder)
    return folder


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`run_command("logitlake-teacher", "plan", config, "a.b=c")`: a console script, run to its end in this process."""
    mains = {
        "logitlake": "logitlake_shared.cli",
        "logitlake-teacher": "logitlake_teacher.cli",
        "logitlake-student": "logitlake_student.cli",
    }

    def run(program: str, *arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            import_module(mains[program]).main()
        out, err = capsys.readouterr()
        return Finished(int(ended.value.code or 0), out, err)

    return run
