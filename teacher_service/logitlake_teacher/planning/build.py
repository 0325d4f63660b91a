"""Makes a plan on disk: sources -> drafts -> buckets -> units.

A plan is a pure function of the records, the image bytes, the tokenizer and the unit budget. Every record is read,
rendered and checked before the first unit runs, so that a mistake in the data costs minutes and not a night. Items
that share an image stand together (it is stored and decoded once a unit), units are sorted and named by their content,
and the digest over all of it becomes part of the cache's fingerprint: other data is another cache.

Memory does not grow with the number of items, but for eight bytes an id (ids must be unique) and the list of units.
"""

import hashlib
import itertools
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitlake_schemas import CacheKind, DatasetIdentity
from logitlake_shared.data_formats import Read
from logitlake_shared.data_formats.tokens import TokenBatch
from logitlake_shared.errors import DataError
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import ImagesConfig, PlanConfig, Source, TokensSource
from logitlake_teacher.engines.facts import EngineFacts
from logitlake_teacher.planning.figures import PlanFigures, Tally
from logitlake_teacher.planning.intake import Intake
from logitlake_teacher.planning.pictures import Pictures
from logitlake_teacher.planning.rows import digests_of, plan_schema, reference_of, set_columns
from logitlake_teacher.planning.spool import Spool
from logitlake_teacher.planning.token_intake import TokenIntake
from logitlake_teacher.planning.units_file import UnitsWriter

__all__ = ["OnProgress", "build"]

OnProgress = Callable[[int], None]
"""called with the number of records that were read since the last call"""

_PROMPTS: dict[CacheKind, int] = {"samples": 1, "pairs": 2}


def build(
    kind: CacheKind,
    sources: Sequence[Source],
    renderer: Renderer,
    facts: EngineFacts,
    config: PlanConfig,
    images: ImagesConfig,
    folder: Path,
    on_progress: OnProgress,
    *,
    open_end: bool,
) -> tuple[DatasetIdentity, PlanFigures]:
    """Writes the plan's units into `folder`, which is empty. Raises `DataError` for ids that are not unique."""
    ids = _UniqueIds()
    tally = Tally()
    with Spool(folder / "spool", plan_schema(kind)) as spool:
        for rows in _rows_of_sources(kind, sources, renderer, facts, config, open_end=open_end):
            ids.add(rows)
            _tally_problems(rows, tally)
            spool.append(rows)
            on_progress(rows.num_rows)
        repeated = ids.repeated()
        if len(repeated):
            raise _not_unique(spool.buckets(), set(repeated.tolist()))
        pictures = Pictures(facts.count_image_tokens, images, folder)
        whole = hashlib.sha256()
        try:
            with UnitsWriter(folder, plan_schema(kind), config.unit_tokens) as units:
                for bucket in spool.buckets():
                    rows = _with_images(bucket, pictures, tally)
                    item_digests = _item_digests(rows)
                    length_N = _lengths(rows, kind)
                    _tally_sound(rows, length_N, kind, tally)
                    whole.update(item_digests.buffers()[1])
                    units.add(rows, length_N, item_digests)
        finally:
            pictures.close()
    (folder / "spool").rmdir()
    figures = tally.figures(units.num_units)
    identity = DatasetIdentity(
        snapshot_sha256=whole.hexdigest(), num_samples=figures.items, unit_tokens=config.unit_tokens
    )
    return identity, figures


class _UniqueIds:
    """Eight bytes of a hash for each id: enough to suspect a repetition, which is then looked up."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, rows: pa.RecordBatch) -> None:
        self._hashes.extend(map(hash, rows.column("item_id").to_pylist()))

    def repeated(self) -> npt.NDArray[np.int64]:
        hashes = np.sort(np.frombuffer(self._hashes, np.int64)) if self._hashes else np.zeros(0, np.int64)
        return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _not_unique(buckets: Iterator[pa.Table], suspects: set[int]) -> DataError:
    places: dict[str, list[str]] = {}
    for rows in buckets:
        for item_id, where in zip(rows.column("item_id").to_pylist(), rows.column("where").to_pylist(), strict=True):
            if hash(item_id) in suspects:
                places.setdefault(item_id, []).append(where)
    repeated = {item_id: sorted(wheres) for item_id, wheres in places.items() if len(wheres) > 1}
    item_id, wheres = min(repeated.items())
    return DataError(
        f"{wheres[1]}: the id {item_id!r} is taken by {wheres[0]}; ids must be unique over all sources, and "
        f"{len(repeated)} are not: rename them, or name each source's records apart"
    )


def _rows_of_sources(
    kind: CacheKind,
    sources: Sequence[Source],
    renderer: Renderer,
    facts: EngineFacts,
    config: PlanConfig,
    *,
    open_end: bool,
) -> Iterator[pa.RecordBatch]:
    """The rows of one source after the other, `config.limit` of all sources together."""
    left = _Left(config.limit)
    processes = config.processes or os.cpu_count() or 1
    for source in sources:
        tolerant = source.on_bad_record == "skip"
        if isinstance(source, TokensSource):
            if kind != "samples":
                raise DataError(f"{source.path}: a {kind} capture cannot use this source; see `[[data]] type`")
            tokens = TokenIntake.of(renderer, facts.context_length, open_end=open_end, tolerant=tolerant)
            yield from tokens.rows(left.take_rows(source.read()))
        else:
            intake = Intake(kind, renderer.model_dir, open_end, tolerant, processes)
            yield from intake.rows(left.take(source.read()), renderer)


class _Left:
    def __init__(self, limit: int | None) -> None:
        self._left = limit

    def take(self, records: Iterator[Read]) -> Iterator[Read]:
        for record in itertools.islice(records, self._left):
            if self._left is not None:
                self._left -= 1
            yield record

    def take_rows(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        while self._left != 0 and (batch := next(batches, None)) is not None:
            if self._left is not None:
                batch = batch.slice(0, min(len(batch), self._left))
                self._left -= len(batch)
            yield batch


def _tally_problems(rows: pa.RecordBatch, tally: Tally) -> None:
    bad = rows.filter(rows.column("problem_code").is_valid())
    for row in bad.select(["where", "problem_code", "problem_message", "tolerated"]).to_pylist():
        tally.problem(row["where"], row["problem_code"], row["problem_message"], fatal=not row["tolerated"])


def _with_images(rows: pa.Table, pictures: Pictures, tally: Tally) -> pa.Table:
    """The rows with the digests and tokens of their images, and a problem where one cannot be used."""
    num_images_N = _list_lengths(rows, "images")
    if not num_images_N.any():
        return rows
    references = [reference_of(record) for record in pc.list_flatten(rows.column("images")).to_pylist()]
    seen = pictures.look_at(references)
    sound = [picture for picture in seen.values() if picture.problem is None]
    tally.add(
        {},
        np.zeros(0, np.int64),
        images=len({picture.sha256 for picture in sound}),
        image_bytes=sum({picture.sha256: picture.num_bytes for picture in sound}.values()),
    )
    looked = [seen[reference] for reference in references]
    owner = np.repeat(np.arange(rows.num_rows), num_images_N).tolist()
    codes = rows.column("problem_code").to_pylist()
    messages = rows.column("problem_message").to_pylist()
    wheres, tolerated = rows.column("where").to_pylist(), rows.column("tolerated").to_pylist()
    # From the last image to the first, so that the first problem of an item is the one that is told.
    problems = {
        place: picture.problem for place, picture in zip(owner[::-1], looked[::-1], strict=True) if picture.problem
    }
    for place, problem in sorted(problems.items()):
        codes[place], messages[place] = problem
        tally.problem(wheres[place], *problem, fatal=not tolerated[place])
    num_tokens = np.bincount(owner, [picture.num_tokens for picture in looked], rows.num_rows)
    offsets = pa.array(np.append(0, np.cumsum(num_images_N)), pa.int32())
    sha256 = pa.array([picture.sha256 for picture in looked], pa.string())
    return set_columns(
        rows,
        image_sha256=pa.ListArray.from_arrays(offsets, sha256, type=rows.schema.field("image_sha256").type),
        num_image_tokens=pa.array(num_tokens.astype(np.int32)),
        problem_code=pa.array(codes, pa.string()),
        problem_message=pa.array(messages, pa.string()),
    )


def _item_digests(rows: pa.Table) -> pa.Array:
    """Over everything of an item that reaches the lake or the teacher, images by their bytes."""
    images = pc.binary_join(rows.column("image_sha256"), "")
    return digests_of(rows.column("record_digest"), images, pc.fill_null(rows.column("problem_code"), ""))


def _lengths(rows: pa.Table, kind: CacheKind) -> npt.NDArray[np.int64]:
    """`length_N`: tokens that the teacher sees for each item, images expanded: what a unit's budget is spent on."""
    prompt_N, response_N, image_N = _prompt_lengths(rows), _response_lengths(rows, kind), _image_tokens(rows)
    num_images_N = _list_lengths(rows, "images")
    return _PROMPTS[kind] * (prompt_N - num_images_N + image_N) + response_N


def _prompt_lengths(rows: pa.Table) -> npt.NDArray[np.int64]:
    return _list_lengths(rows, "prompt_ids")


def _response_lengths(rows: pa.Table, kind: CacheKind) -> npt.NDArray[np.int64]:
    names = ("response_ids",) if kind == "samples" else ("chosen_ids", "rejected_ids")
    total: npt.NDArray[np.int64] = sum((_list_lengths(rows, name) for name in names), np.zeros(rows.num_rows, np.int64))
    return total


def _image_tokens(rows: pa.Table) -> npt.NDArray[np.int64]:
    return np.asarray(rows.column("num_image_tokens").to_numpy(), np.int64)


def _list_lengths(rows: pa.Table, name: str) -> npt.NDArray[np.int64]:
    lengths: Any = pc.list_value_length(rows.column(name)).to_numpy()
    return np.asarray(lengths, np.int64)


def _tally_sound(rows: pa.Table, length_N: npt.NDArray[np.int64], kind: CacheKind, tally: Tally) -> None:
    is_sound_N = np.asarray(rows.column("problem_code").is_null().to_numpy(), np.bool_)
    sound = rows.filter(pa.array(is_sound_N))
    tally.add(
        _counts(sound.column("task")),
        length_N[is_sound_N],
        image_tokens=int(_PROMPTS[kind] * _image_tokens(sound).sum()),
        response_tokens=int(_response_lengths(sound, kind).sum()),
        duplicates=sound.num_rows - _num_distinct(sound),
    )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counts = pc.value_counts(column)
    return dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))


def _num_distinct(rows: pa.Table) -> int:
    """Items with another prompt, response or image than every other; equal ones have one order key, and one table."""
    question = rows.column("content_digest")
    if _list_lengths(rows, "image_sha256").any():
        images = pc.binary_join(rows.column("image_sha256"), "").cast(pa.binary())
        question = pc.binary_join_element_wise(question.cast(pa.binary()), images, b"")
    return int(pc.count_distinct(question).as_py())
