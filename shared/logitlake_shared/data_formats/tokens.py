"""Conversations that are token ids already: columns of Parquet or Arrow files, read as columns.

    sample_id         "a7", or none: the row is named by its file and place
    prompt_ids        [1, 17, 4]    all prompt segments, one after the other; one placeholder an image
    prompt_lengths    [3]           one segment before each response
    response_ids      [9, 2]        all responses, each with its EOS
    response_lengths  [2]
    messages, task, source, split, images      may be missing

These are the columns of a lake's samples, where `docs/format.md` says what they mean. Ids are what a teacher is asked
about in the end, so nothing is rendered, and rows stay Arrow columns: no row becomes a Python object unless it is bad,
has its `messages` or has `images`. What a row says is checked as far as it can be without a teacher; whether its ids
are the teacher's is for planning to see.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitlake_shared.data_formats.columns import NumberLists, RowProblems
from logitlake_shared.data_formats.files import InputFile, InputLog
from logitlake_shared.data_formats.hf_dataset import row_images, turns_as_messages
from logitlake_shared.data_formats.image_refs import ImageRef
from logitlake_shared.data_formats.records import ReadOptions, RecordError, check_messages, record_id
from logitlake_shared.data_formats.selection import Selection
from logitlake_shared.data_formats.tables import TableFile, column_names, table_batches, table_files
from logitlake_shared.errors import DataError
from logitlake_shared.messages import messages_text

__all__ = ["TOKEN_LISTS", "TokenBatch", "selected_tokens", "token_batches"]

TOKEN_LISTS = ("prompt_ids", "prompt_lengths", "response_ids", "response_lengths")
_TEXTS = ("task", "source", "split")
_OPTIONAL = ("sample_id", "messages", *_TEXTS, "images")
# Ids of one batch, about; rows, where they are short. Images are held beside them, so fewer of those.
_BATCH_TOKENS = 2**20
_BATCH_ROWS = 4096
_BATCH_ROWS_WITH_IMAGES = 64
# Ids that `record_id` must look at: blank, long, or with a control character.
_ODD_ID = r"^[\s\p{Z}]*$|\p{Cc}"
_LONG_ID = 256
_ROLES = ("system", "user", "assistant")

Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TokenBatch:
    """Rows of one file that follow each other. A row with a problem has empty lists."""

    columns: pa.RecordBatch
    """`where`, `sample_id`, `task`, `source`, `split`, `messages` (JSON), the four lists (int32), and `problem`: why
    the row cannot be used, else null"""
    images: tuple[tuple[ImageRef, ...], ...] | None = None
    """of each row; none where no row has any"""

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def slice(self, start: int, stop: int) -> "TokenBatch":
        """The rows from `start` to `stop`."""
        images = None if self.images is None else self.images[start:stop]
        return TokenBatch(self.columns.slice(start, stop - start), images)

    def filter(self, kept_N: Bool) -> "TokenBatch":
        """The rows where `kept_N` holds."""
        images = (
            None if self.images is None else tuple(own for own, kept in zip(self.images, kept_N, strict=True) if kept)
        )
        return TokenBatch(self.columns.filter(pa.array(kept_N)), images)


def token_batches(path: Path, options: ReadOptions, log: InputLog | None = None) -> Iterator[TokenBatch]:
    """All rows, in the order of splits, files and rows.

    Raises `DataError` for a file that cannot be read, or whose columns are not of the types that they must be.
    """
    for table in table_files(path):
        own = replace(options, source=options.source or table.file.stem, split=table.split or options.split)
        names = column_names(table.file.path)
        wanted = [name for name in names if name in TOKEN_LISTS or name in _OPTIONAL]
        number = 0
        for rows in table_batches(table.file, TOKEN_LISTS, log, wanted, _batch_rows(table, names)):
            yield _batch(rows, number, table.file, own)
            number += rows.num_rows


def selected_tokens(batches: Iterator[TokenBatch], selection: Selection) -> Iterator[TokenBatch]:
    """The rows that are wanted, and every bad one met on the way, as `selected` does for records."""
    left = selection.limit
    for batch in batches:
        is_bad_N = np.asarray(batch.columns.column("problem").is_valid(), np.bool_)
        is_taken_N = ~is_bad_N & _wanted(batch, selection)
        if left is not None:
            # Reading ends with the last record that is taken.
            is_read_N = np.cumsum(is_taken_N, dtype=np.int64) - is_taken_N < left
            is_bad_N, is_taken_N = is_bad_N & is_read_N, is_taken_N & is_read_N
            left -= int(np.count_nonzero(is_taken_N))
        yield batch.filter(is_bad_N | is_taken_N)
        if left == 0:
            return


def _wanted(batch: TokenBatch, selection: Selection) -> Bool:
    wanted_N: Bool = np.ones(len(batch), np.bool_)
    if selection.tasks is not None:
        is_in: Any = pc.is_in(batch.columns.column("task"), value_set=pa.array(selection.tasks, pa.string()))
        wanted_N &= is_in.to_numpy(zero_copy_only=False)
    if selection.max_turns is not None:
        turns_N: Any = pc.list_value_length(batch.columns.column("response_lengths")).to_numpy()
        wanted_N &= turns_N <= selection.max_turns
    num_images_N = np.zeros(len(batch), np.int64)
    if batch.images is not None:
        num_images_N[:] = [len(own) for own in batch.images]
    wanted_N &= num_images_N >= selection.min_images
    if selection.max_images is not None:
        wanted_N &= num_images_N <= selection.max_images
    return wanted_N


def _batch_rows(table: TableFile, names: Sequence[str]) -> int:
    """As many rows as hold about `_BATCH_TOKENS` ids."""
    if "images" in names:
        return _BATCH_ROWS_WITH_IMAGES
    if table.file.path.suffix == ".arrow":
        return _BATCH_ROWS  # the writer's own batches are no smaller in memory
    with pa.OSFile(str(table.file.path)) as source:
        metadata = pq.ParquetFile(source).metadata
        num_values: int = sum(
            metadata.row_group(group).column(column).num_values
            for group in range(metadata.num_row_groups)
            for column in range(metadata.num_columns)
        )
        num_rows: int = metadata.num_rows
    return max(1, min(_BATCH_ROWS, _BATCH_TOKENS * num_rows // max(1, num_values)))


def _batch(rows: pa.RecordBatch, start: int, file: InputFile, options: ReadOptions) -> TokenBatch:
    try:
        rows.validate(full=True)  # of text that is not UTF-8, nobody further on expects anything
    except pa.ArrowInvalid as error:
        raise DataError(f"{file.path}: rows {start} to {start + rows.num_rows - 1} are damaged: {error}") from error
    problems = RowProblems(rows.num_rows)
    number_N = pa.array(np.arange(start, start + rows.num_rows)).cast(pa.string())
    where = pc.binary_join_element_wise(f"{file.name}: row ", number_N, "")
    ids = _ids(rows, start, file, number_N, problems)
    lists = {name: NumberLists.read(rows.column(name), name, str(file.path), problems) for name in TOKEN_LISTS}
    _check_lengths(lists, problems)
    images = _images(rows, options, problems)
    texts = {name: _text(rows, name, file, getattr(options, name)) for name in _TEXTS}
    messages = _messages(rows, file, options, images, problems)
    is_bad_N = problems.mask()
    if is_bad_N.any() and images is not None:
        images = tuple(() if bad else own for own, bad in zip(images, is_bad_N, strict=True))
    columns = {
        "where": where,
        "sample_id": ids,
        **texts,
        "messages": messages,
        **{name: own.array(is_bad_N) for name, own in lists.items()},
        "problem": problems.column(),
    }
    return TokenBatch(pa.RecordBatch.from_pydict(columns), images if images and any(images) else None)


def _check_lengths(lists: Mapping[str, NumberLists], problems: RowProblems) -> None:
    """Segments sum to their ids, none is negative, and there is one prompt segment before each response."""
    prompts, responses = lists["prompt_lengths"], lists["response_lengths"]
    for row in np.flatnonzero(responses.sizes == 0).tolist():
        problems.add(row, "`response_lengths` is empty; there is no response to score")
    for row in np.flatnonzero(prompts.sizes != responses.sizes).tolist():
        problems.add(
            row,
            f"{prompts.sizes[row]} prompt segments and {responses.sizes[row]} responses; expected one segment before "
            "each response",
        )
    for side, lengths in (("prompt", prompts), ("response", responses)):
        for place in np.flatnonzero(lengths.values < 0).tolist():
            problems.add(lengths.row_of(place), f"`{side}_lengths` holds {lengths.values[place]}, which is no length")
        num_ids_N, sum_N = lists[f"{side}_ids"].sizes, lengths.sums
        for row in np.flatnonzero(num_ids_N != sum_N).tolist():
            problems.add(row, f"`{side}_lengths` sum to {sum_N[row]}, but `{side}_ids` holds {num_ids_N[row]} ids")


def _ids(rows: pa.RecordBatch, start: int, file: InputFile, number_N: pa.Array, problems: RowProblems) -> pa.Array:
    """The ids as text; a row without one is named by its file and place."""
    places = pc.binary_join_element_wise(f"{file.stem}-", number_N, "")
    if "sample_id" not in rows.schema.names:
        return places
    column = rows.column("sample_id")
    if not (_is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise DataError(f"{file.path}: column sample_id must hold text or whole numbers, got {column.type}")
    ids = pc.coalesce(column.cast(pa.string()), places)
    is_odd: Any = pc.or_(pc.greater(pc.binary_length(ids), _LONG_ID), pc.match_substring_regex(ids, _ODD_ID))
    for row in np.flatnonzero(is_odd.to_numpy(zero_copy_only=False)).tolist():
        try:
            record_id(column[row].as_py(), file, start + row)
        except RecordError as fault:
            problems.add(row, str(fault).replace("`id`", "`sample_id`"))
    is_bad_N = problems.mask()
    # What cannot be an id must not be one in an error row either.
    return pc.if_else(pa.array(is_bad_N), places, ids) if is_bad_N.any() else ids


def _text(rows: pa.RecordBatch, name: str, file: InputFile, default: str) -> pa.Array:
    """A short text of each row, `default` where there is none."""
    if name not in rows.schema.names:
        return _repeated(default, rows.num_rows)
    column = rows.column(name)
    if not (_is_text(column.type) or pa.types.is_null(column.type)):
        raise DataError(f"{file.path}: column {name} must hold text, got {column.type}")
    return pc.fill_null(column.cast(pa.string()), default)


def _repeated(text: str, num_rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.string()), num_rows)


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _images(
    rows: pa.RecordBatch, options: ReadOptions, problems: RowProblems
) -> tuple[tuple[ImageRef, ...], ...] | None:
    if "images" not in rows.schema.names:
        return None
    images: list[tuple[ImageRef, ...]] = []
    for row, value in enumerate(rows.column("images").to_pylist()):
        try:
            images.append(row_images(value, options.image_root))
        except (RecordError, ValueError) as fault:
            problems.add(row, str(fault))
            images.append(())
    return tuple(images)


def _messages(
    rows: pa.RecordBatch,
    file: InputFile,
    options: ReadOptions,
    images: tuple[tuple[ImageRef, ...], ...] | None,
    problems: RowProblems,
) -> pa.Array:
    """The turns as the JSON that a lake holds; `[]` where the row has only its ids."""
    nothing = messages_text([])
    if "messages" not in rows.schema.names:
        return _repeated(nothing, rows.num_rows)
    column = rows.column("messages")
    type_ = column.type
    if not (_is_text(type_) or pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_null(type_)):
        raise DataError(f"{file.path}: column messages must hold turns, or JSON of turns, got {type_}")
    texts = []
    for row, value in enumerate(column.to_pylist()):
        own = () if images is None else images[row]
        try:
            texts.append(nothing if value is None else _message_text(value, own, options))
        except (RecordError, ValueError) as fault:
            problems.add(row, str(fault))
            texts.append(nothing)
    return pa.array(texts, pa.string())


def _message_text(value: Any, images: tuple[ImageRef, ...], options: ReadOptions) -> str:
    """The turns as a lake holds them; JSON of turns stays as it is. Raises `RecordError`, `ValueError`."""
    if not isinstance(value, str):
        messages, _ = turns_as_messages(value, images, options.image_root, listed=True)
        check_messages(messages, len(images), needs_response=False)
        return messages_text(messages)
    try:
        turns = json.loads(value)
    except ValueError as error:
        raise RecordError(f"`messages` is not JSON: {error}") from error
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        raise RecordError(f"`messages` must be a list of {{role, content}} as a lake holds it, got {value!r:.120}")
    if turns:
        check_messages(turns, len(images), needs_response=False)
    return value


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"} or turn["role"] not in _ROLES:
        return False
    content = turn["content"]
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))


def _is_part(part: Any) -> bool:
    return part == {"type": "image"} or (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )
