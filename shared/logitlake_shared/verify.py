"""Checks a lake against its own records: every committed byte, every invariant of every row.

What a snapshot promises is checked in the order in which it can break: the file is there with the recorded length
and sha256, its pages carry the right checksums, its rows number what the record says, each row obeys the format's
laws, and every image that a row names is stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from logitlake_schemas import CodecPolicy, CommitRecord
from logitlake_shared.errors import LakeError
from logitlake_shared.lake import Cache
from logitlake_shared.rows import LakePair, LakeSample, images_from_table, pairs_from_table, samples_from_table
from logitlake_shared.topk import MASS_TOLERANCE

__all__ = ["Finding", "verify_cache"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    unit: str
    path: str
    problem: str


def verify_cache(cache: Cache, commit: CommitRecord) -> Iterator[Finding]:
    """The findings of one unit; none when it is sound."""
    stored_images: set[str] = set()
    named_images: set[str] = set()
    for entry in sorted(commit.shards, key=lambda entry: entry.kind):  # images come before the rows that name them
        try:
            table = cache.read(entry)
        except LakeError as error:
            yield Finding(commit.unit, entry.path, str(error))
            continue
        if table.num_rows != entry.rows:
            yield Finding(commit.unit, entry.path, f"{table.num_rows} rows, the record says {entry.rows}")
        if entry.kind == "images":
            stored_images |= {image.image_sha256 for image in images_from_table(table)}
            continue
        rows: list[LakeSample] | list[LakePair]
        rows = samples_from_table(table) if entry.kind == "samples" else pairs_from_table(table)
        for row in rows:
            named_images |= set(row.image_sha256)
            problems = _sample_problems(row, cache) if isinstance(row, LakeSample) else _pair_problems(row, cache)
            row_id = row.sample_id if isinstance(row, LakeSample) else row.pair_id
            for problem in problems:
                yield Finding(commit.unit, entry.path, f"{row_id}: {problem}")
    for sha256 in sorted(named_images - stored_images):
        yield Finding(commit.unit, "", f"image {sha256} is named by a row and stored nowhere in its unit")


def _sample_problems(sample: LakeSample, cache: Cache) -> Iterator[str]:
    rows, num_tokens = sample.rows, len(sample.response_ids)
    tokenizer = cache.spec.tokenizer
    if sum(sample.prompt_lengths) != len(sample.prompt_ids) or sum(sample.response_lengths) != num_tokens:
        yield "segment lengths do not sum to the ids"
        return
    lengths = {len(getattr(rows, name)) for name in ("k_T", "label_logprob_T", "label_rank_T", "log_tail_mass_T")}
    if lengths != {num_tokens} or int(rows.k_T.sum()) != len(rows.topk_ids) != len(rows.topk_logprobs):
        yield "columns of different lengths"
        return
    ends = np.cumsum(sample.response_lengths) - 1
    if not (sample.response_ids[ends] == tokenizer.eos_id).all():
        yield "a response does not end with EOS"
    if rows.topk_ids.size and not (rows.topk_ids.min() >= 0 and rows.topk_ids.max() < tokenizer.vocab_size):
        yield f"a top-k id is outside the vocabulary of {tokenizer.vocab_size}"
    if not np.isfinite(rows.topk_logprobs).all() or not np.isfinite(rows.label_logprob_T).all():
        yield "a logprob is not finite"
    stops = np.cumsum(rows.k_T.astype(np.int64))
    for t, (start, stop) in enumerate(zip(stops - rows.k_T, stops, strict=True)):
        ids, logprobs = rows.topk_ids[start:stop], rows.topk_logprobs[start:stop].astype(np.float64)
        if len(np.unique(ids)) != len(ids):
            yield f"token {t}: a top-k id occurs twice"
        if (np.diff(logprobs) > 0).any():
            yield f"token {t}: top-k not in falling order"
        mass = np.exp(logprobs).sum() + np.exp(float(rows.log_tail_mass_T[t]))
        # The grid moves each logprob by half a step at most: 1 % of head mass at the coarsest.
        snapped = isinstance(cache.spec.codec, CodecPolicy) and cache.spec.codec.grid == "companded256"
        if abs(mass - 1) > MASS_TOLERANCE + (0.01 if snapped else 0):
            yield f"token {t}: top-k and tail sum to {mass:.5f}"


def _pair_problems(pair: LakePair, cache: Cache) -> Iterator[str]:
    for side, ids, logprobs in (
        ("chosen", pair.chosen_ids, pair.chosen_logprobs),
        ("rejected", pair.rejected_ids, pair.rejected_logprobs),
    ):
        if len(ids) != len(logprobs):
            yield f"{side}: {len(ids)} tokens but {len(logprobs)} logprobs"
        elif not len(ids) or int(ids[-1]) != cache.spec.tokenizer.eos_id:
            yield f"{side} does not end with EOS"
        elif not np.isfinite(logprobs).all() or (logprobs > 0).any():
            yield f"{side}: a logprob is not finite or above 0"
