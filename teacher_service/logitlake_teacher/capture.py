"""One unit of samples: load its images, get its answers, encode, commit.

A unit commits itself where it was computed, and only as a whole; running it again is free once it is committed.
What the teacher cannot answer becomes an error row of the unit's commit record, with a code, never a gap.
"""

from collections.abc import Mapping, Sequence

from logitlake_schemas import Codec, CommitRecord, SampledPolicy, StoredError, UnitError
from logitlake_shared.draws import drawn_error, encode_draws
from logitlake_shared.lake import Cache, UnitResult
from logitlake_shared.rendering import Renderer
from logitlake_shared.rows import LakeSample
from logitlake_shared.topk import (
    DrawnRows,
    StoredRows,
    TeacherRows,
    concatenate,
    encode,
    own_figures,
    split,
    stored_error,
)
from logitlake_teacher.answers import Answer, answers_of
from logitlake_teacher.engines.base import Engine
from logitlake_teacher.items import Unit
from logitlake_teacher.unit_images import LoadImages, load_images
from logitlake_teacher.unit_work import committed_record, crash_errors, images_of, in_order

__all__ = ["capture_unit"]


def capture_unit(
    engine: Engine,
    unit: Unit,
    cache: Cache,
    crashed: Mapping[str, str],
    renderer: Renderer,
    load: LoadImages = load_images,
) -> CommitRecord:
    """Captures a unit of samples and commits it; returns the commit record that counts.

    `crashed` maps the ids that are known to kill the teacher to what happened; they are not tried again. `renderer` is
    the one that the items were planned with. Raises `EngineError` if the teacher cannot go on, `DataError` if an image
    is not the one that was planned, `LakeError` if the lake refuses.
    """
    committed = committed_record(cache, unit)
    if committed is not None:
        return committed
    images = load(unit.items)
    errors = images.errors | crash_errors(unit, crashed)
    todo = [item for item in unit.items if item.item_id not in errors]
    accepted: list[Answer] = []
    for item, answer in zip(todo, answers_of(engine, todo, images.decoded, cache.spec, renderer), strict=True):
        if isinstance(answer, UnitError):
            errors[item.item_id] = answer
        else:
            accepted.append(answer)
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


def _encoded(answers: Sequence[Answer], codec: Codec) -> tuple[list[LakeSample], StoredError | None]:
    """The samples as they are stored, and what storing them cost; encoded all at once, which is many times faster."""
    if not answers:
        return [], None
    stored, error = _encoded_rows([answer.rows for answer in answers], codec)
    parts = split(stored, [len(answer.sample.response_ids) for answer in answers])
    return [_lake_sample(answer, part, codec) for answer, part in zip(answers, parts, strict=True)], error


def _encoded_rows(answers: Sequence[TeacherRows | DrawnRows], codec: Codec) -> tuple[StoredRows, StoredError]:
    if isinstance(codec, SampledPolicy):
        stored = encode_draws(concatenate([rows for rows in answers if isinstance(rows, DrawnRows)]))
        return stored, drawn_error(stored)
    rows = concatenate([rows for rows in answers if isinstance(rows, TeacherRows)])
    stored = encode(rows, codec)
    return stored, stored_error(rows, stored)


def _lake_sample(answer: Answer, stored: StoredRows, codec: Codec) -> LakeSample:
    sample, no_image_T = answer.sample, answer.no_image_logprob_T
    return LakeSample(
        sample_id=sample.sample_id,
        task=sample.task,
        source=sample.source,
        split=sample.split,
        messages=sample.messages,
        prompt_ids=sample.prompt_ids,
        prompt_lengths=sample.prompt_lengths,
        response_ids=sample.response_ids,
        response_lengths=sample.response_lengths,
        expanded_length=answer.expanded_length,
        image_sha256=sample.image_sha256,
        rows=stored,
        finish_reason=answer.finish_reason,
        label_logprob_no_image_T=None if no_image_T is None else own_figures(no_image_T, codec),
    )
