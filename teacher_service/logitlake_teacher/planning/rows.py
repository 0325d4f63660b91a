"""Planned items as Arrow rows, and back: what a plan on disk holds.

One row an item. Beside the item's own fields a row says where in the data it came from, how many tokens its images
become, and the digests that order it, name it and find its duplicates. A unit of the plan is one record batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitlake_schemas import CacheKind, UnitError
from logitlake_shared.arrow_lists import column_views, list_array
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.messages import StoredMessages, messages_text
from logitlake_teacher.items import Item, PlannedPair, PlannedSample

__all__ = ["DIGEST_BYTES", "Draft", "digest", "items_of", "plan_schema", "reference_of", "rows_of", "set_columns"]

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
    """The drafts as rows; digests are computed here, images still have no sha256 and no tokens.

    `tolerant`: their source lets problems pass.
    """
    items = [draft.item for draft in drafts]
    messages = [messages_text(item.messages) for item in items]
    contents = [digest(*(getattr(item, name).tobytes() for name in _QUESTION_OF[kind])) for item in items]
    columns: dict[str, list[Any]] = {
        "order_key": [_order_key(item, content) for item, content in zip(items, contents, strict=True)],
        "content_digest": contents,
        "record_digest": [_record_digest(kind, *own) for own in zip(items, messages, strict=True)],
        "where": [draft.where for draft in drafts],
        "item_id": [item.item_id for item in items],
        "task": [item.task for item in items],
        "source": [item.source for item in items],
        "split": [item.split for item in items],
        "messages": messages,
        "images": [[_row_of(image) for image in item.images] for item in items],
        "image_sha256": [item.image_sha256 for item in items],
        "num_image_tokens": [0] * len(items),
        "problem_code": [item.problem.code if item.problem else None for item in items],
        "problem_message": [item.problem.message if item.problem else None for item in items],
        "tolerated": [tolerant] * len(items),
        **{name: [getattr(item, name) for item in items] for name in _IDS_OF[kind]},
    }
    schema = plan_schema(kind)
    return pa.RecordBatch.from_arrays([list_array(columns[field.name], field.type) for field in schema], schema=schema)


def set_columns(table: pa.Table, **columns: pa.Array) -> pa.Table:
    """The table with these columns in the place of its own."""
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), values)
    return table


def items_of(kind: CacheKind, rows: pa.Table) -> tuple[Item, ...]:
    """The inverse of `rows_of`, images and problems included. Arrays are views of the table's memory."""
    described = _columns(rows, "item_id", "task", "source", "split", "messages", "images", "image_sha256")
    problems = _columns(rows, "problem_code", "problem_message")
    make = partial(_item, PlannedSample if kind == "samples" else PlannedPair)
    return tuple(map(make, *described, *problems, *_columns(rows, *_IDS_OF[kind])))


def _item(
    make: Callable[..., Item],
    item_id: str,
    task: str,
    source: str,
    split: str,
    messages: str,
    images: list[dict[str, Any]],
    image_sha256: list[str],
    code: str | None,
    message: str | None,
    *ids: Int32,
) -> Item:
    problem = None if code is None else UnitError(sample_id=item_id, code=code, message=message or "")
    shown = tuple(map(reference_of, images)), tuple(image_sha256)
    return make(item_id, task, source, split, StoredMessages(messages), *ids, *shown, problem)


def _columns(rows: pa.Table, *names: str) -> list[Any]:
    return [column_views(rows.column(name)) for name in names]


def _order_key(item: Item, content: bytes) -> bytes:
    return digest(*(image.key.encode() for image in item.images)) if item.images else content


def _record_digest(kind: CacheKind, item: Item, messages: str) -> bytes:
    texts = (item.item_id, item.task, item.source, item.split, messages)
    return digest(*(text.encode() for text in texts), *(getattr(item, name).tobytes() for name in _IDS_OF[kind]))


def digest(*parts: bytes) -> bytes:
    """Over the parts and their lengths, so that nothing can move from one part to its neighbour unseen."""
    framed = b"".join([piece for part in parts for piece in (len(part).to_bytes(8, "little"), part)])
    return hashlib.sha256(framed).digest()[:DIGEST_BYTES]


def reference_of(record: dict[str, Any]) -> ImageRef:
    """The image reference in a row."""
    path = record["path"]
    return ImageRef(**{**record, "path": None if path is None else Path(path)})


def _row_of(image: ImageRef) -> dict[str, Any]:
    path = None if image.path is None else str(image.path)
    return {"path": path, "data": image.data, "uri": image.uri, "name": image.name}
