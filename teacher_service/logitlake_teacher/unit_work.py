"""What capturing a unit of samples and a unit of pairs have in common.

What the teacher returns is checked before it may be written; whatever fails becomes a `UnitError` with a code, never a
gap.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from logitlake_schemas import (
    CaptureSpec,
    Codec,
    CodecPolicy,
    CommitRecord,
    SampledPolicy,
    Temperature,
    UnitError,
    layout,
)
from logitlake_shared.draws import check_draws
from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage
from logitlake_shared.lake import Cache
from logitlake_shared.rows import LakeImage
from logitlake_shared.teacher_checks import check_rows
from logitlake_shared.topk import DrawnRows
from logitlake_teacher.engines.base import Int32Array, SampleProblem, ScoredSample, ScoreRequest
from logitlake_teacher.items import Item, PlannedPair, PlannedSample, Unit

__all__ = [
    "Errors",
    "accept",
    "committed_record",
    "crash_errors",
    "images_of",
    "in_order",
    "requests_of",
    "temperatures_of",
]

Errors = dict[str, UnitError]


def committed_record(cache: Cache, unit: Unit) -> CommitRecord | None:
    """The unit's commit record, if it has one: then there is nothing to do."""
    if cache.store.get(layout.commit_path(cache.name, unit.unit_id)) is None:
        return None
    return cache.commit(unit.unit_id)


def requests_of(item: Item, decoded: Mapping[str, DecodedImage]) -> list[ScoreRequest]:
    """What to ask the teacher about the item: one request for a sample, chosen and rejected for a pair."""
    pixels = tuple(decoded[sha256] for sha256 in item.image_sha256)
    if isinstance(item, PlannedSample):
        return [
            ScoreRequest(
                item.sample_id, item.prompt_ids, item.prompt_lengths, item.response_ids, item.response_lengths, pixels
            )
        ]
    return [_pair_request(item, role, pixels) for role in ("chosen", "rejected")]


def accept(
    item: Item, answer: ScoredSample | SampleProblem, label_ids_T: Int32Array, spec: CaptureSpec
) -> ScoredSample | UnitError:
    """The answer if it may be written, else why not. `label_ids_T` are the response tokens that were asked about."""
    if isinstance(answer, SampleProblem):
        return UnitError(sample_id=item.item_id, code=answer.code, message=answer.message)
    num_rows = len(answer.rows.label_logprob_T)
    if num_rows != len(label_ids_T):
        return UnitError(
            sample_id=item.item_id,
            code="teacher_invalid",
            message=f"the teacher returned {num_rows} rows for {len(label_ids_T)} response tokens",
        )
    try:
        if isinstance(answer.rows, DrawnRows):
            assert isinstance(spec.codec, SampledPolicy)
            check_draws(answer.rows, spec.codec, spec.tokenizer.vocab_size)
        else:
            check_rows(answer.rows, spec.tokenizer.vocab_size, label_ids_T, temperatures_of(spec.codec))
    except EngineError as error:
        code, _, message = str(error).partition(": ")
        return UnitError(sample_id=item.item_id, code=code, message=message)
    return answer


def temperatures_of(codec: Codec) -> tuple[Temperature, ...]:
    """Temperatures beside 1 at which a cache with this codec stores the tail mass."""
    return codec.temperatures if isinstance(codec, CodecPolicy) else ()


def crash_errors(unit: Unit, crashed: Mapping[str, str]) -> Errors:
    """An error for each item of the unit that is known to kill the teacher; `crashed`: id -> `code: message`."""
    errors: Errors = {}
    for item in unit.items:
        if item.item_id in crashed:
            code, _, message = crashed[item.item_id].partition(": ")
            errors[item.item_id] = UnitError(sample_id=item.item_id, code=code, message=message)
    return errors


def in_order(unit: Unit, errors: Errors) -> list[UnitError]:
    """The errors in the order of the unit's items, so that the commit record has one form."""
    return [errors[item.item_id] for item in unit.items if item.item_id in errors]


def images_of(captured: Iterable[tuple[str, ...]], encoded: Mapping[str, LakeImage]) -> list[LakeImage]:
    """The images that the captured rows name, each once, in the order of first mention."""
    return [encoded[sha256] for sha256 in dict.fromkeys(sha256 for row in captured for sha256 in row)]


def _pair_request(pair: PlannedPair, role: str, pixels: tuple[DecodedImage, ...]) -> ScoreRequest:
    response_ids = pair.chosen_ids if role == "chosen" else pair.rejected_ids
    return ScoreRequest(
        f"{pair.pair_id}/{role}",
        pair.prompt_ids,
        np.array([len(pair.prompt_ids)], np.int32),
        response_ids,
        np.array([len(response_ids)], np.int32),
        pixels,
    )
