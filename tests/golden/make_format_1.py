"""Makes the golden lake of format 1. Run once, when the format is made: a golden file is never made again.

python -m tests.golden.make_format_1

format-1/lake/        a lake with every kind of cache and codec, as the writer of its day wrote it
format-1/values.json  what its rows say, as plain JSON
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tests.conftest import EOS_ID, VOCAB_SIZE, make_png, make_teacher_rows

from logitlake_schemas import (
    CaptureSpec,
    Codec,
    CodecPolicy,
    DatasetIdentity,
    EngineIdentity,
    SampledPolicy,
    TokenizerIdentity,
    UnitError,
)
from logitlake_shared.draws import drawn_error, encode_draws
from logitlake_shared.images import inspect_image
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.rows import LakePair, LakeSample
from logitlake_shared.topk import DrawnRows, StoredRows, concatenate, encode, stored_error

FOLDER = Path(__file__).parent / "format-1"
LENGTHS = (3, 1, 4)


def main() -> None:
    """Writes the lake and its values."""
    lake = Lake.create(FOLDER / "lake")
    for name, codec in {
        "grid": CodecPolicy(k_max=8, k_min=2, p_min=0.02),
        "exact": CodecPolicy(k_max=8, k_min=1, p_min=0.0, grid="exact"),
        "draws": SampledPolicy(type="sampled", draws=16, seed=1),
    }.items():
        fill_samples(lake.create_cache(name, spec("samples", codec)))
    fill_pairs(lake.create_cache("pairs", spec("pairs", CodecPolicy(k_max=1, k_min=1, p_min=0.0, grid="exact"))))
    (FOLDER / "values.json").write_text(json.dumps(values(lake), indent=1) + "\n", encoding="utf-8")


def spec(kind: str, codec: Codec) -> CaptureSpec:
    """A complete spec."""
    return CaptureSpec.model_validate(
        {
            "kind": kind,
            "tokenizer": TokenizerIdentity(
                token_map_sha256="a" * 64,
                chat_template_sha256="b" * 64,
                renderer="golden/1",
                vocab_size=VOCAB_SIZE,
                eos_id=EOS_ID,
                image_token_id=2,
            ),
            "engine": EngineIdentity(
                engine="fake",
                engine_version="1",
                model="teacher",
                weights_sha256="c" * 64,
                dtype="float32",
                image_processor_sha256=None,
                options={"seed": 0},
            ),
            "codec": codec,
            "dataset": DatasetIdentity(snapshot_sha256="d" * 64, num_samples=4, unit_tokens=100),
        }
    )


def fill_samples(cache: Cache) -> None:
    """Two units of samples; the second has an image that could not be read, and so an error."""
    for unit in (1, 2):
        image = inspect_image(make_png(unit))
        stored, error = _rows(cache.spec.codec, unit)
        samples = [
            LakeSample(
                sample_id=f"sample-{unit}-{place}",
                task=("caption", "vqa", "vqa")[place],
                source="golden",
                split="train",
                messages=[{"role": "user", "content": "¿Qué?"}, {"role": "assistant", "content": "日本 🙂"}],
                prompt_ids=np.array([5, 2, 6], np.int32),
                prompt_lengths=np.array([3], np.int32),
                response_ids=np.array(_response(length), np.int32),
                response_lengths=np.array([length], np.int32),
                expanded_length=length + 18,
                image_sha256=(image.image_sha256,) if place else (),
                rows=rows,
                finish_reason="given",
            )
            for place, (length, rows) in enumerate(zip(LENGTHS, stored, strict=True))
        ]
        lost = [UnitError(sample_id="lost", code="image_decode", message="not an image")] if unit == 2 else []
        cache.publish_unit(
            UnitResult(unit=f"{unit:06d}-golden", samples=samples, images=[image], errors=lost, stored_error=error)
        )
        cache.snapshot()


def _rows(codec: Codec, seed: int) -> tuple[list[StoredRows], Any]:
    if isinstance(codec, SampledPolicy):
        generator = np.random.default_rng(seed)
        drawn = [
            DrawnRows(
                generator.geometric(0.3, (length, codec.draws)).clip(1, VOCAB_SIZE - 1).astype(np.int32),
                np.linspace(-3, -0.1, length, dtype=np.float32),
                np.arange(1, length + 1, dtype=np.int32),
                np.linspace(0, 2, length, dtype=np.float32),
            )
            for length in LENGTHS
        ]
        return [encode_draws(rows) for rows in drawn], drawn_error(encode_draws(concatenate(drawn)))
    captured = [
        make_teacher_rows(length, codec.k_max, 10 * seed + place, labels=_response(length))
        for place, length in enumerate(LENGTHS)
    ]
    together = concatenate(captured)
    return [encode(rows, codec) for rows in captured], stored_error(together, encode(together, codec))


def _response(length: int) -> list[int]:
    return [*range(7, 6 + length), EOS_ID]


def fill_pairs(cache: Cache) -> None:
    """One unit of one pair."""
    image = inspect_image(make_png(3))
    pair = LakePair(
        pair_id="pair-1",
        task="caption",
        source="golden",
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
    cache.publish_unit(UnitResult(unit="000001-golden", pairs=[pair], images=[image]))
    cache.snapshot()


def values(lake: Lake) -> dict[str, Any]:
    """Every column of every row of the newest snapshots, and the fingerprints. -inf is the string "-inf".

    A nullable column is named where it has a value: a row says the same whatever columns came to the format after it.
    """
    said: dict[str, Any] = {}
    for name in lake.cache_names():
        cache = lake.cache(name)
        said[name] = {"fingerprint": cache.fingerprint, "commits": [], "rows": []}
        for commit in cache.open_snapshot().commits:
            said[name]["commits"].append([commit.unit, [error.code for error in commit.errors]])
            for entry in commit.shards:
                said[name]["rows"] += [_plain(row) for row in cache.read(entry).to_pylist()]
    return said


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


if __name__ == "__main__":
    main()
