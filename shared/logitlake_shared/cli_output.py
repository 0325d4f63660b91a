"""An Arrow table as a person, a pipe or a file wants it: table, json, csv, parquet, arrow.

Promises: nothing is lost on the way to a pipe or file (NaN and infinities have names in JSON, NULL and the empty text
differ in CSV, bytes are base64), nothing in a cell can steer the terminal, and a file appears whole or not at all. On
a terminal a table is folded to the width, or laid on its side where it has too many columns for that, and cut after
`limit` rows with a sentence that says so. In a pipe it is neither folded nor cut.
"""

import base64
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Literal, cast

import click
import pyarrow as pa
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logitlake_shared.errors import ConfigError

__all__ = ["Format", "compact_table", "format_of", "plain", "show_records", "show_table", "to_json", "write"]

Format = Literal["table", "json", "csv", "parquet", "arrow"]

_BINARY = ("parquet", "arrow")
_SUFFIXES: dict[str, Format] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
}
# A cell on a terminal: enough to recognise, not enough to push the other rows away.
_SHOWN_TEXT = 400
_SHOWN_ITEMS = 8
# The narrowest column of text that is still read; a table that cannot give it so much is laid on its side.
_FOLDED_WIDTH = 12
_COLUMN_GAP = 2
# Rows turned into Python objects at a time.
_CHUNK_ROWS = 4096


def format_of(chosen: str | None, to: Path | None) -> Format:
    """The format that was asked for, else the one that the file's name says, else a table."""
    if chosen is not None:
        return cast("Format", chosen)  # click has checked it
    return _SUFFIXES.get(to.suffix.lower(), "table") if to is not None else "table"


def write(answer: pa.RecordBatchReader, output: Format, to: Path | None, limit: int = 0) -> int:
    """Writes the answer to the file `to`, else to stdout, and returns its number of rows.

    It is never whole in memory, but for a table that is not cut. Raises `ConfigError` for bytes on a terminal.
    """
    counted = _Counted(answer)
    if to is not None:
        _write_file(counted, output, to)
    elif output in _BINARY:
        if sys.stdout.isatty():
            raise ConfigError(f"{output} is binary and this is a terminal; pipe it on, or name a file with --to FILE")
        _write_binary(counted, output, sys.stdout.buffer)
    elif output == "table":
        _show_answer(counted, limit)
    else:
        for line in _csv_lines(counted) if output == "csv" else _json_lines(counted):
            click.echo(line, nl=False)
    return counted.num_rows


def show_table(table: pa.Table, console: Console | None = None, *, on_its_side: bool = False) -> None:
    """Prints the table. What is too wide becomes one block a row, or with `on_its_side` one column a row."""
    console = console or Console()
    if not console.is_terminal:
        # Rich takes a thousandth of a second a cell, which a pipe of a million rows would feel.
        console.file.writelines(_text_lines(table))
    elif _folded_width(table) <= console.width:
        console.print(_grid(table))
    elif on_its_side:
        show_records(table, console)
    else:
        _print_sideways(console, table)


def show_records(table: pa.Table, console: Console | None = None) -> None:
    """The table turned on its side, one column a record: few wide records stay readable on a narrow terminal.

    Records that do not fit side by side go under each other.
    """
    console = console or Console()
    labels = [Text(name) for name in table.schema.names]
    label_width = max(len(name) for name in table.schema.names)
    block, block_width = [labels], label_width
    for row in _rows(table):
        record = [_cell(value) for value in row]
        width = max(text.cell_len for text in record) + _COLUMN_GAP
        if console.is_terminal and len(block) > 1 and block_width + width + _COLUMN_GAP > console.width:
            console.print(_sideways(block))
            block, block_width = [labels], label_width
        block.append(record)
        block_width += width
    if not console.is_terminal:
        console.width = max(block_width + _COLUMN_GAP, 1)
    console.print(_sideways(block))


def compact_table() -> Table:
    """An empty table of two blanks between columns and no frame; all commands show theirs in it."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text that any reader takes: NaN and infinities are the strings "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Decimal):  # DuckDB's sums of integers
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | float) else str(value)


class _Counted:
    """The batches of an answer, counted as they pass."""

    def __init__(self, answer: pa.RecordBatchReader) -> None:
        self.schema: pa.Schema = answer.schema
        self.num_rows = 0
        self._answer = answer

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._answer:
            self.num_rows += batch.num_rows
            yield batch

    def table(self, limit: int | None = None) -> pa.Table:
        """All rows; with `limit` the first of them, while the others are counted and dropped."""
        kept: list[pa.RecordBatch] = []
        for batch in self:
            before = self.num_rows - batch.num_rows
            if limit is None or before < limit:
                kept.append(batch if limit is None else batch.slice(0, limit - before))
        return pa.Table.from_batches(kept, self.schema)


def _show_answer(counted: _Counted, limit: int) -> None:
    console = Console()
    table = counted.table(limit if limit and console.is_terminal else None)
    show_table(table, console)
    if table.num_rows < counted.num_rows:
        sentence = f"{table.num_rows:,} of {counted.num_rows:,} rows; --rows 0 shows all, --to FILE keeps them"
        console.print(Text(sentence, "dim"))


def _grid(table: pa.Table) -> Table:
    grid = compact_table()
    for field in table.schema:
        numeric = _is_number(field.type)
        grid.add_column(Text(field.name), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in _rows(table):
        grid.add_row(*(_cell(value) for value in row))
    return grid


def _sideways(columns: list[list[Text]]) -> Table:
    """The columns beside each other, the first cell of each being its heading."""
    grid = compact_table()
    for column in columns:
        grid.add_column(column[0], overflow="fold")
    for cells in zip(*(column[1:] for column in columns), strict=True):
        grid.add_row(*cells)
    return grid


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_))


def _text_lines(table: pa.Table) -> Iterator[str]:
    """The table as plain text, every column as wide as it must be."""
    names = table.schema.names
    right = [_is_number(field.type) for field in table.schema]
    rows = [[_text(value) for value in row] for row in _rows(table)]
    widths = [max(map(cell_len, cells)) for cells in zip(names, *rows, strict=True)]
    gap = " " * _COLUMN_GAP

    def line(cells: Sequence[str]) -> str:
        padded = (
            " " * (width - cell_len(cell)) + cell if is_right else cell + " " * (width - cell_len(cell))
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        )
        return gap.join(padded).rstrip() + "\n"

    yield line(names)
    yield "─" * (sum(widths) + _COLUMN_GAP * (len(widths) - 1)) + "\n"
    yield from map(line, rows)


def _folded_width(table: pa.Table) -> int:
    """The least width of a table: numbers are never broken, text down to `_FOLDED_WIDTH`."""
    total = 0
    for field, column in zip(table.schema, table.columns, strict=True):
        width = max([cell_len(field.name), *(cell_len(_text(value)) for value in column.to_pylist())])
        total += (width if _is_number(field.type) else min(width, _FOLDED_WIDTH)) + _COLUMN_GAP
    return total


def _print_sideways(console: Console, table: pa.Table) -> None:
    """One block a row, one line a column."""
    names = [Text(name, "bold") for name in table.schema.names]
    for number, row in enumerate(_rows(table), start=1):
        console.rule(Text(f"row {number:,}", "dim"), align="left", style="dim")
        block = Table.grid(padding=(0, 2))
        block.add_column(no_wrap=True)
        block.add_column(overflow="fold")
        for name, value in zip(names, row, strict=True):
            block.add_row(name, _cell(value))
        console.print(block)


def _rows(answer: pa.Table | _Counted) -> Iterator[list[Any]]:
    """The rows as lists, by position: an answer may name two columns alike."""
    for batch in answer.to_batches(_CHUNK_ROWS) if isinstance(answer, pa.Table) else answer:
        for start in range(0, batch.num_rows, _CHUNK_ROWS):
            columns = [column.slice(start, _CHUNK_ROWS).to_pylist() for column in batch.columns]
            yield from (list(row) for row in zip(*columns, strict=True))


def _cell(value: Any) -> Text:
    if value is None:
        return Text(_text(value), "dim italic")
    return Text(_text(value), "yellow" if isinstance(value, float) and not math.isfinite(value) else "")


def _text(value: Any) -> str:
    if value is None:
        return "NULL"
    return _list_text(value) if isinstance(value, list) else _short(_scalar_text(value))


def _list_text(values: list[Any]) -> str:
    items = ["NULL" if item is None else _short(_scalar_text(item)) for item in values[:_SHOWN_ITEMS]]
    rest = len(values) - len(items)
    return f"[{', '.join(items)}{f', … {rest:,} more' if rest else ''}]"


def _scalar_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:.6g}"
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, Decimal | date | datetime | time):
        return str(value)
    if isinstance(value, dict | list):
        return to_json(value)
    return _printable(str(value))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}… ({len(text):,} characters)"


def _printable(text: str) -> str:
    """Control characters written out: what a model answered must not move the cursor."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _json_lines(answer: _Counted) -> Iterator[str]:
    names = answer.schema.names
    if len(set(names)) < len(names):
        raise ConfigError(f"the answer has two columns of one name ({', '.join(names)}); name them apart with AS")
    for row in _rows(answer):
        yield to_json(dict(zip(names, row, strict=True))) + "\n"


def _csv_lines(answer: _Counted) -> Iterator[str]:
    yield ",".join(_csv_field(name) for name in answer.schema.names) + "\n"
    for row in _rows(answer):
        yield ",".join("" if value is None else _csv_field(plain(value)) for value in row) + "\n"


def _csv_field(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # Quoted where the standard asks for it, and where an empty text would read as NULL.
    return '"' + text.replace('"', '""') + '"' if not text or any(sign in text for sign in ',"\r\n') else text


def _write_file(answer: _Counted, output: Format, to: Path) -> None:
    if not to.parent.is_dir():
        raise ConfigError(f"{to}: there is no folder {to.parent}; make it, or name another file")
    unfinished = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        if output in _BINARY:
            with unfinished.open("wb") as binary:
                _write_binary(answer, output, binary)
        else:
            with unfinished.open("w", encoding="utf-8", newline="") as text:
                if output == "table":
                    text.writelines(_text_lines(answer.table()))
                else:
                    text.writelines(_csv_lines(answer) if output == "csv" else _json_lines(answer))
        unfinished.replace(to)
    except OSError as error:
        raise ConfigError(f"{to}: cannot be written: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _write_binary(answer: _Counted, output: Format, sink: IO[bytes]) -> None:
    if output == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetWriter(pa.PythonFile(sink, "w"), answer.schema, compression="zstd") as file:
            for batch in answer:
                file.write_batch(batch)
        return
    with pa.ipc.new_stream(sink, answer.schema) as stream:
        for batch in answer:
            stream.write_batch(batch)
