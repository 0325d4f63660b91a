"""Makes the golden lake of the columns that were added to format 1. Run once, when they are: it is never made again.

python -m tests.golden.make_format_1_additions

format-1-additions/lake/        caches whose spec asks for them, and shards with and without a value in them
format-1-additions/values.json  what their rows say, as plain JSON
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from tests.conftest import EOS_ID, VOCAB_SIZE, make_png, make_teacher_rows
from tests.golden.make_format_1 import spec, values

from logitlake_schemas import CodecPolicy, GenerateMode
from logitlake_shared.images import inspect_image
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.rows import LakePair, LakeSample
from logitlake_shared.topk import TeacherRows, concatenate, encode, own_figures, stored_error

FOLDER = Path(__file__).parent / "format-1-additions"
LENGTHS = (3, 2)
POLICIES = {
    "grid": CodecPolicy(k_max=8, k_min=2, p_min=0.02, temperatures=(2, 4)),
    "exact": CodecPolicy(k_max=8, k_min=1, p_min=0.0, grid="exact", temperatures=(4,)),
}


def main() -> None:
    """Writes the lake and its values."""
    lake = Lake.create(FOLDER / "lake")
    for name, codec in POLICIES.items():
        scored = spec("samples", codec).model_copy(update={"no_image_pass": True})
        fill_samples(lake.create_cache(name, scored), "given")
    written = spec("samples", POLICIES["grid"]).model_copy(
        update={"no_image_pass": True, "mode": GenerateMode(type="generate", max_new_tokens=3)}
    )
    fill_samples(lake.create_cache("written", written), "length")
    pairs = spec("pairs", CodecPolicy(k_max=1, k_min=1, p_min=0.0, grid="exact"))
    fill_pairs(lake.create_cache("pairs", pairs.model_copy(update={"no_image_pass": True})))
    (FOLDER / "values.json").write_text(json.dumps(values(lake), indent=1) + "\n", encoding="utf-8")


def fill_samples(cache: Cache, finish_reason: str) -> None:
    """Two units: one of samples about an image and without one, one of a sample without an image alone."""
    codec = cache.spec.codec
    assert isinstance(codec, CodecPolicy)
    image = inspect_image(make_png(1))
    for unit, lengths in ((1, LENGTHS), (2, LENGTHS[:1])):
        images = [image] if unit == 1 else []
        samples, captured = [], []
        for place, length in enumerate(lengths):
            response = list(range(7, 7 + length)) if finish_reason == "length" else [*range(7, 6 + length), EOS_ID]
            rows = _tempered(make_teacher_rows(length, codec.k_max, 10 * unit + place, labels=response), codec)
            captured.append(rows)
            sees = (image.image_sha256,) if images and not place else ()
            samples.append(
                LakeSample(
                    sample_id=f"sample-{unit}-{place}",
                    task="caption",
                    source="golden",
                    split="train",
                    messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
                    prompt_ids=np.array([5, 2, 6] if sees else [5, 6], np.int32),
                    prompt_lengths=np.array([3 if sees else 2], np.int32),
                    response_ids=np.array(response, np.int32),
                    response_lengths=np.array([length], np.int32),
                    expanded_length=length + (18 if sees else 2),
                    image_sha256=sees,
                    rows=encode(rows, codec),
                    finish_reason=finish_reason,
                    label_logprob_no_image_T=own_figures(rows.label_logprob_T - 0.5, codec) if sees else None,
                )
            )
        together = concatenate(captured)
        error = stored_error(together, encode(together, codec))
        cache.publish_unit(UnitResult(unit=f"{unit:06d}-golden", samples=samples, images=images, stored_error=error))
        cache.snapshot()


def _tempered(rows: TeacherRows, codec: CodecPolicy) -> TeacherRows:
    """Tails at the codec's temperatures, as of 32 equal tokens beside the 8 that were captured."""
    scaled = [rows.topk_logprobs_TK.astype(np.float64) / temperature for temperature in codec.temperatures]
    rest_T = rows.log_tail_mass_T.astype(np.float64) - np.log(VOCAB_SIZE - codec.k_max)
    tails = []
    for temperature, scaled_TK in zip(codec.temperatures, scaled, strict=True):
        outside_T = (VOCAB_SIZE - codec.k_max) * np.exp(rest_T / temperature)
        tails.append(np.log(outside_T / (outside_T + np.exp(scaled_TK).sum(1))))
    return replace(rows, log_tail_mass_TX=np.stack(tails, axis=1).astype(np.float32))


def fill_pairs(cache: Cache) -> None:
    """A pair of a dataset, a pair that the teacher made, and a unit of a pair without an image."""
    image = inspect_image(make_png(3))
    given = LakePair(
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
        chosen_logprobs_no_image=np.array([-2.5, -0.25], np.float32),
        rejected_logprobs_no_image=np.array([-1.75, -0.5, -0.25], np.float32),
    )
    made = replace(given, pair_id="pair-2", made_by='{"by":"judge"}', chosen_rating=1.5, rejected_rating=-0.75)
    blind = replace(
        given, pair_id="pair-3", image_sha256=(), chosen_logprobs_no_image=None, rejected_logprobs_no_image=None
    )
    cache.publish_unit(UnitResult(unit="000001-golden", pairs=[given, made], images=[image]))
    cache.publish_unit(UnitResult(unit="000002-golden", pairs=[blind]))
    cache.snapshot()


if __name__ == "__main__":
    main()
