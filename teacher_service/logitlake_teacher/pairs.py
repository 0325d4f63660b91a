"""One unit of preference pairs: the teacher's logprob of every chosen and every rejected token.

The preference stage needs no distribution, only what the teacher gives the tokens themselves, so one entry a token
is asked for and none is stored. The logprobs stay float32, unsnapped: they are summed over whole responses. A pair
counts only if both sides could be scored.
"""

from collections.abc import Mapping

from logitlake_schemas import CaptureSpec, CodecPolicy, CommitRecord, UnitError
from logitlake_shared.lake import Cache, UnitResult
from logitlake_shared.rows import LakePair
from logitlake_teacher.engines.base import Engine, SampleProblem, ScoredSample
from logitlake_teacher.items import PlannedPair, Unit
from logitlake_teacher.unit_work import (
    accept,
    committed_record,
    crash_errors,
    images_of,
    in_order,
    load_images,
    requests_of,
)

__all__ = ["PAIRS_CODEC", "capture_pairs_unit"]

PAIRS_CODEC = CodecPolicy(k_max=1, k_min=1, p_min=0.0, grid="exact")
"""The codec of every cache of pairs: one entry a token is captured, for the check, and none is stored."""


def capture_pairs_unit(engine: Engine, unit: Unit, cache: Cache, crashed: Mapping[str, str]) -> CommitRecord:
    """Scores a unit of pairs and commits it; arguments, answer and errors as `capture.capture_unit`."""
    committed = committed_record(cache, unit)
    if committed is not None:
        return committed
    images = load_images(unit.items)
    errors = images.errors | crash_errors(unit, crashed)
    todo = [item for item in unit.items if isinstance(item, PlannedPair) and item.item_id not in errors]
    answers = engine.score([request for item in todo for request in requests_of(item, images.decoded)])
    pairs: list[LakePair] = []
    for item, chosen, rejected in zip(todo, answers[::2], answers[1::2], strict=True):
        pair = _lake_pair(item, chosen, rejected, cache.spec)
        if isinstance(pair, UnitError):
            errors[item.item_id] = pair
        else:
            pairs.append(pair)
    return cache.publish_unit(
        UnitResult(
            unit=unit.unit_id,
            pairs=pairs,
            images=images_of((pair.image_sha256 for pair in pairs), images.encoded),
            errors=in_order(unit, errors),
        )
    )


def _lake_pair(
    item: PlannedPair, chosen: ScoredSample | SampleProblem, rejected: ScoredSample | SampleProblem, spec: CaptureSpec
) -> LakePair | UnitError:
    good = accept(item, chosen, len(item.chosen_ids), spec)
    bad = accept(item, rejected, len(item.rejected_ids), spec)
    if isinstance(good, UnitError):
        return good
    if isinstance(bad, UnitError):
        return bad
    return LakePair(
        pair_id=item.pair_id,
        task=item.task,
        source=item.source,
        split=item.split,
        messages=item.messages,
        prompt_ids=item.prompt_ids,
        image_sha256=item.image_sha256,
        chosen_ids=item.chosen_ids,
        rejected_ids=item.rejected_ids,
        chosen_logprobs=good.rows.label_logprob_T,
        rejected_logprobs=bad.rows.label_logprob_T,
        made_by="dataset",
    )
