"""Planned items as Arrow rows, and back: what a plan on disk holds.

One row an item. Beside the item's own fields a row says where in the data it came from, how many tokens its images
become, and the digests that order it, name it and find its duplicates. A unit of the plan is one record batch.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitlake_schemas import CacheKind, UnitError
from logitlake_shared.arrow_lists import column_views, list_array
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.messages import StoredMessages, messages_text
from logitlake_teacher.items import Item, PlannedPair, PlannedSample

__all__ = [
    "DIGEST_BYTES",
    "Draft",
    "digests_of",
    "items_of",
    "plan_schema",
    "reference_of",
    "rows_of",
    "rows_of_columns",
    "set_columns",
]

DIGEST_BYTES = 16
Int32 = npt.NDArray[np.int32]
_IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))
_DIGEST = pa.binary(DIGEST_BYTES)
_IMAGE_REF = pa.struct([("path", pa.string()), ("data", pa.binary()), ("uri", pa.string()), ("name", pa.string())])
_COMMON = (
    ("order_key", _DIGEST),  # items of one image, and equal text-only items, stand together
    ("content_digest", _DIGEST),  # what the teacher is asked; equal for duplicates
    ("record_digest", _DIGEST),  # everything but the images' bytes
    ("where", pa.string()),
    ("item_id", pa.string()),
    ("task", pa.string()),
    ("source", pa.string()),
    ("split", pa.string()),
    ("messages", pa.string()),
    ("images", pa.list_(_IMAGE_REF)),
    ("image_sha256", pa.list_(pa.string())),
    ("num_image_tokens", pa.int32()),
    ("problem_code", pa.string()),
    ("problem_message", pa.string()),
    ("tolerated", pa.bool_()),  # whether its source lets problems pass
)
_IDS_OF: dict[CacheKind, tuple[str, ...]] = {
    "samples": ("prompt_ids", "prompt_lengths", "response_ids", "response_lengths"),
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
}
_RECORD = ("item_id", "task", "source", "split", "messages")
_QUESTION_OF: dict[CacheKind, tuple[str, ...]] = {
    "samples": ("prompt_ids", "response_ids"),
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
}


@dataclass(frozen=True)
class Draft:
    """An item whose images nobody has looked at yet, and the place in the data that it came from."""

    where: str
    item: Item


def plan_schema(kind: CacheKind) -> pa.Schema:
    """The columns of a plan's rows."""
    return pa.schema([*_COMMON, *((name, _IDS) for name in _IDS_OF[kind])])


def rows_of(kind: CacheKind, drafts: Sequence[Draft], *, tolerant: bool = False) -> pa.RecordBatch:
    """The drafts as rows of a plan; `tolerant`: their source lets problems pass."""
    items = [draft.item for draft in drafts]
    described: dict[str, list[Any]] = {
        "where": [draft.where for draft in drafts],
        "item_id": [item.item_id for item in items],
        "task": [item.task for item in items],
        "source": [item.source for item in items],
        "split": [item.split for item in items],
        "messages": [messages_text(item.messages) for item in items],
        "problem_code": [item.problem.code if item.problem else None for item in items],
        "problem_message": [item.problem.message if item.problem else None for item in items],
        **{name: [getattr(item, name) for item in items] for name in _IDS_OF[kind]},
    }
    schema = plan_schema(kind)
    columns = {name: list_array(values, schema.field(name).type) for name, values in described.items()}
    return rows_of_columns(kind, columns, [item.images for item in items], tolerant=tolerant)


def rows_of_columns(
    kind: CacheKind,
    described: Mapping[str, pa.Array],
    images: Sequence[tuple[ImageRef, ...]] | None,
    *,
    tolerant: bool = False,
) -> pa.RecordBatch:
    """What is said of items, a column each, as rows of a plan; digests are computed here.

    `described` holds place, id, origin, messages, problem and the lists of ids; `images` are those of each item, none
    where no item has any. They still have no sha256 and no tokens.
    """
    num_rows = len(described["where"])
    schema = plan_schema(kind)
    content = digests_of(*(described[name] for name in _QUESTION_OF[kind]))
    columns = {
        **described,
        "order_key": content if images is None else _order_keys(content, images),
        "content_digest": content,
        "record_digest": digests_of(*(described[name] for name in (*_RECORD, *_IDS_OF[kind]))),
        "images": _empty_lists(num_rows, schema.field("images").type)
        if images is None
        else pa.array([[_row_of(image) for image in own] for own in images], schema.field("images").type),
        "image_sha256": _empty_lists(num_rows, schema.field("image_sha256").type),
        "num_image_tokens": pa.array(np.zeros(num_rows, np.int32)),
        "tolerated": pa.array(np.full(num_rows, tolerant)),
    }
    return pa.RecordBatch.from_arrays([columns[field.name] for field in schema], schema=schema)


def set_columns(table: pa.Table, **columns: pa.Array) -> pa.Table:
    """The table with these columns in the place of its own."""
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), values)
    return table


def items_of(kind: CacheKind, rows: pa.Table) -> tuple[Item, ...]:
    """The inverse of `rows_of`, images and problems included. Arrays are views of the table's memory."""
    described = _columns(rows, "item_id", "task", "source", "split")
    messages = map(StoredMessages, *_columns(rows, "messages"))
    make = PlannedSample if kind == "samples" else PlannedPair
    return tuple(map(make, *described, messages, *_columns(rows, *_IDS_OF[kind]), *_images_of(rows), _problems(rows)))


def _images_of(rows: pa.Table) -> tuple[Iterable[tuple[ImageRef, ...]], Iterable[tuple[str, ...]]]:
    """References and sha256 of each item's images."""
    if not pc.any(pc.greater(pc.list_value_length(rows.column("images")), 0)).as_py():
        return itertools.repeat(()), itertools.repeat(())
    images, digests = _columns(rows, "images", "image_sha256")
    return [tuple(map(reference_of, own)) for own in images], map(tuple, digests)


def _problems(rows: pa.Table) -> Iterable[UnitError | None]:
    if rows.column("problem_code").null_count == rows.num_rows:
        return itertools.repeat(None)
    return [
        None if code is None else UnitError(sample_id=item_id, code=code, message=message or "")
        for item_id, code, message in zip(*_columns(rows, "item_id", "problem_code", "problem_message"), strict=True)
    ]


def _columns(rows: pa.Table, *names: str) -> list[Any]:
    return [column_views(rows.column(name)) for name in names]


def _digest(*parts: bytes) -> bytes:
    """Over the parts and their lengths, so that nothing can move from one part to its neighbour unseen."""
    framed = b"".join([piece for part in parts for piece in (len(part).to_bytes(8, "little"), part)])
    return hashlib.sha256(framed).digest()[:DIGEST_BYTES]


def digests_of(*parts: pa.Array | pa.ChunkedArray) -> pa.Array:
    """`_digest` of each row, its parts in columns: text as UTF-8, lists of int32 as their bytes. No nulls.

    Arrow frames all rows at once; what is left for each of them is one call of sha256.
    """
    framed: list[Any] = []
    for part in parts:
        data = _as_binary(part.combine_chunks() if isinstance(part, pa.ChunkedArray) else part)
        lengths_N = pc.binary_length(data).to_numpy().astype("<i8")
        framed += (_binary(np.arange(0, 8 * len(data) + 1, 8), lengths_N), data)
    joined = pc.binary_join_element_wise(*framed, b"")
    sha256 = hashlib.sha256
    digests = b"".join([sha256(text).digest()[:DIGEST_BYTES] for text in joined.to_pylist()])
    return pa.FixedSizeBinaryArray.from_buffers(_DIGEST, len(joined), [None, pa.py_buffer(digests)])


def _as_binary(array: pa.Array) -> pa.Array:
    if pa.types.is_list(array.type):
        values = array.values.to_numpy()
        return _binary(array.offsets.to_numpy().astype(np.int64) * values.itemsize, values)
    return array.cast(pa.binary())


def _binary(offsets: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> pa.Array:
    """The bytes of `values` between the offsets, which count bytes."""
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(values)]
    return pa.BinaryArray.from_buffers(pa.binary(), len(offsets) - 1, buffers)


def _order_keys(content: pa.Array, images: Sequence[tuple[ImageRef, ...]]) -> pa.Array:
    keys = [
        _digest(*(image.key.encode() for image in own)) if own else own_content
        for own, own_content in zip(images, content.to_pylist(), strict=True)
    ]
    return pa.array(keys, _DIGEST)


def _empty_lists(num_rows: int, type_: pa.DataType) -> pa.Array:
    offsets = pa.array(np.zeros(num_rows + 1, np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array([], type_.value_type), type=type_)


def reference_of(record: dict[str, Any]) -> ImageRef:
    """The image reference in a row."""
    path = record["path"]
    return ImageRef(**{**record, "path": None if path is None else Path(path)})


def _row_of(image: ImageRef) -> dict[str, Any]:
    path = None if image.path is None else str(image.path)
    return {"path": path, "data": image.data, "uri": image.uri, "name": image.name}
