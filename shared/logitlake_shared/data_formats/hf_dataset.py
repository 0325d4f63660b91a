"""Conversations in a folder of Hugging Face `datasets`: columns of turns, columns of images.

    messages  [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A seven."}]
    images    [{"bytes": …, "path": "a.png"}]

What `save_to_disk` writes, and plain Parquet or Arrow files. Turns are `role`/`content` (text or parts) or LLaVA's
`from`/`value`. An image is a struct with its bytes, or with the path of a file below `image_root`, or a name; every
image has its placeholder, `<image>` in a text or a part of type `image`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitlake_shared.data_formats.files import InputFile, InputLog
from logitlake_shared.data_formats.image_refs import ImageRef, image_ref
from logitlake_shared.data_formats.llava import llava_messages
from logitlake_shared.data_formats.openai import chat_messages
from logitlake_shared.data_formats.records import (
    BadRecord,
    Conversation,
    Messages,
    ReadOptions,
    RecordError,
    as_text,
    check_messages,
    record_id,
)
from logitlake_shared.data_formats.tables import TableRow, column_names, table_files, table_rows
from logitlake_shared.errors import DataError

__all__ = ["HfColumns", "hf_dataset_records", "row_images", "turns_as_messages"]

_MESSAGES = ("messages", "conversations")
_IMAGES = ("images", "image")


@dataclass(frozen=True)
class HfColumns:
    """Which column is what. One that is named must be there; of those that are not, only the turns must."""

    messages: str | None = None
    """none: the first of `messages`, `conversations`"""
    images: str | None = None
    """none: the first of `images`, `image`, or no images"""
    id: str = "id"
    """may be missing"""
    task: str = "task"
    """may be missing"""


def hf_dataset_records(
    path: Path, columns: HfColumns, options: ReadOptions, log: InputLog | None = None
) -> Iterator[Conversation | BadRecord]:
    """The records, in the order of splits, files and rows. Raises `DataError` for a file that cannot be read."""
    for table in table_files(path):
        names = column_names(table.file.path)
        messages = _first(names, columns.messages, _MESSAGES)
        images = _first(names, columns.images, _IMAGES)
        if messages is None or (images is None and columns.images is not None):
            missing = columns.images if messages is not None else columns.messages or " or ".join(_MESSAGES)
            raise DataError(
                f"{table.file.path}: column {missing} missing; it has {', '.join(names)}. Name the columns of turns "
                "and images in the configuration"
            )
        own = HfColumns(messages, images, columns.id, columns.task)
        wanted = [name for name in (messages, images, columns.id, columns.task) if name is not None]
        for row in table_rows(table.file, (), log, wanted):
            try:
                yield _conversation(row, table.file, own, options, table.split or options.split)
            except (RecordError, ValueError) as fault:
                yield BadRecord(row.where, str(fault))


def _first(names: list[str], given: str | None, usual: tuple[str, ...]) -> str | None:
    return next((name for name in ((given,) if given else usual) if name in names), None)


def _conversation(row: TableRow, file: InputFile, columns: HfColumns, options: ReadOptions, split: str) -> Conversation:
    values = row.values
    turns = values[columns.messages or ""]
    given = row_images(values[columns.images] if columns.images else None, options.image_root)
    messages, images = turns_as_messages(turns, given, options.image_root, listed=columns.images is not None)
    check_messages(messages, len(images), needs_response=options.needs_response)
    return Conversation(
        sample_id=record_id(values.get(columns.id), file, row.number),
        task=as_text(values.get(columns.task), "task", options.task),
        source=options.source or file.stem,
        split=split,
        messages=messages,
        images=images,
        where=row.where,
    )


def turns_as_messages(
    turns: Any, images: tuple[ImageRef, ...], image_root: Path | str, *, listed: bool
) -> tuple[Messages, tuple[ImageRef, ...]]:
    """Turns of either form as messages, and their images. Raises `RecordError`, `ValueError`.

    `images` are the row's own; `listed` says that it has a column of them, so that turns hold placeholders alone.
    """
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return llava_messages(turns), images
    return chat_messages(turns, image_root, images if listed else None)


def row_images(value: Any, image_root: Path | str) -> tuple[ImageRef, ...]:
    """The images of a row: none, one, or a list of them. Raises `RecordError`, `ValueError`."""
    if value is None:
        return ()
    return tuple(_image(entry, image_root) for entry in (value if isinstance(value, list) else [value]))


def _image(value: Any, image_root: Path | str) -> ImageRef:
    if isinstance(value, str) and value:
        return image_ref(value, image_root)
    if isinstance(value, bytes) and value:
        return ImageRef(data=value)
    if isinstance(value, dict):
        if value.get("bytes"):
            return ImageRef(data=value["bytes"])
        if value.get("path"):
            return image_ref(value["path"], image_root)
    raise RecordError(f"an image must have `bytes` or a `path`, got {value!r:.120}")
