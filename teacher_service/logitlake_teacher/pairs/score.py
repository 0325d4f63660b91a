"""Pairs that the data gives: the teacher's logprob of every chosen and every rejected token.

The preference stage needs no distribution, only what the teacher gives the tokens themselves, so one entry a token
is asked for and none is stored. The logprobs stay float32, unsnapped: they are summed over whole responses. A pair
counts only if both sides could be scored, with the images and, where that is asked for, without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitlake_schemas import CaptureSpec, UnitError
from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer, without_images
from logitlake_shared.rows import LakePair
from logitlake_teacher.engines import Engine, ScoreRequest
from logitlake_teacher.items import Item, PlannedPair
from logitlake_teacher.unit_work import accept_all

__all__ = ["PairScorer", "Response", "label_logprobs", "no_image_prompt"]

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Response:
    """A response to be scored: whose it is, and after which prompt."""

    item: Item
    name: str
    """tells the responses of one item apart, e.g. `chosen`"""
    prompt_ids: Int32
    response_ids: Int32
    images: tuple[DecodedImage, ...] = ()


def label_logprobs(engine: Engine, responses: Sequence[Response], spec: CaptureSpec) -> list[Float32 | UnitError]:
    """The teacher's logprob of each token of each response (float32, T = 1), or why there is none."""
    if not responses:
        return []
    answers = engine.score(
        [
            ScoreRequest(
                f"{one.item.item_id}/{one.name}",
                one.prompt_ids,
                np.array([len(one.prompt_ids)], np.int32),
                one.response_ids,
                np.array([len(one.response_ids)], np.int32),
                one.images,
            )
            for one in responses
        ]
    )
    checked = accept_all([one.item for one in responses], answers, [one.response_ids for one in responses], spec)
    return [answer if isinstance(answer, UnitError) else answer.rows.label_logprob_T for answer in checked]


def no_image_prompt(renderer: Renderer, item: Item) -> Int32:
    """The item's prompt with the images left out; its messages end with the user turn."""
    return renderer.render_prompt(without_images(item.messages))


class PairScorer:
    """Implements `PairProducer` for pairs of the data."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def pairs_of(
        self, engine: Engine, items: Sequence[Item], decoded: Mapping[str, DecodedImage], spec: CaptureSpec
    ) -> list[LakePair | UnitError]:
        """See `PairProducer.pairs_of`."""
        pairs = [item for item in items if isinstance(item, PlannedPair)]
        seen = label_logprobs(engine, [one for pair in pairs for one in _with_images(pair, decoded)], spec)
        # Without a picture there is nothing to leave out.
        blind = [pair for pair in pairs if spec.no_image_pass and pair.image_sha256]
        unseen = label_logprobs(engine, [one for pair in blind for one in self._without_images(pair)], spec)
        no_image = {
            pair.pair_id: sides for pair, sides in zip(blind, zip(unseen[::2], unseen[1::2], strict=True), strict=True)
        }
        return [
            _lake_pair(pair, chosen, rejected, *no_image.get(pair.pair_id, (None, None)))
            for pair, chosen, rejected in zip(pairs, seen[::2], seen[1::2], strict=True)
        ]

    def _without_images(self, pair: PlannedPair) -> tuple[Response, Response]:
        prompt_ids = no_image_prompt(self._renderer, pair)
        return (
            Response(pair, "chosen/no_image", prompt_ids, pair.chosen_ids),
            Response(pair, "rejected/no_image", prompt_ids, pair.rejected_ids),
        )


def _with_images(pair: PlannedPair, decoded: Mapping[str, DecodedImage]) -> tuple[Response, Response]:
    images = tuple(decoded[sha256] for sha256 in pair.image_sha256)
    return (
        Response(pair, "chosen", pair.prompt_ids, pair.chosen_ids, images),
        Response(pair, "rejected", pair.prompt_ids, pair.rejected_ids, images),
    )


def _lake_pair(
    item: PlannedPair,
    chosen: Float32 | UnitError,
    rejected: Float32 | UnitError,
    chosen_no_image: Float32 | UnitError | None,
    rejected_no_image: Float32 | UnitError | None,
) -> LakePair | UnitError:
    # One by one: a side that failed takes its pair with it.
    if isinstance(chosen, UnitError):
        return chosen
    if isinstance(rejected, UnitError):
        return rejected
    if isinstance(chosen_no_image, UnitError):
        return chosen_no_image
    if isinstance(rejected_no_image, UnitError):
        return rejected_no_image
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
        chosen_logprobs=chosen,
        rejected_logprobs=rejected,
        chosen_logprobs_no_image=chosen_no_image,
        rejected_logprobs_no_image=rejected_no_image,
        made_by="dataset",
    )
