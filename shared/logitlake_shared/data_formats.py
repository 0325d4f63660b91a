"""Training data as people have it: LLaVA JSON / JSONL and RLAIF-V Parquet, read and checked.

Every fault is one `DataError` that names the file, the record (and for JSONL the line), what was expected and what
was got. Images are only located here; they are opened when a unit is captured.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitlake_shared.errors import DataError, ImageError

__all__ = ["Conversation", "ImageRef", "PreferencePair", "read_llava", "read_rlaif_v"]

_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LLAVA_KEYS = {"id", "image", "images", "conversations", "task", "split", "source"}

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class ImageRef:
    """Where an image's encoded bytes are: in a file or at hand."""

    path: Path | None = None
    data: bytes | None = None

    def load(self) -> bytes:
        """The encoded bytes. Raises `ImageError` (`image_missing`)."""
        if self.data is not None:
            return self.data
        try:
            return Path(self.path or "").read_bytes()
        except OSError as error:
            raise ImageError(f"image_missing: {self.path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Conversation:
    """One training sample: turns, images in the order of their placeholders, and where it came from."""

    sample_id: str
    task: str
    source: str
    split: str
    messages: Messages
    images: tuple[ImageRef, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """keys of the record that are none of ours, e.g. the objects truly in a scene"""


@dataclass(frozen=True)
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


def read_llava(
    path: Path,
    image_root: Path,
    *,
    task: str = "conversation",
    source: str | None = None,
    split: str = "train",
) -> Iterator[Conversation]:
    """The records of a LLaVA `.json` list or `.jsonl` file. A record's own `task`, `split`, `source` win.

    Raises `DataError`.
    """
    for where, record in _json_records(path):
        unknown_shape = f"{where}: expected an object with `id` and `conversations`"
        if not isinstance(record, dict):
            raise DataError(f"{unknown_shape}, got {type(record).__name__}")
        missing = {"id", "conversations"} - record.keys()
        if missing:
            raise DataError(f"{unknown_shape}; {', '.join(sorted(missing))} missing")
        names = record.get("images", record.get("image", []))
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: `image` must be a path or a list of paths, got {names!r}")
        messages = _messages(record["conversations"], where)
        num_placeholders = sum(
            part["type"] == "image" for message in messages for part in message["content"] if isinstance(part, dict)
        )
        if num_placeholders != len(names):
            raise DataError(
                f"{where}: {num_placeholders} {_PLACEHOLDER} placeholders but {len(names)} images; write one "
                "placeholder for each image, in order"
            )
        yield Conversation(
            sample_id=str(record["id"]),
            task=str(record.get("task", task)),
            source=str(record.get("source", source or path.stem)),
            split=str(record.get("split", split)),
            messages=messages,
            images=tuple(ImageRef(path=image_root / name) for name in names),
            extra={key: value for key, value in record.items() if key not in _LLAVA_KEYS},
        )


def read_rlaif_v(path: Path, *, source: str | None = None) -> Iterator[PreferencePair]:
    """The rows of an RLAIF-V Parquet file: question, chosen, rejected, image bytes. Raises `DataError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    missing = {"image", "question", "chosen", "rejected"} - set(file.schema_arrow.names)
    if missing:
        raise DataError(f"{path}: columns {', '.join(sorted(missing))} missing; expected the columns of RLAIF-V")
    row = 0
    for batch in file.iter_batches():
        for record in batch.to_pylist():
            where = f"{path}: row {row}"
            for key in ("question", "chosen", "rejected"):
                if not isinstance(record[key], str) or not record[key].strip():
                    raise DataError(f"{where}: `{key}` must be a non-empty string, got {record[key]!r}")
            image = (record["image"] or {}).get("bytes")
            if not image:
                raise DataError(f"{where}: `image.bytes` is empty; RLAIF-V rows carry their image")
            if record["chosen"] == record["rejected"]:
                raise DataError(f"{where}: chosen and rejected are the same text; drop the row")
            yield PreferencePair(
                pair_id=str(record["idx"]) if record.get("idx") is not None else str(row),
                task=_pair_task(record.get("origin_split")),
                source=str(source or record.get("ds_name") or path.stem),
                split="train",
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": record["question"]}],
                    }
                ],
                images=(ImageRef(data=image),),
                chosen=record["chosen"],
                rejected=record["rejected"],
            )
            row += 1


def _pair_task(origin_split: str | None) -> str:
    """RLAIF-V writes where a question comes from as JSON text, e.g. `{"type": "detailed_description", …}`."""
    try:
        origin = json.loads(origin_split or "")
    except json.JSONDecodeError:
        return origin_split or "preference"
    return str(origin.get("type", "preference")) if isinstance(origin, dict) else "preference"


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{path}: line {number}", _parse(line, f"{path}: line {number}")
        return
    document = _parse(text, str(path))
    if not isinstance(document, list):
        raise DataError(
            f"{path}: expected a JSON list of records, got {type(document).__name__}; one record a line goes in .jsonl"
        )
    for number, record in enumerate(document):
        yield f"{path}: record {number}", record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


def _messages(turns: Any, where: str) -> Messages:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: `conversations` must be a non-empty list of turns, got {turns!r}")
    messages: Messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            raise DataError(f"{where}: turn {number} must be {{'from': 'human' | 'gpt', 'value': text}}, got {turn!r}")
        role = _ROLES[turn["from"]]
        content = turn["value"] if role == "assistant" else _parts(turn["value"])
        messages.append({"role": role, "content": content})
    return messages


def _parts(text: str) -> list[dict[str, str]]:
    """Text with `<image>` placeholders as content parts; blank lines around a placeholder belong to it."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(_PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts
