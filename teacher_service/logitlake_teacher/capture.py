"""One unit of samples: load its images, get its answers, encode, commit.

A unit commits itself where it was computed, and only as a whole; running it again is free once it is committed.
What the teacher cannot answer becomes an error row of the unit's commit record, with a code, never a gap.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from logitlake_schemas import (
    SAMPLE_COLUMNS,
    Codec,
    CommitRecord,
    SampledPolicy,
    ScoreMode,
    StoredError,
    UnitError,
    arrow_schema,
)
from logitlake_shared.draws import drawn_error, encode_draws
from logitlake_shared.lake import Cache, UnitResult
from logitlake_shared.messages import messages_text
from logitlake_shared.rendering import Renderer
from logitlake_shared.rows import stored_table
from logitlake_shared.topk import (
    DrawnRows,
    StoredRows,
    TeacherRows,
    concatenate,
    encode,
    own_figures,
    stored_error,
)
from logitlake_teacher.answers import Answer, answers_of
from logitlake_teacher.engines.base import Engine
from logitlake_teacher.items import PlannedSample, Unit
from logitlake_teacher.unit_images import LoadImages, load_images
from logitlake_teacher.unit_work import Publish, committed_record, crash_errors, images_of, in_order

__all__ = ["capture_unit"]

_AS_PLANNED = {
    "sample_id": "item_id",
    **{name: name for name in ("task", "source", "split", "messages", "image_sha256")},
    **{name: name for name in ("prompt_ids", "prompt_lengths", "response_ids", "response_lengths")},
}
"""columns of a shard that are fields of the planned sample, and their names in a plan's rows"""
_SHA256 = arrow_schema(SAMPLE_COLUMNS).field("image_sha256").type


def capture_unit(
    engine: Engine,
    unit: Unit,
    cache: Cache,
    crashed: Mapping[str, str],
    renderer: Renderer,
    load: LoadImages = load_images,
    publish: Publish | None = None,
) -> CommitRecord:
    """Captures a unit of samples and commits it, by the cache's own `publish_unit` unless another is given; returns the
    commit record that counts.

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
    scored = isinstance(cache.spec.mode, ScoreMode)
    accepted: list[Answer] = []
    for item, answer in zip(todo, answers_of(engine, todo, images.decoded, cache.spec, renderer), strict=True):
        if isinstance(answer, UnitError):
            errors[item.item_id] = answer
        else:
            accepted.append(answer)
    return (publish or cache.publish_unit)(
        UnitResult(
            unit=unit.unit_id,
            images=images_of((answer.sample.image_sha256 for answer in accepted), images.encoded),
            errors=in_order(unit, errors),
            **_encoded(accepted, None if errors or not scored else unit.rows, cache.spec.codec),
        )
    )


def _encoded(answers: Sequence[Answer], planned: pa.Table | None, codec: Codec) -> dict[str, Any]:
    """The `samples` of a unit as they are stored, and its `stored_error`: what storing them cost.

    All at once, which is many times faster than sample by sample. `planned` are the rows of a plan, if the answers are
    those to all of them, and to nothing else.
    """
    if not answers:
        return {}
    stored, error = _encoded_rows([answer.rows for answer in answers], codec)
    described = {
        **(_of_samples([answer.sample for answer in answers]) if planned is None else _of_plan(planned)),
        "expanded_length": [answer.expanded_length for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
        "label_logprob_no_image": [
            None if answer.no_image_logprob_T is None else own_figures(answer.no_image_logprob_T, codec)
            for answer in answers
        ],
    }
    return {"samples": stored_table(described, stored), "stored_error": error}


def _of_samples(samples: Sequence[PlannedSample]) -> dict[str, list[Any]]:
    columns = {name: [getattr(sample, name) for sample in samples] for name in _AS_PLANNED}
    return columns | {"messages": [messages_text(sample.messages) for sample in samples]}


def _of_plan(rows: pa.Table) -> dict[str, pa.Array]:
    """The same, not taken apart by sample to be joined again."""
    columns = {name: rows.column(planned).combine_chunks() for name, planned in _AS_PLANNED.items()}
    return columns | {"image_sha256": columns["image_sha256"].cast(_SHA256)}


def _encoded_rows(answers: Sequence[TeacherRows | DrawnRows], codec: Codec) -> tuple[StoredRows, StoredError]:
    if isinstance(codec, SampledPolicy):
        stored = encode_draws(concatenate([rows for rows in answers if isinstance(rows, DrawnRows)]))
        return stored, drawn_error(stored)
    rows = concatenate([rows for rows in answers if isinstance(rows, TeacherRows)])
    stored = encode(rows, codec)
    return stored, stored_error(rows, stored)
