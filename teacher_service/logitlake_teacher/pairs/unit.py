"""One unit of preference pairs: load its images, get its pairs, commit.

A unit commits itself where it was computed, and only as a whole, as a unit of samples does. Where the pairs come from
is the business of a `PairProducer`: `given` by the data (`score.py`), or `made` by the teacher (`make.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from logitlake_schemas import CaptureSpec, CommitRecord, UnitError
from logitlake_shared.images import DecodedImage
from logitlake_shared.lake import Cache, UnitResult
from logitlake_shared.rows import LakePair
from logitlake_teacher.engines import Engine
from logitlake_teacher.items import Item, Unit
from logitlake_teacher.unit_images import LoadImages, load_images
from logitlake_teacher.unit_work import Publish, committed_record, crash_errors, images_of, in_order

__all__ = ["PairProducer", "capture_pairs_unit"]


class PairProducer(Protocol):
    """Where the pairs of a unit come from."""

    def pairs_of(
        self, engine: Engine, items: Sequence[Item], decoded: Mapping[str, DecodedImage], spec: CaptureSpec
    ) -> list[LakePair | UnitError]:
        """One pair for each item, or why there is none; `decoded` holds the items' images by sha256.

        Raises `EngineError` if the teacher cannot go on.
        """
        ...


def capture_pairs_unit(
    source: PairProducer,
    engine: Engine,
    unit: Unit,
    cache: Cache,
    crashed: Mapping[str, str],
    load: LoadImages = load_images,
    publish: Publish | None = None,
) -> CommitRecord:
    """The pairs of a unit, committed; `crashed`, `publish`, answer and errors as `capture.capture_unit`."""
    committed = committed_record(cache, unit)
    if committed is not None:
        return committed
    images = load(unit.items)
    errors = images.errors | crash_errors(unit, crashed)
    todo = [item for item in unit.items if item.item_id not in errors]
    pairs: list[LakePair] = []
    for item, pair in zip(todo, source.pairs_of(engine, todo, images.decoded, cache.spec), strict=True):
        if isinstance(pair, UnitError):
            errors[item.item_id] = pair
        else:
            pairs.append(pair)
    return (publish or cache.publish_unit)(
        UnitResult(
            unit=unit.unit_id,
            pairs=pairs,
            images=images_of((pair.image_sha256 for pair in pairs), images.encoded),
            errors=in_order(unit, errors),
        )
    )
