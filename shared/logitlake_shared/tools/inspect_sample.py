"""One sample or pair as a person wants to see it: what was asked, what was answered, what the teacher thought.

A pure record (`SampleView`), which the terminal prints and `--output json` writes; with a student's scores it says what
the student thinks, too. Token texts are there where the
teacher's tokenizer is (see `token_text`); everything else comes from the lake alone.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitlake_schemas import CommitRecord, layout
from logitlake_shared.catalog import Catalog, Place
from logitlake_shared.errors import ConfigError, DataError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.rows import LakePair, LakeSample, pairs_from_table, samples_from_table
from logitlake_shared.student_scores import ScoredSample

__all__ = [
    "Alternative",
    "FoundSample",
    "ImageView",
    "Response",
    "SampleView",
    "StudentToken",
    "TokenView",
    "find_sample",
    "save_image",
    "stored_images",
    "view_sample",
]

Decode = Callable[[int], str] | None
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FoundSample:
    """Where a sample lies."""

    cache: Cache
    commit: CommitRecord
    place: Place
    also_in: tuple[str, ...]
    """other caches that hold the same id"""


@dataclass(frozen=True)
class Alternative:
    """One stored entry of a token's distribution."""

    token_id: int
    text: str | None
    probability: float


@dataclass(frozen=True)
class StudentToken:
    """What a student makes of the token, over its whole vocabulary."""

    logprob: float
    rank: int
    entropy: float
    forward_kl: float
    """KL(teacher‖student) in nats, the teacher's tail as one class"""
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class TokenView:
    """One response token. Rank, entropy, tail and alternatives are None for pairs, which store logprobs alone."""

    position: int
    token_id: int
    text: str | None
    logprob: float
    rank: int | None = None
    entropy: float | None = None
    tail_mass: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    logprob_no_image: float | None = None
    """with the images left out, where that was captured"""
    student: StudentToken | None = None


@dataclass(frozen=True)
class Response:
    """One response: a turn of the assistant, or a pair's `chosen` and `rejected`."""

    name: str
    logprob_sum: float
    tokens: tuple[TokenView, ...]
    rating: float | None = None
    """by which a made pair was ranked"""


@dataclass(frozen=True)
class ImageView:
    """One image of the sample."""

    sha256: str
    format: str
    width: int
    height: int
    bytes: int
    saved_to: str | None


@dataclass(frozen=True)
class SampleView:
    """All of it."""

    id: str
    kind: str
    cache: str
    fingerprint: str
    teacher: str
    task: str
    source: str
    split: str
    messages: list[dict[str, Any]]
    prompt_tokens: int
    expanded_length: int | None
    ended_by: str
    images: tuple[ImageView, ...]
    responses: tuple[Response, ...]
    tokenizer: str
    """how the texts were made, or why there are none"""
    student: str | None = None
    """whose scores stand beside the teacher's"""


def find_sample(lake: Lake, sample_id: str, cache: str | None = None) -> FoundSample:
    """Where the sample or pair lies, in the newest snapshots. Raises `DataError` where it is not."""
    if cache is not None:
        lake.cache(cache)  # a name that is no cache is another mistake than an id that is no sample
    with Catalog(lake) as catalog:
        places = catalog.find(sample_id, cache)
        if not places:
            known = catalog.query("SELECT DISTINCT sample_id FROM sample_index LIMIT 3").column(0).to_pylist()
            raise DataError(
                f"{lake.store.uri}: no sample or pair {sample_id!r} in {cache or 'any cache'}; ids look like "
                f'{", ".join(known)}; list them with: logitlake sql {lake.store.uri} "SELECT * FROM sample_index"'
            )
    first, *others = places
    found = lake.cache(first.cache)
    unit = layout.unit_of_shard(first.entry.path)
    commit = next(commit for commit in found.open_snapshot().commits if commit.unit == unit)
    return FoundSample(found, commit, first, tuple(place.cache for place in others))


def view_sample(
    found: FoundSample,
    decode: Decode,
    note: str,
    *,
    top: int = 5,
    save_to: Path | None = None,
    student: tuple[str, ScoredSample] | None = None,
) -> SampleView:
    """The sample, its images saved into the folder `save_to` where one is named, beside a student's name and scores.

    Raises `LakeCorruptError`, `DataError` for the scores of another sample.
    """
    cache, row = found.cache, _read(found)
    scored = None if student is None else _fitting(row, *student)
    return SampleView(
        id=row.sample_id if isinstance(row, LakeSample) else row.pair_id,
        kind=cache.spec.kind,
        cache=cache.name,
        fingerprint=cache.fingerprint,
        teacher=f"{cache.spec.engine.model} ({cache.spec.engine.engine} {cache.spec.engine.engine_version})",
        task=row.task,
        source=row.source,
        split=row.split,
        messages=[dict(message) for message in row.messages],
        prompt_tokens=len(row.prompt_ids),
        expanded_length=row.expanded_length if isinstance(row, LakeSample) else None,
        ended_by=row.finish_reason if isinstance(row, LakeSample) else row.made_by,
        images=_images(found, row.image_sha256, save_to),
        responses=_responses(row, decode, top, scored) if isinstance(row, LakeSample) else _sides(row, decode),
        tokenizer=note,
        student=None if student is None else student[0],
    )


def _read(found: FoundSample) -> LakeSample | LakePair:
    """The row alone: its row group is read, its shard verified."""
    place = found.place
    with closing(found.cache.open(place.entry)) as shard:
        before = sum(shard.group_rows[: place.row_group])
        table = shard.read(group=place.row_group).slice(place.row - before, 1)
    rows: list[LakeSample] | list[LakePair]
    rows = samples_from_table(table) if place.entry.kind == "samples" else pairs_from_table(table)
    return rows[0]


def _fitting(row: LakeSample | LakePair, student: str, scored: ScoredSample) -> ScoredSample:
    """The scores, if they are of just this sample."""
    tokens = len(row.response_ids) if isinstance(row, LakeSample) and row.sample_id == scored.sample_id else None
    if tokens != len(scored.label_logprob_T):
        raise DataError(
            f"the scores of {student} for sample {scored.sample_id!r} are not those of the sample in this cache; run "
            "`logitlake-student score` again"
        )
    return scored


def _responses(sample: LakeSample, decode: Decode, top: int, scored: ScoredSample | None) -> tuple[Response, ...]:
    rows = sample.rows
    stops = np.cumsum(rows.k_T.astype(np.int64))
    tokens = [
        TokenView(
            position=t,
            token_id=int(token_id),
            text=decode(int(token_id)) if decode else None,
            logprob=float(rows.label_logprob_T[t]),
            rank=int(rows.label_rank_T[t]),
            entropy=float(rows.entropy_T[t]),
            tail_mass=float(np.exp(rows.log_tail_mass_T[t])),
            alternatives=_alternatives(
                rows.topk_ids[stops[t] - rows.k_T[t] : stops[t]][:top],
                rows.topk_logprobs[stops[t] - rows.k_T[t] : stops[t]][:top],
                decode,
            ),
            logprob_no_image=_at(sample.label_logprob_no_image_T, t),
            student=None if scored is None else _student_token(scored, t, decode, top),
        )
        for t, token_id in enumerate(sample.response_ids)
    ]
    turns = np.split(np.arange(len(tokens)), np.cumsum(sample.response_lengths)[:-1])
    names = ["response"] if len(turns) == 1 else [f"response {number}" for number in range(1, len(turns) + 1)]
    return tuple(_response(name, [tokens[t] for t in turn]) for name, turn in zip(names, turns, strict=True))


def _student_token(scored: ScoredSample, t: int, decode: Decode, top: int) -> StudentToken:
    return StudentToken(
        logprob=float(scored.label_logprob_T[t]),
        rank=int(scored.label_rank_T[t]),
        entropy=float(scored.entropy_T[t]),
        forward_kl=float(scored.forward_kl_T[t]),
        alternatives=_alternatives(scored.topk_ids_TK[t, :top], scored.topk_logprobs_TK[t, :top], decode),
    )


def _alternatives(ids_K: Int32, logprobs_K: Float32, decode: Decode) -> tuple[Alternative, ...]:
    return tuple(
        Alternative(int(other), decode(int(other)) if decode else None, float(np.exp(logprob)))
        for other, logprob in zip(ids_K, logprobs_K, strict=True)
    )


def _sides(pair: LakePair, decode: Decode) -> tuple[Response, ...]:
    def side(ids: Int32, logprobs: Float32, no_image: Float32 | None) -> list[TokenView]:
        return [
            TokenView(
                t,
                int(token_id),
                decode(int(token_id)) if decode else None,
                float(logprob),
                logprob_no_image=_at(no_image, t),
            )
            for t, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True))
        ]

    chosen = side(pair.chosen_ids, pair.chosen_logprobs, pair.chosen_logprobs_no_image)
    rejected = side(pair.rejected_ids, pair.rejected_logprobs, pair.rejected_logprobs_no_image)
    return (
        _response("chosen", chosen, pair.chosen_rating),
        _response("rejected", rejected, pair.rejected_rating),
    )


def _at(values_T: Float32 | None, t: int) -> float | None:
    return None if values_T is None else float(values_T[t])


def _response(name: str, tokens: Sequence[TokenView], rating: float | None = None) -> Response:
    return Response(name, sum(token.logprob for token in tokens), tuple(tokens), rating)


def stored_images(found: FoundSample, digests: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of these images in the sample's unit, by sha256: format, size, encoded bytes. Raises `DataError`."""
    stored: dict[str, dict[str, Any]] = {}
    for entry in found.commit.shards:
        if entry.kind == "images" and digests:
            table = found.cache.read(entry)
            wanted = table.filter(pc.is_in(table.column("image_sha256"), pa.array(sorted(set(digests)))))
            stored |= {record["image_sha256"]: record for record in wanted.to_pylist()}
    if missing := sorted(set(digests) - stored.keys()):
        raise DataError(
            f"{found.place.entry.path}: names image {missing[0]}, which its unit does not hold; run `logitlake verify`"
        )
    return stored


def _images(found: FoundSample, digests: Sequence[str], save_to: Path | None) -> tuple[ImageView, ...]:
    stored, views = stored_images(found, digests), []
    for digest in digests:
        record = stored[digest]
        saved = None if save_to is None else save_image(save_to, digest, record["format"], record["data"])
        views.append(ImageView(digest, record["format"], record["width"], record["height"], len(record["data"]), saved))
    return tuple(views)


def save_image(folder: Path, sha256: str, image_format: str, data: bytes) -> str:
    """Writes an image into the folder, named by its digest, and returns where. Raises `ConfigError`."""
    path = folder / f"{sha256[:16]}.{image_format.lower()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path}: the image cannot be saved: {error}") from None
    return str(path)
