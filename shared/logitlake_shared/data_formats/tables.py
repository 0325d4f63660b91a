"""Rows of Parquet and Arrow files, a batch at a time, and the folders that Hugging Face `datasets` saves.

`save_to_disk` writes Arrow IPC streams and names them in `state.json`; a dictionary of splits is a folder of such
folders, named in `dataset_dict.json`. Plain Parquet or Arrow files, one or a folder of them, are read the same way.
Reading needs pyarrow alone. A file is read by position, not mapped, so that memory stays what a batch needs.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitlake_shared.data_formats.files import InputFile, InputLog, input_files, note_columnar
from logitlake_shared.errors import DataError

__all__ = ["TableFile", "TableRow", "column_names", "table_batches", "table_files", "table_rows"]

_SUFFIXES = (".parquet", ".arrow")
# Rows that are Python objects at one time; with images inside, about as many megabytes.
_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class TableFile:
    """A file of rows."""

    file: InputFile
    split: str | None
    """the split that its folder stands for, where `datasets` says so"""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row and where it stands."""

    number: int
    """from 0 in its file"""
    where: str
    values: dict[str, Any]


def table_files(path: Path) -> list[TableFile]:
    """The files of a saved dataset in its own order; else a Parquet or Arrow file, a folder, or a pattern, sorted.

    Raises `DataError`.
    """
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
            raise DataError(f"{path / 'dataset_dict.json'}: names no splits; save the dataset again")
        return [
            TableFile(InputFile(file.path, f"{split}/{file.name}"), split)
            for split in splits
            for file in _saved_files(_inside(path, split))
        ]
    if (path / "state.json").is_file():
        return [TableFile(file, None) for file in _saved_files(path)]
    return [TableFile(file, None) for file in input_files(path, _SUFFIXES)]


def table_rows(
    file: InputFile, required: Sequence[str], log: InputLog | None = None, columns: Sequence[str] | None = None
) -> Iterator[TableRow]:
    """The rows of one file as Python values. Raises `DataError` if it cannot be read or a column is missing."""
    number = 0
    for batch in table_batches(file, required, log, columns):
        for values in batch.to_pylist():
            yield TableRow(number, f"{file.name}: row {number}", values)
            number += 1


def table_batches(
    file: InputFile,
    required: Sequence[str],
    log: InputLog | None = None,
    columns: Sequence[str] | None = None,
    batch_rows: int = _BATCH_ROWS,
) -> Iterator[Any]:
    """The rows of one file as Arrow record batches of at most `batch_rows` rows, in order.

    Raises `DataError` if the file cannot be read or a column is missing.
    """
    import pyarrow as pa

    number = 0
    try:
        note_columnar(file, log)
        for batch in _batches(file.path, required, columns, batch_rows):
            for start in range(0, batch.num_rows, batch_rows):
                piece = batch.slice(start, batch_rows)
                yield piece
                number += piece.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: not a readable {_kind(file.path)} file, at row {number}: {error}") from error


def column_names(path: Path) -> list[str]:
    """The file's columns. Raises `DataError`."""
    import pyarrow as pa

    try:
        return _column_names(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable {_kind(path)} file: {error}") from error


def _batches(path: Path, required: Sequence[str], columns: Sequence[str] | None, batch_rows: int) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = _column_names(path)
    missing = sorted(set(required) - set(names))
    if missing:
        raise DataError(f"{path}: columns {', '.join(missing)} missing; it has {', '.join(names)}")
    wanted = None if columns is None else [name for name in names if name in columns]
    if path.suffix == ".arrow":
        with pa.OSFile(str(path)) as source:
            for batch in _arrow_batches(source):
                yield batch if wanted is None else batch.select(wanted)
        return
    with pa.OSFile(str(path)) as source:
        # Else a whole row group of images is held beside the batch. Of a page no less than all can be read, and some
        # writers make one page of a row group.
        table = pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        yield from table.iter_batches(batch_size=batch_rows, columns=wanted, use_threads=False)


def _arrow_batches(source: Any) -> Iterator[Any]:
    """Batches of an Arrow file in either of its two forms, stream (what `datasets` writes) or file."""
    import pyarrow as pa

    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(place) for place in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(source)


def _column_names(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as source:
        if path.suffix != ".arrow":
            return list(pq.ParquetFile(source).schema_arrow.names)
        magic = source.read(6)
        source.seek(0)
        opened = pa.ipc.open_file(source) if magic == b"ARROW1" else pa.ipc.open_stream(source)
        return list(opened.schema.names)


def _saved_files(folder: Path) -> list[InputFile]:
    state = _json(folder / "state.json")
    if state.get("_indices_files"):
        raise DataError(
            f"{folder}: the dataset was saved with a selection beside its rows; call flatten_indices() and save again"
        )
    files = state.get("_data_files")
    if not isinstance(files, list) or not files:
        raise DataError(f"{folder / 'state.json'}: names no data files; save the dataset again")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in files]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{folder / 'state.json'}: `_data_files` must be a list of filenames, got {files!r:.120}")
    return [InputFile(_inside(folder, str(name)), str(name)) for name in names]


def _inside(folder: Path, name: str) -> Path:
    if not name or Path(name).name != name:
        raise DataError(f"{folder}: names {name!r}, which is not in the folder; save the dataset again")
    return folder / name


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected an object, got {type(document).__name__}")
    return document


def _kind(path: Path) -> str:
    return "Arrow" if path.suffix == ".arrow" else "Parquet"
