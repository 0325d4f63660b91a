"""OpenAI's chat form: `messages` JSONL, as for fine-tuning, and the file of its Batch API.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A seven."}]}
    {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

An image's `url` is a data URI, an https or object-store address, or a name below `image_root`. A record may instead
list its `images` and write `<image>` where each stands; without such a list `<image>` is a text like any other and
is refused, because a chat template would take it for an image. What a teacher here cannot be asked (tools, audio,
several choices) is refused, not left out.
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
from logitlake_shared.data_formats.image_refs import ImageRef, image_ref
from logitlake_shared.data_formats.records import (
    PLACEHOLDER,
    BadRecord,
    Conversation,
    Messages,
    ReadOptions,
    RecordError,
    as_text,
    check_messages,
    check_text,
    content_parts,
    image_list,
    record_id,
)

__all__ = ["chat_messages", "openai_records"]

_ROLES: Mapping[Any, str] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_KEYS = {"id", "custom_id", "method", "url", "body", "messages", "images", "task", "split", "source"}


def openai_records(path: Path, options: ReadOptions, log: InputLog | None = None) -> Iterator[Conversation | BadRecord]:
    """The records of a file, of a folder of files, or of a pattern. Raises `DataError` for a file it cannot follow."""
    for file in input_files(path, JSON_SUFFIXES):
        for record in json_records(file, log):
            try:
                yield _conversation(record, file, options)
            except (RecordError, ValueError) as fault:
                yield BadRecord(record.where, str(fault))


def chat_messages(
    turns: Any, image_root: Path | str, listed: tuple[ImageRef, ...] | None
) -> tuple[Messages, tuple[ImageRef, ...]]:
    """`[{"role": …, "content": …}]` as messages and their images in order. Raises `RecordError`, `ValueError`.

    With `listed` the images are those, placeholders and parts of type `image` show where; else they are in the parts.
    """
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"`messages` must be a non-empty list of turns, got {turns!r:.120}")
    messages: Messages = []
    found: list[ImageRef] = []
    for number, turn in enumerate(turns):
        role = _ROLES.get(turn.get("role")) if isinstance(turn, dict) and isinstance(turn.get("role"), str) else None
        if role is None:
            raise RecordError(f"turn {number} must be from system, developer, user or assistant, got {turn!r:.120}")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise RecordError(f"turn {number} calls a tool; only text is captured")
        content = turn.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise RecordError(f"turn {number}: `content` must be text or a list of parts, got {content!r:.120}")
        own: list[dict[str, str]] = []
        for part in parts:
            own += _part(part, number, image_root, found, listed is not None)
        if role != "assistant":
            messages.append({"role": role, "content": own})
        elif any(part["type"] == "image" for part in own):
            raise RecordError(f"turn {number}: an answer holds an image; only text is captured")
        else:
            messages.append({"role": role, "content": "".join(part["text"] for part in own)})
    return messages, tuple(found) if listed is None else listed


def _part(
    part: Any, number: int, image_root: Path | str, found: list[ImageRef], placeholders: bool
) -> list[dict[str, str]]:
    """The content parts that one part becomes; images that it holds go to `found`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        text = check_text(part["text"], "content")
        if placeholders:
            return content_parts(text)
        if PLACEHOLDER in text:
            raise RecordError(
                f"turn {number}: the text holds {PLACEHOLDER}, which a teacher would take for an image; list the "
                "record's `images`, or write the image as a part of its own"
            )
        return [{"type": "text", "text": text}] if text else []
    if kind == "image" and placeholders:
        return [{"type": "image"}]
    if kind in ("image_url", "input_image"):
        address = part.get("image_url")
        url = address.get("url") if isinstance(address, dict) else address
        if not isinstance(url, str) or not url:
            raise RecordError(f"turn {number}: `image_url` must be {{'url': address}}, got {address!r:.120}")
        if placeholders:
            raise RecordError(f"turn {number}: the image is in the turn and in `images`; write it once")
        found.append(image_ref(url, image_root))
        return [{"type": "image"}]
    raise RecordError(f"turn {number}: a part must be text or image_url, got {part!r:.120}")


def _conversation(record: JsonRecord, file: InputFile, options: ReadOptions) -> Conversation:
    value = record.value
    if isinstance(value, JsonSyntaxFault):
        raise RecordError(value.reason)
    if not isinstance(value, dict):
        raise RecordError(f"expected an object with `messages`, got {type(value).__name__}")
    body = value.get("body", value)
    if not isinstance(body, dict) or "messages" not in body:
        raise RecordError("expected an object with `messages`, or a batch request with `body.messages`")
    if body.get("n") not in (None, 1) or body.get("tools"):
        raise RecordError("the request asks for tools or several choices; leave `tools` and `n` out")
    names = value.get("images")
    listed = None if names is None else tuple(image_ref(name, options.image_root) for name in image_list(names))
    messages, images = chat_messages(body["messages"], options.image_root, listed)
    check_messages(messages, len(images), needs_response=options.needs_response)
    return Conversation(
        sample_id=record_id(value.get("custom_id", value.get("id")), file, record.number),
        task=as_text(value.get("task"), "task", options.task),
        source=as_text(value.get("source"), "source", options.source or file.stem),
        split=as_text(value.get("split"), "split", options.split),
        messages=messages,
        images=images,
        extra={key: entry for key, entry in value.items() if key not in _KEYS},
        where=record.where,
    )
