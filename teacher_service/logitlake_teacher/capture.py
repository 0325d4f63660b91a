"""One unit of samples: load its images, let the teacher score it, check, encode, commit.

A unit commits itself where it was computed, and only as a whole; running it again is free once it is committed.
What the teacher cannot score becomes an error row of the unit's commit record, with a code, never a gap.
"""

from collections.abc import Mapping, Sequence

from logitlake_schemas import Codec, CommitRecord, SampledPolicy, StoredError, UnitError
from logitlake_shared.draws import drawn_error, encode_draws
from logitlake_shared.lake import Cache, UnitResult
from logitlake_shared.rows import LakeSample
from logitlake_shared.topk import DrawnRows, StoredRows, TeacherRows, concatenate, encode, split, stored_error
from logitlake_teacher.engines.base import Engine, ScoredSample
from logitlake_teacher.items import PlannedSample, Unit
from logitlake_teacher.unit_work import (
    accept,
    committed_record,
    crash_errors,
    images_of,
    in_order,
    load_images,
    requests_of,
)

__all__ = ["capture_unit"]


def capture_unit(engine: Engine, unit: Unit, cache: Cache, crashed: Mapping[str, str]) -> CommitRecord:
    """Captures a unit of samples and commits it; returns the commit record that counts.

    `crashed` maps the ids that are known to kill the teacher to what happened; they are not tried again.
    Raises `EngineError` if the teacher cannot go on, `DataError` if an image is not the one that was planned,
    `LakeError` if the lake refuses.
    """
    committed = committed_record(cache, unit)
    if committed is not None:
        return committed
    images = load_images(unit.items)
    errors = images.errors | crash_errors(unit, crashed)
    todo = [item for item in unit.items if isinstance(item, PlannedSample) and item.item_id not in errors]
    answers = engine.score([request for item in todo for request in requests_of(item, images.decoded)])
    accepted: list[tuple[PlannedSample, ScoredSample]] = []
    for item, answer in zip(todo, answers, strict=True):
        checked = accept(item, answer, item.response_ids, cache.spec)
        if isinstance(checked, UnitError):
            errors[item.item_id] = checked
        else:
            accepted.append((item, checked))
    samples, error = _encoded(accepted, cache.spec.codec)
    return cache.publish_unit(
        UnitResult(
            unit=unit.unit_id,
            samples=samples,
            images=images_of((sample.image_sha256 for sample in samples), images.encoded),
            errors=in_order(unit, errors),
            stored_error=error,
        )
    )


def _encoded(
    accepted: Sequence[tuple[PlannedSample, ScoredSample]], codec: Codec
) -> tuple[list[LakeSample], StoredError | None]:
    """The samples as they are stored, and what storing them cost; encoded all at once, which is many times faster."""
    if not accepted:
        return [], None
    stored, error = _encoded_rows([answer.rows for _, answer in accepted], codec)
    parts = split(stored, [len(item.response_ids) for item, _ in accepted])
    samples = [
        _lake_sample(item, part, answer.expanded_length) for (item, answer), part in zip(accepted, parts, strict=True)
    ]
    return samples, error


def _encoded_rows(answers: Sequence[TeacherRows | DrawnRows], codec: Codec) -> tuple[StoredRows, StoredError]:
    if isinstance(codec, SampledPolicy):
        stored = encode_draws(concatenate([rows for rows in answers if isinstance(rows, DrawnRows)]))
        return stored, drawn_error(stored)
    rows = concatenate([rows for rows in answers if isinstance(rows, TeacherRows)])
    stored = encode(rows, codec)
    return stored, stored_error(rows, stored)


def _lake_sample(item: PlannedSample, stored: StoredRows, expanded_length: int) -> LakeSample:
    return LakeSample(
        sample_id=item.sample_id,
        task=item.task,
        source=item.source,
        split=item.split,
        messages=item.messages,
        prompt_ids=item.prompt_ids,
        prompt_lengths=item.prompt_lengths,
        response_ids=item.response_ids,
        response_lengths=item.response_lengths,
        expanded_length=expanded_length,
        image_sha256=item.image_sha256,
        rows=stored,
        finish_reason="given",
    )
