"""LLaVA's JSON: `conversations` of human and gpt, `<image>` where an image stands.

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A seven."}]}

`image` (or `images`) is a name, a list of names in the order of the placeholders, or absent for text alone. A
record's own `task`, `split` and `source` win over the caller's.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logitlake_shared.data_formats.files import (
    JSON_SUFFIXES,
    InputFile,
    InputLog,
    JsonRecord,
    JsonSyntaxFault,
    input_files,
    json_records,
)
from logitlake_shared.data_formats.image_refs import image_ref
from logitlake_shared.data_formats.records import (
    BadRecord,
    Conversation,
    Messages,
    ReadOptions,
    RecordError,
    as_text,
    check_messages,
    check_text,
    content_parts,
    good_records,
    image_list,
    record_id,
)

__all__ = ["llava_messages", "llava_records", "read_llava"]

_ROLES: Mapping[Any, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_KEYS = {"id", "image", "images", "conversations", "task", "split", "source"}


def llava_records(path: Path, options: ReadOptions, log: InputLog | None = None) -> Iterator[Conversation | BadRecord]:
    """The records of a `.json` list or `.jsonl` file, of a folder of such files, or of a pattern.

    Raises `DataError` for a file that cannot be read on.
    """
    for file in input_files(path, JSON_SUFFIXES):
        for record in json_records(file, log):
            try:
                yield _conversation(record, file, options)
            except (RecordError, ValueError) as fault:
                yield BadRecord(record.where, str(fault))


def read_llava(
    path: Path,
    image_root: Path,
    *,
    task: str = "conversation",
    source: str | None = None,
    split: str = "train",
) -> Iterator[Conversation]:
    """`llava_records` for callers that need every record, with or without a last answer. Raises `DataError`."""
    options = ReadOptions(image_root, source, task, split, needs_response=False)
    return good_records(llava_records(path, options))


def llava_messages(turns: Any) -> Messages:
    """`[{"from": …, "value": …}]` as messages. Raises `RecordError`."""
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"`conversations` must be a non-empty list of turns, got {turns!r:.120}")
    messages: Messages = []
    for number, turn in enumerate(turns):
        role = _ROLES.get(turn.get("from")) if isinstance(turn, dict) and isinstance(turn.get("from"), str) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise RecordError(f"turn {number} must be {{'from': 'human' | 'gpt', 'value': text}}, got {turn!r:.120}")
        value = check_text(turn["value"], "value")
        messages.append({"role": role, "content": value if role == "assistant" else content_parts(value)})
    return messages


def _conversation(record: JsonRecord, file: InputFile, options: ReadOptions) -> Conversation:
    value = record.value
    if isinstance(value, JsonSyntaxFault):
        raise RecordError(value.reason)
    if not isinstance(value, dict):
        raise RecordError(f"expected an object with `id` and `conversations`, got {type(value).__name__}")
    if "conversations" not in value:
        raise RecordError("expected an object with `id` and `conversations`; conversations missing")
    images = tuple(image_ref(name, options.image_root) for name in image_list(value.get("images", value.get("image"))))
    messages = llava_messages(value["conversations"])
    check_messages(messages, len(images), needs_response=options.needs_response)
    return Conversation(
        sample_id=record_id(value.get("id"), file, record.number),
        task=as_text(value.get("task"), "task", options.task),
        source=as_text(value.get("source"), "source", options.source or file.stem),
        split=as_text(value.get("split"), "split", options.split),
        messages=messages,
        images=images,
        extra={key: entry for key, entry in value.items() if key not in _KEYS},
        where=record.where,
    )
