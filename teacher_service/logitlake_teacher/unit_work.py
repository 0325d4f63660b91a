"""What capturing a unit of samples and a unit of pairs have in common.

What the teacher returns is checked before it may be written; whatever fails becomes a `UnitError` with a code, never a
gap.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

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
from logitlake_shared.lake import Cache, UnitResult
from logitlake_shared.rows import LakeImage
from logitlake_shared.teacher_checks import check_rows
from logitlake_shared.topk import DrawnRows, TeacherRows, concatenate
from logitlake_teacher.engines.base import Int32Array, SampleProblem, ScoredSample, ScoreRequest
from logitlake_teacher.items import Item, PlannedSample, Unit

__all__ = [
    "Errors",
    "Publish",
    "accept",
    "accept_all",
    "committed_record",
    "crash_errors",
    "images_of",
    "in_order",
    "request_of",
    "temperatures_of",
]

Errors = dict[str, UnitError]
Publish = Callable[[UnitResult], CommitRecord]
"""`Cache.publish_unit`, or something around it"""


def committed_record(cache: Cache, unit: Unit) -> CommitRecord | None:
    """The unit's commit record, if it has one: then there is nothing to do."""
    if cache.store.get(layout.commit_path(cache.name, unit.unit_id)) is None:
        return None
    return cache.commit(unit.unit_id)


def request_of(sample: PlannedSample, decoded: Mapping[str, DecodedImage]) -> ScoreRequest:
    """What to ask the teacher about the sample; `decoded` holds its images by sha256."""
    pixels = tuple([decoded[sha256] for sha256 in sample.image_sha256])
    return ScoreRequest(
        sample.sample_id,
        sample.prompt_ids,
        sample.prompt_lengths,
        sample.response_ids,
        sample.response_lengths,
        pixels,
    )


def accept(
    item: Item, answer: ScoredSample | SampleProblem, label_ids_T: Int32Array, spec: CaptureSpec
) -> ScoredSample | UnitError:
    """The answer if it may be written, else why not. `label_ids_T` are the response tokens that were asked about."""
    (checked,) = accept_all([item], [answer], [label_ids_T], spec)
    return checked


def accept_all(
    items: Sequence[Item],
    answers: Sequence[ScoredSample | SampleProblem],
    label_ids: Sequence[Int32Array],
    spec: CaptureSpec,
) -> list[ScoredSample | UnitError]:
    """`accept` of many: all rows are checked at once, which is many times faster than one by one.

    Only where something is wrong is each looked at alone, to say whose it is.
    """
    own = zip(items, answers, label_ids, strict=True)
    checked = [_complete(item, answer, label_ids_T, spec) for item, answer, label_ids_T in own]
    places = [place for place, answer in enumerate(checked) if isinstance(answer, ScoredSample)]
    scored = [answer for answer in checked if isinstance(answer, ScoredSample)]
    labels = [label_ids[place] for place in places]
    # Pairs keep no entries, so any number of them will do; rows of different widths cannot be joined.
    same_width = len({_entries(answer.rows).shape[1] for answer in scored}) == 1
    if not scored or (same_width and _fault(_joined(scored), np.concatenate(labels), spec) is None):
        return checked
    for place, answer, label_ids_T in zip(places, scored, labels, strict=True):
        fault = _fault(answer.rows, label_ids_T, spec)
        if fault is not None:
            code, _, message = fault.partition(": ")
            checked[place] = UnitError(sample_id=items[place].item_id, code=code, message=message)
    return checked


def _complete(
    item: Item, answer: ScoredSample | SampleProblem, label_ids_T: Int32Array, spec: CaptureSpec
) -> ScoredSample | UnitError:
    """Whether there is a row for each token, and each as wide as was asked for."""
    if isinstance(answer, SampleProblem):
        return UnitError(sample_id=item.item_id, code=answer.code, message=answer.message)
    num_rows, width = _entries(answer.rows).shape
    if num_rows != len(label_ids_T) or len(answer.rows.label_logprob_T) != num_rows:
        wrong = f"{num_rows} rows for {len(label_ids_T)} response tokens"
    elif spec.kind == "samples" and width != _width(spec.codec):
        wrong = f"{width} entries a token, {_width(spec.codec)} were asked for"
    else:
        return answer
    return UnitError(sample_id=item.item_id, code="teacher_invalid", message=f"the teacher returned {wrong}")


def _entries(rows: TeacherRows | DrawnRows) -> Int32Array:
    return rows.drawn_ids_TN if isinstance(rows, DrawnRows) else rows.topk_ids_TK


def _width(codec: Codec) -> int:
    return codec.draws if isinstance(codec, SampledPolicy) else codec.k_max


def _fault(rows: TeacherRows | DrawnRows, label_ids_T: Int32Array, spec: CaptureSpec) -> str | None:
    """What is wrong with the rows, beginning with its code."""
    try:
        if isinstance(rows, DrawnRows):
            assert isinstance(spec.codec, SampledPolicy)
            check_draws(rows, spec.codec, spec.tokenizer.vocab_size)
        else:
            check_rows(rows, spec.tokenizer.vocab_size, label_ids_T, temperatures_of(spec.codec))
    except EngineError as error:
        return str(error)
    return None


def _joined(scored: Sequence[ScoredSample]) -> TeacherRows | DrawnRows:
    first = scored[0].rows
    if isinstance(first, DrawnRows):
        return concatenate([answer.rows for answer in scored if isinstance(answer.rows, DrawnRows)])
    return concatenate([answer.rows for answer in scored if isinstance(answer.rows, TeacherRows)])


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
