"""Lakes that benchmarks make: real shards by the real writer, filled with seeded numbers instead of a teacher's.

The distributions are sharp as those of a real teacher are (a few likely tokens, a long tail) over a vocabulary of
151,936 ids; what a query costs does not depend on more than that.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitlake_schemas import CaptureSpec, CodecPolicy, DatasetIdentity, EngineIdentity, TokenizerIdentity
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.rows import LakeSample
from logitlake_shared.topk import TeacherRows, encode, split, stored_error

__all__ = ["FOLDER", "VOCAB_SIZE", "made_lake", "make_rows", "make_spec", "make_unit"]

FOLDER = Path("runs/bench")
VOCAB_SIZE = 151_936
K = 32
_TASKS = ("caption", "reading", "counting", "chart", "chat", "code", "ocr", "vqa")
# Odd, hence without a common factor with the vocabulary's 2^7 * 1187: the ids of one token never repeat.
_ID_STEP = 7919


def made_lake(folder: Path, build: Callable[[Lake], None]) -> Path:
    """`folder` as a lake that `build` filled; made when it is not there, whole or not at all."""
    if not folder.is_dir():
        building = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.parent.mkdir(parents=True, exist_ok=True)
        build(Lake.create(building))
        building.rename(folder)
    return folder


def make_spec(num_samples: int, unit_tokens: int, codec: CodecPolicy | None = None) -> CaptureSpec:
    """A spec of samples with the default codec, `K` entries at most."""
    return CaptureSpec(
        kind="samples",
        tokenizer=TokenizerIdentity(
            token_map_sha256="a" * 64,
            chat_template_sha256="b" * 64,
            renderer="made/1",
            vocab_size=VOCAB_SIZE,
            eos_id=1,
            image_token_id=None,
        ),
        engine=EngineIdentity(
            engine="fake",
            engine_version="1",
            model="made",
            weights_sha256="c" * 64,
            dtype="float32",
            image_processor_sha256=None,
        ),
        codec=codec or CodecPolicy(k_max=K),
        dataset=DatasetIdentity(snapshot_sha256="d" * 64, num_samples=num_samples, unit_tokens=unit_tokens),
    )


def make_unit(number: int, num_samples: int, num_tokens: int, codec: CodecPolicy) -> UnitResult:
    """Unit `number`: `num_samples` samples of `num_tokens` response tokens each."""
    captured = make_rows(number, num_samples * num_tokens)
    stored = encode(captured, codec)
    generator = np.random.default_rng(number)
    response_ids = generator.integers(2, VOCAB_SIZE, (num_samples, num_tokens), np.int32)
    response_ids[:, -1] = 1
    prompt_ids = generator.integers(2, VOCAB_SIZE, (num_samples, 24), np.int32)
    samples = [
        LakeSample(
            sample_id=f"sample-{number:06d}-{place:04d}",
            task=_TASKS[(number + place) % len(_TASKS)],
            source="made",
            split="train",
            messages=[{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "An answer."}],
            prompt_ids=prompt_ids[place],
            prompt_lengths=np.array([prompt_ids.shape[1]], np.int32),
            response_ids=response_ids[place],
            response_lengths=np.array([num_tokens], np.int32),
            expanded_length=prompt_ids.shape[1] + num_tokens,
            image_sha256=(),
            rows=rows,
            finish_reason="given",
        )
        for place, rows in enumerate(split(stored, [num_tokens] * num_samples))
    ]
    return UnitResult(unit=f"{number:06d}-made", samples=samples, stored_error=stored_error(captured, stored))


def make_rows(number: int, num_tokens: int) -> TeacherRows:
    """What the teacher says of unit `number`, `K` entries a token: weights that fall by random factors, and a tail."""
    generator = np.random.default_rng([number, 1])
    decay_T1 = generator.uniform(0.1, 2.5, (num_tokens, 1))
    falls_TK = generator.exponential(1, (num_tokens, K)) * decay_T1
    falls_TK[:, 0] = 0
    logits_TK = -np.cumsum(falls_TK, axis=1)
    tail_T1 = np.exp(logits_TK[:, -1:]) * generator.uniform(0.5, 4, (num_tokens, 1))
    log_sum_T1 = np.log(np.exp(logits_TK).sum(1, keepdims=True) + tail_T1)
    logprobs_TK = logits_TK - log_sum_T1
    first_T1 = generator.zipf(1.3, (num_tokens, 1)) % VOCAB_SIZE
    ids_TK = (first_T1 + np.arange(K) * _ID_STEP) % VOCAB_SIZE
    rank_T: npt.NDArray[np.int64] = np.minimum(generator.geometric(0.6, num_tokens), K)
    return TeacherRows(
        topk_ids_TK=ids_TK.astype(np.int32),
        topk_logprobs_TK=logprobs_TK.astype(np.float32),
        label_logprob_T=logprobs_TK[np.arange(num_tokens), rank_T - 1].astype(np.float32),
        label_rank_T=rank_T.astype(np.int32),
        log_tail_mass_T=(np.log(tail_T1) - log_sum_T1)[:, 0].astype(np.float32),
    )
