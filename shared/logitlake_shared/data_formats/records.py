"""What every reader yields, and the checks that all formats share.

A text that reaches the lake must be text: lone surrogates (JSON can spell them, UTF-8 cannot) are refused here, with
the record's place, and not hours later by a Parquet writer. An id may be anything that a person can read back: any
script, emoji, slashes; no control characters, and at most 1 KiB.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from logitlake_shared.data_formats.files import InputFile
from logitlake_shared.data_formats.image_refs import ImageRef
from logitlake_shared.errors import DataError

__all__ = [
    "PLACEHOLDER",
    "BadRecord",
    "Conversation",
    "Messages",
    "PreferencePair",
    "Read",
    "ReadOptions",
    "Record",
    "RecordError",
    "as_text",
    "check_messages",
    "check_text",
    "content_parts",
    "good_records",
    "image_list",
    "record_id",
]

PLACEHOLDER = "<image>"
_MAX_ID_BYTES = 1024
# Control characters, and code points that UTF-8 cannot spell.
_REFUSED_IN_IDS = ("Cc", "Cs")

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training sample: turns, images in the order of their placeholders, and where it came from."""

    sample_id: str
    task: str
    source: str
    split: str
    messages: Messages
    """user and system turns as parts (`{"type": "image"}`, `{"type": "text", "text": …}`), answers as text"""
    images: tuple[ImageRef, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """keys of the record that are none of ours, e.g. the objects truly in a scene"""
    where: str = field(default="", compare=False)
    """file and record, for messages to people: `train.jsonl: line 7`"""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with a preferred and another response."""

    pair_id: str
    task: str
    source: str
    split: str
    messages: Messages
    images: tuple[ImageRef, ...]
    chosen: str
    rejected: str
    where: str = field(default="", compare=False)
    """file and record, for messages to people"""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used, and why."""

    where: str
    """file and record: `train.jsonl: line 7`"""
    reason: str
    """what was expected and what was got"""

    def __str__(self) -> str:
        """The sentence for people."""
        return f"{self.where}: {self.reason}"


Read = Conversation | PreferencePair | BadRecord
Record = TypeVar("Record", Conversation, PreferencePair)


@dataclass(frozen=True)
class ReadOptions:
    """What a caller says about a whole source."""

    image_root: Path | str = Path()
    """folder, or s3://, gs://, az:// address, that image names are relative to"""
    source: str | None = None
    """name of the source in the lake; none: the file's name without its ending"""
    task: str = "conversation"
    """task of records that name none"""
    split: str = "train"
    """split of records that name none"""
    needs_response: bool = True
    """a conversation must end with an assistant turn; False for prompts that somebody is to answer"""


class RecordError(Exception):
    """Why the record at hand cannot be used; a reader turns it into a `BadRecord`."""


def good_records(reads: Iterable[Record | BadRecord]) -> Iterator[Record]:
    """The records of a stream in which every one must be usable. Raises `DataError` for the first that is not."""
    for read in reads:
        if isinstance(read, BadRecord):
            raise DataError(str(read))
        yield read


def record_id(given: object, file: InputFile, number: int) -> str:
    """The record's id as text; one without is named by its file and place. Raises `RecordError`."""
    if given is None:
        return f"{file.stem}-{number}"
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise RecordError(f"`id` must be a string or a whole number, got {_short(given)}")
    text = str(given)
    if not text.strip():
        raise RecordError("`id` is empty; leave it out to have the record named by its place")
    # Printable ASCII needs no closer look, and is what nearly all ids are.
    if not (text.isascii() and text.isprintable()):
        refused = next((char for char in text if unicodedata.category(char) in _REFUSED_IN_IDS), None)
        if refused is not None:
            raise RecordError(f"`id` holds U+{ord(refused):04X}; ids must not hold control characters or surrogates")
    size = len(text.encode())
    if size > _MAX_ID_BYTES:
        raise RecordError(f"`id` has {size} bytes, at most {_MAX_ID_BYTES} are allowed; it begins with {text[:40]!r}")
    return text


def check_text(text: str, name: str) -> str:
    """The text itself. Raises `RecordError` if UTF-8 cannot spell it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(text[error.start]):04X}"
            raise RecordError(f"`{name}` holds {surrogate}, half of a character; mend the text") from None
    return text


def as_text(value: object, name: str, default: str) -> str:
    """A short text such as a task; `default` for none. Raises `RecordError`."""
    return default if value is None else check_text(str(value), name)


def content_parts(text: str) -> list[dict[str, str]]:
    """Text with `<image>` placeholders as content parts; line breaks around a placeholder belong to it."""
    if PLACEHOLDER not in text:
        return [{"type": "text", "text": text.strip("\n")}] if text.strip() else []
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def image_list(value: object, name: str = "image") -> list[str]:
    """The names of a record's images: none, one, or a list. Raises `RecordError`."""
    if value is None or value == "":
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(entry, str) and entry for entry in names):
        raise RecordError(f"`{name}` must be a path or a list of paths, got {_short(value)}")
    return names


def check_messages(messages: Messages, num_images: int, *, needs_response: bool) -> None:
    """Placeholders are counted, and the last word is somebody's who should have it. Raises `RecordError`."""
    num_placeholders = 0
    for message in messages:
        if not isinstance(message["content"], str):
            num_placeholders += sum(part["type"] == "image" for part in message["content"])
    if num_placeholders != num_images:
        raise RecordError(
            f"{num_placeholders} {PLACEHOLDER} placeholders but {num_images} images; write one placeholder for each "
            "image, in order"
        )
    if needs_response and messages[-1]["role"] != "assistant":
        raise RecordError(
            f"the last turn must be the assistant's, got {messages[-1]['role']!r}; there is no response to score"
        )


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
