"""From a path to records' raw form: which files, what they hold one piece at a time, and what was read.

A text file is hashed while it is read, so that the digest costs no second pass; a columnar file is read in pieces
and known by its size and time. `InputLog` collects both, `check_unchanged` compares them with what is there now.
"""

import glob
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from logitlake_shared.errors import DataError

__all__ = [
    "InputFile",
    "InputLog",
    "InputState",
    "JsonRecord",
    "JsonSyntaxFault",
    "check_unchanged",
    "input_files",
    "json_records",
]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_LINE_SUFFIXES = (".jsonl", ".ndjson")
_MAX_LINE_BYTES = 256 * 2**20
_CHUNK_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    path: Path
    name: str
    """relative to the source's folder: what messages and ids say, the same on every machine"""

    @cached_property
    def stem(self) -> str:
        """The name without its ending: ids of records without an id begin with it."""
        return self.name[: -len(Path(self.name).suffix) or None]


@dataclass(frozen=True)
class InputState:
    """What a file was when it was read."""

    path: Path
    num_bytes: int
    mtime_ns: int
    sha256: str | None
    """of all its bytes; none where it was not read from end to end (columnar files, or a limit)"""


@dataclass
class InputLog:
    """Every file that a stream has read so far, to its end or to the last record that was wanted, in order."""

    files: list[InputState] = field(default_factory=list)


def input_files(path: Path, suffixes: Sequence[str]) -> list[InputFile]:
    """The file, all files below the folder, or all that match the pattern `path`, sorted; with one of the endings.

    A file that is named outright may have any ending. Raises `DataError` when there is none.
    """
    if path.is_file():
        return [InputFile(path, path.name)]
    if path.is_dir():
        root, found = path, [entry for entry in path.rglob("*") if entry.suffix in suffixes]
    elif glob.has_magic(str(path)):
        root = Path(*path.parts[: _first_pattern(path)])
        found = [Path(entry) for entry in glob.iglob(str(path), recursive=True)]  # noqa: PTH207 (may be absolute)
        found = [entry for entry in found if entry.suffix in suffixes]
    else:
        raise DataError(f"{path}: no such file or folder; check `path`")
    files = sorted(entry for entry in found if entry.is_file())
    if not files:
        raise DataError(f"{path}: holds no file that ends in {', '.join(suffixes)}; check `path`")
    return [InputFile(entry, entry.relative_to(root).as_posix()) for entry in files]


def check_unchanged(states: Sequence[InputState]) -> None:
    """Raises `DataError` (`input_changed`) if a file is not what it was when it was read.

    A file of the same size and time is believed; one of another time is compared by its digest, where it has one.
    """
    for state in states:
        try:
            now = state.path.stat()
        except OSError as error:
            raise DataError(f"input_changed: {state.path} was read and is gone: {error.strerror or error}") from error
        if now.st_size == state.num_bytes and now.st_mtime_ns == state.mtime_ns:
            continue
        same = False
        if state.sha256 is not None and now.st_size == state.num_bytes:
            with state.path.open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == state.sha256
        if not same:
            raise DataError(
                f"input_changed: {state.path} had {state.num_bytes} bytes when it was read and has {now.st_size} and "
                "another time now; restore it, or plan and capture into a new cache"
            )


def note_columnar(file: InputFile, log: InputLog | None) -> None:
    """Writes a columnar file into the log: known by size and time."""
    if log is not None:
        status = file.path.stat()
        log.files.append(InputState(file.path, status.st_size, status.st_mtime_ns, None))


@dataclass(frozen=True, slots=True)
class JsonSyntaxFault:
    """Text that is not JSON where a record should be."""

    reason: str


@dataclass(frozen=True, slots=True)
class JsonRecord:
    """One JSON value and where it stands."""

    number: int
    """line from 1 in a file of lines, place from 0 in a list"""
    where: str
    value: Any
    """the value, or a `JsonSyntaxFault` for a line that is none"""


def json_records(file: InputFile, log: InputLog | None = None) -> Iterator[JsonRecord]:
    """The values of a JSON list or of a file of lines, one at a time. Raises `DataError` for a file it cannot follow.

    In a list, a fault of syntax ends the file: where the next record begins is no longer known.
    """
    sha256, status = None, file.path.stat()
    try:
        with _HashedFile(file.path) as raw, io.BufferedReader(cast(io.RawIOBase, raw), _CHUNK_BYTES) as text:
            if text.peek(len(_BOM)).startswith(_BOM):
                text.read(len(_BOM))
            if file.path.suffix in _LINE_SUFFIXES:
                yield from _lines(file, text)
            else:
                yield from _list_items(file, text)
            if not text.read(1):
                sha256 = raw.hexdigest()
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from error
    finally:
        # Also of a file whose reader has seen enough.
        if log is not None:
            log.files.append(InputState(file.path, status.st_size, status.st_mtime_ns, sha256))


class _HashedFile(io.RawIOBase):
    """A file that takes its own digest while it is read from start to end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = io.FileIO(path)
        self._sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._file.readinto(buffer) or 0
        self._sha256.update(memoryview(buffer)[:count])
        return count

    def hexdigest(self) -> str:
        """sha256 of the bytes read so far."""
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines(file: InputFile, text: "io.BufferedReader[io.RawIOBase]") -> Iterator[JsonRecord]:
    number = 0
    while line := text.readline(_MAX_LINE_BYTES):
        number += 1
        where = f"{file.name}: line {number}"
        if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := text.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield JsonRecord(number, where, JsonSyntaxFault(f"the line is longer than {_MAX_LINE_BYTES} bytes"))
        elif not line.isspace():
            yield JsonRecord(number, where, _parsed(line))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return JsonSyntaxFault(f"not UTF-8 text: {error}")
    except (ValueError, RecursionError) as error:
        return JsonSyntaxFault(f"not valid JSON: {error}")


def _list_items(file: InputFile, text: "io.BufferedReader[io.RawIOBase]") -> Iterator[JsonRecord]:
    import ijson

    start = text.peek(_CHUNK_BYTES).lstrip()[:1]
    if start != b"[":
        got = "an empty file" if not start else {b"{": "an object"}.get(start, f"{start!r}")
        raise DataError(
            f"{file.path}: not valid JSON of the kind expected, a list of records; got {got}. One record a line goes "
            "in .jsonl"
        )
    items = ijson.items(text, "item", use_float=True)
    number = 0
    while True:
        try:
            value = next(items)
        except StopIteration:
            return
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise DataError(f"{file.path}: not valid JSON in or after record {number}: {error}") from error
        yield JsonRecord(number, f"{file.name}: record {number}", value)
        number += 1


def _first_pattern(path: Path) -> int:
    return next(place for place, part in enumerate(path.parts) if glob.has_magic(part))
