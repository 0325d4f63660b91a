"""From data sources to units of work, the same every time.

A plan is a pure function of the records, the image bytes and the unit budget: every record is read, rendered and
checked before the first unit runs, so that a mistake in the data costs seconds and not a night. Samples that share
an image stand together (the image is stored and decoded once a unit), units are sorted and named by their content,
and the digest over all of it becomes part of the cache's fingerprint: other data is another cache.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitlake_schemas import DatasetIdentity, fingerprint, sha256_hex
from logitlake_shared.alignment import expand_images, interleave
from logitlake_shared.data_formats import Conversation, ImageRef, PreferencePair, read_llava, read_rlaif_v
from logitlake_shared.errors import DataError, ImageError
from logitlake_shared.rendering import Rendered, Renderer
from logitlake_teacher.config import LlavaSource, RlaifVSource
from logitlake_teacher.items import Item, PlannedPair, PlannedSample, Unit

__all__ = ["Plan", "plan_pairs", "plan_samples"]

# Digits of a unit's content digest in its name. Its number comes first, so that names sort as the plan does.
_UNIT_DIGITS = 12


@dataclass(frozen=True)
class Plan:
    """All units of a dataset, in order, and the dataset's identity."""

    units: tuple[Unit, ...]
    dataset: DatasetIdentity

    @property
    def num_tokens(self) -> int:
        """Tokens of all units, an image counted as one."""
        return sum(item.num_tokens for unit in self.units for item in unit.items)


def plan_samples(sources: Sequence[LlavaSource], renderer: Renderer, unit_tokens: int) -> Plan:
    """The plan of a capture. Raises `DataError` naming file and record for the first record that cannot be used."""
    digests = _ImageDigests()
    return _plan(_samples(sources, renderer, digests), unit_tokens)


def plan_pairs(sources: Sequence[RlaifVSource], renderer: Renderer, unit_tokens: int) -> Plan:
    """The plan of a preference capture. Raises as `plan_samples` does."""
    digests = _ImageDigests()
    return _plan(_pairs(sources, renderer, digests), unit_tokens)


class _ImageDigests:
    """sha256 of each image, every file read once."""

    def __init__(self) -> None:
        self._known: dict[ImageRef, str] = {}

    def of(self, images: Iterable[ImageRef]) -> tuple[str, ...]:
        """The digests in order. Raises `ImageError` for a file that cannot be read."""
        return tuple(self._one(image) for image in images)

    def _one(self, image: ImageRef) -> str:
        if image.path is None:
            return sha256_hex(image.load())
        if image not in self._known:
            self._known[image] = sha256_hex(image.load())
        return self._known[image]


def _samples(
    sources: Sequence[LlavaSource], renderer: Renderer, digests: _ImageDigests
) -> Iterator[tuple[str, PlannedSample]]:
    for source in sources:
        records = read_llava(source.path, source.image_root, task=source.task, source=source.source, split=source.split)
        for record in itertools.islice(records, source.limit):
            where = f"{source.path}: sample {record.sample_id!r}"
            rendered, image_sha256 = _render(record, record.messages, renderer, digests, where)
            yield (
                where,
                PlannedSample(
                    sample_id=record.sample_id,
                    task=record.task,
                    source=record.source,
                    split=record.split,
                    messages=record.messages,
                    prompt_ids=rendered.prompt_ids,
                    prompt_lengths=rendered.prompt_lengths,
                    response_ids=rendered.response_ids,
                    response_lengths=rendered.response_lengths,
                    images=record.images,
                    image_sha256=image_sha256,
                ),
            )


def _pairs(
    sources: Sequence[RlaifVSource], renderer: Renderer, digests: _ImageDigests
) -> Iterator[tuple[str, PlannedPair]]:
    for source in sources:
        for record in itertools.islice(read_rlaif_v(source.path), source.limit):
            where = f"{source.path}: pair {record.pair_id!r}"
            chosen_turn = [*record.messages, {"role": "assistant", "content": record.chosen}]
            chosen, image_sha256 = _render(record, chosen_turn, renderer, digests, where)
            yield (
                where,
                PlannedPair(
                    pair_id=record.pair_id,
                    task=record.task,
                    source=record.source,
                    split=record.split,
                    messages=record.messages,
                    prompt_ids=chosen.prompt_ids,
                    chosen_ids=chosen.response_ids,
                    rejected_ids=renderer.render_response(record.rejected),
                    images=record.images,
                    image_sha256=image_sha256,
                ),
            )


def _render(
    record: Conversation | PreferencePair,
    messages: Sequence[Mapping[str, Any]],
    renderer: Renderer,
    digests: _ImageDigests,
    where: str,
) -> tuple[Rendered, tuple[str, ...]]:
    if record.images and renderer.image_token_id is None:
        raise DataError(
            f"{where}: it has {len(record.images)} images, but the teacher reads text only; use a multimodal one"
        )
    try:
        rendered = renderer.render(messages)
        ids_S, is_response_S = interleave(
            rendered.prompt_ids, rendered.prompt_lengths, rendered.response_ids, rendered.response_lengths
        )
        # Placeholders and images are counted here, before any unit runs.
        expand_images(ids_S, is_response_S, renderer.image_token_id, [1] * len(record.images))
        return rendered, digests.of(record.images)
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _plan(records: Iterable[tuple[str, Item]], unit_tokens: int) -> Plan:
    seen: dict[str, str] = {}
    items: list[Item] = []
    for where, item in records:
        if item.item_id in seen:
            raise DataError(f"{where}: the id is taken by {seen[item.item_id]}; ids must be unique over all sources")
        seen[item.item_id] = where
        items.append(item)
    items.sort(key=lambda item: (item.image_sha256, item.item_id))
    digests = {item.item_id: _digest(item) for item in items}
    units = tuple(
        Unit(f"{index:06d}-{fingerprint([digests[item.item_id] for item in group])[:_UNIT_DIGITS]}", group)
        for index, group in enumerate(_cut(items, unit_tokens))
    )
    identity = DatasetIdentity(
        snapshot_sha256=fingerprint([digests[item.item_id] for item in items]),
        num_samples=len(items),
        unit_tokens=unit_tokens,
    )
    return Plan(units, identity)


def _cut(items: Sequence[Item], unit_tokens: int) -> Iterator[tuple[Item, ...]]:
    """Cuts at the budget, between two images where that is possible."""
    unit: list[Item] = []
    used = 0
    for _, group in itertools.groupby(items, key=lambda item: item.image_sha256 or item.item_id):
        together = list(group)
        size = sum(item.num_tokens for item in together)
        pieces = [together] if size <= unit_tokens else [[item] for item in together]
        for piece in pieces:
            size = sum(item.num_tokens for item in piece)
            if unit and used + size > unit_tokens:
                yield tuple(unit)
                unit, used = [], 0
            unit += piece
            used += size
    if unit:
        yield tuple(unit)


def _digest(item: Item) -> str:
    """sha256 over everything of the item that reaches the lake or the teacher."""
    document = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(item).items()
        if name != "images"
    }
    return fingerprint(document)
