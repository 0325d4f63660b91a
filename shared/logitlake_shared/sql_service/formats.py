"""Answers as bytes: Arrow's stream format, JSON, NDJSON, CSV and Parquet, made batch by batch as they are read.

    arrow    as it comes; the last, empty batch carries the end as metadata
    json     {"columns": [{name, type}], "rows": [[…]], "query_id": …, "truncated": …}: rows are lists, names may repeat
    ndjson   one object a row, then one object `{"$end": {…}}`
    csv      a header, rows; after a cut answer a last line `# truncated …`
    parquet  the end as metadata of the file

What was cut short says so inside the body too, because a header is sent before anybody knows. An answer without its
end was interrupted: JSON does not parse, NDJSON has no `$end`, Parquet no footer, an Arrow stream no last batch.

In the text formats a value means what it meant: HUGEINT and DECIMAL are strings (a double would round them), blobs are
base64, NaN and the infinities are null and counted in `warnings` (JSON knows no such numbers), times are ISO 8601.
Names may repeat in SQL. JSON, CSV and Arrow keep them; where a name is a key (NDJSON, Parquet) the second `a` is `a_1`,
as DuckDB itself calls it in a subquery.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitlake_shared.errors import QueryError

__all__ = ["FORMATS", "Answer", "Format", "encode"]

# As many rows or bytes as a row group of Parquet is made of.
_GROUP_ROWS, _GROUP_BYTES = 65_536, 2**24


class Answer(Protocol):
    """What `SqlResult` is: a schema, batches to be read once, and what is known after the last one."""

    query_id: str
    snapshot: dict[str, int]
    schema: pa.Schema
    truncated: str
    rows: int
    milliseconds: float

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """The batches."""


@dataclass(frozen=True)
class Format:
    """A way to write answers."""

    name: str
    media_type: str
    encode: Callable[[Answer], Iterator[bytes]] = field(repr=False)


def encode(answer: Answer, name: str, *, csv_safe: bool = False) -> Iterator[bytes]:
    """The answer in the format `name` (of `FORMATS`), in pieces. Raises `QueryError` for another one.

    With `csv_safe` a text that a spreadsheet would take for a formula (it begins with `=`, `+`, `-`, `@`, a tab or a
    carriage return) gets an apostrophe before it. Raises what reading the answer raises.
    """
    if name not in FORMATS:
        raise QueryError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
    pieces = _csv(answer, safe=csv_safe) if name == "csv" else FORMATS[name].encode(answer)
    # An empty piece would be the end of a body that is sent in chunks.
    return (piece for piece in pieces if piece)


def _arrow(answer: Answer) -> Iterator[bytes]:
    sink = _Sink()
    about = {"logitlake.query_id": answer.query_id, "logitlake.snapshot": json.dumps(answer.snapshot)}
    schema = answer.schema.with_metadata((answer.schema.metadata or {}) | about)
    with pa.ipc.new_stream(sink, schema) as writer:
        yield sink.taken()
        for batch in answer:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            yield sink.taken()
        last = pa.RecordBatch.from_arrays([pa.nulls(0, column.type) for column in schema], schema=schema)
        writer.write_batch(last, custom_metadata=_as_metadata(_end(answer)))
    yield sink.taken()


def _json(answer: Answer) -> Iterator[bytes]:
    columns = [{"name": column.name, "type": str(column.type)} for column in answer.schema]
    head = {"query_id": answer.query_id, "snapshot": answer.snapshot, "columns": columns}
    yield (_dumps(head)[:-1] + ', "rows": [').encode()
    values = _Values()
    separator = "\n"
    for batch in answer:
        lines = [_dumps(row) for row in zip(*(values.of(column) for column in batch.columns), strict=True)]
        yield (separator + ",\n".join(lines)).encode()
        separator = ",\n"
    yield ("\n], " + _dumps(_end(answer) | {"warnings": values.warnings()})[1:] + "\n").encode()


def _ndjson(answer: Answer) -> Iterator[bytes]:
    names, values = _distinct(answer.schema.names), _Values()
    for batch in answer:
        rows = zip(*(values.of(column) for column in batch.columns), strict=True)
        yield "".join(_dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows).encode()
    about = {"query_id": answer.query_id, "snapshot": answer.snapshot}
    yield (_dumps({"$end": about | _end(answer) | {"warnings": values.warnings()}}) + "\n").encode()


def _csv(answer: Answer, *, safe: bool = False) -> Iterator[bytes]:
    yield _csv_line([_harmless(name) if safe else name for name in answer.schema.names])
    values = _Values()
    for batch in answer:
        columns = [
            [_csv_text(value, safe=safe and _is_text(column.type)) for value in values.of(column)]
            for column in batch.columns
        ]
        yield b"".join(_csv_line(row) for row in zip(*columns, strict=True))
    if answer.truncated:
        yield f"# truncated by the limit of {answer.truncated} after {answer.rows} rows\n".encode()


def _parquet(answer: Answer) -> Iterator[bytes]:
    sink = _Sink()
    schema = pa.schema(
        [
            column.with_type(_parquet_type(column.type)).with_name(name)
            for name, column in zip(_distinct(answer.schema.names), answer.schema, strict=True)
        ]
    )
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for group in _grouped(answer):
            columns = [
                column if column.type == wanted.type else _as_text(column)
                for column, wanted in zip(group.columns, schema, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            yield sink.taken()
        about = {"query_id": answer.query_id, "snapshot": json.dumps(answer.snapshot)} | _end(answer)
        writer.add_key_value_metadata(_as_metadata(about))
    yield sink.taken()


FORMATS = {
    one.name: one
    for one in (
        Format("arrow", "application/vnd.apache.arrow.stream", _arrow),
        Format("json", "application/json", _json),
        Format("ndjson", "application/x-ndjson", _ndjson),
        Format("csv", "text/csv", _csv),
        Format("parquet", "application/vnd.apache.parquet", _parquet),
    )
}
"""The formats, by name."""


class _Values:
    """Columns as values of JSON; counts what JSON has no number for."""

    def __init__(self) -> None:
        self._not_finite = 0

    def warnings(self) -> list[str]:
        """What the reader should know."""
        if not self._not_finite:
            return []
        return [f"{self._not_finite} numbers that are not finite (NaN, Infinity) are null here"]

    def of(self, column: pa.Array) -> list[Any]:
        """A value for each row."""
        kind = column.type
        types = pa.types
        if types.is_dictionary(kind):
            return self.of(column.dictionary_decode())
        if types.is_floating(kind):
            finite = pc.is_finite(column)
            self._not_finite += len(column) - column.null_count - (pc.sum(finite).as_py() or 0)
            return _listed(pc.if_else(finite, column, pa.scalar(None, kind)))
        if types.is_decimal(kind) or (types.is_temporal(kind) and not types.is_interval(kind)):
            return _listed(pc.cast(column, pa.string()))
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
            return [None if value is None else base64.b64encode(value).decode() for value in _listed(column)]
        if types.is_map(kind):
            return self._entries(column)
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return self._lists(column, self.of(column.flatten()))
        if types.is_struct(kind):
            names = _distinct([part.name for part in kind])
            parts = [self.of(part) for part in column.flatten()]
            rows = zip(*parts, strict=True) if parts else ([] for _ in range(len(column)))
            valid = _listed(column.is_valid())
            return [
                dict(zip(names, row, strict=True)) if there else None for row, there in zip(rows, valid, strict=True)
            ]
        if types.is_interval(kind):
            return [None if value is None else _duration(value) for value in _listed(column)]
        return [self._one(value) for value in _listed(column)] if types.is_union(kind) else _listed(column)

    def _lists(self, column: pa.Array, flat: list[Any]) -> list[Any]:
        lengths = _listed(column.value_lengths()) if not pa.types.is_map(column.type) else _listed(_map_lengths(column))
        made: list[Any] = []
        at = 0
        for length in lengths:
            made.append(None if length is None else flat[at : at + length])
            at += length or 0
        return made

    def _entries(self, column: pa.Array) -> list[Any]:
        """An object where keys are texts, else a list of pairs."""
        lengths = _listed(_map_lengths(column))
        start = column.offsets[0].as_py() if len(column) else 0
        total = sum(length or 0 for length in lengths)
        keys, items = (self.of(part.slice(start, total)) for part in (column.keys, column.items))
        as_object = pa.types.is_string(column.type.key_type)
        pairs = self._lists(column, list(zip(keys, items, strict=True)))
        return [None if row is None else dict(row) if as_object else [list(pair) for pair in row] for row in pairs]

    def _one(self, value: Any) -> Any:
        """A value of a union, of which only Python knows the type."""
        if isinstance(value, float) and not math.isfinite(value):
            self._not_finite += 1
            return None
        if isinstance(value, bytes):
            return base64.b64encode(value).decode()
        if isinstance(value, list | tuple):
            return [self._one(part) for part in value]
        if isinstance(value, dict):
            return {str(key): self._one(part) for key, part in value.items()}
        return value if isinstance(value, str | int | float | bool | None) else str(value)


class _Sink(io.RawIOBase):
    """A file whose bytes are taken away as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        part = bytes(data)
        self._parts.append(part)
        return len(part)

    def taken(self) -> bytes:
        """What was written since the last time."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


def _end(answer: Answer) -> dict[str, Any]:
    return {
        "num_rows": answer.rows,
        "truncated": answer.truncated or None,
        "milliseconds": round(answer.milliseconds, 3),
    }


def _as_metadata(values: dict[str, Any]) -> dict[str, str]:
    return {f"logitlake.{key}": "" if value is None else str(value) for key, value in values.items()}


def _listed(column: pa.Array) -> list[Any]:
    values: list[Any] = column.to_pylist(maps_as_pydicts=None)
    return values


def _map_lengths(column: pa.Array) -> pa.Array:
    lengths = pc.subtract(column.offsets[1:], column.offsets[:-1])
    return pc.if_else(column.is_valid(), lengths, pa.scalar(None, lengths.type))


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _duration(value: Any) -> str:
    """ISO 8601, e.g. `P1M2DT3.5S`."""
    seconds = value.nanoseconds / 10**9
    return f"P{value.months}M{value.days}DT{seconds:.9f}".rstrip("0").rstrip(".") + "S"


def _distinct(names: Iterable[str]) -> list[str]:
    """Each name once: the second `a` is `a_1`, the third `a_2`."""
    made: dict[str, None] = {}
    for name in names:
        candidate, number = name, 0
        while candidate in made:
            number += 1
            candidate = f"{name}_{number}"
        made[candidate] = None
    return list(made)


def _is_text(kind: pa.DataType) -> bool:
    """Whether its values are what somebody wrote, so that they may begin with anything."""
    return not (pa.types.is_decimal(kind) or pa.types.is_temporal(kind) or pa.types.is_primitive(kind))


def _harmless(text: str) -> str:
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _csv_text(value: Any, *, safe: bool) -> str | None:
    if value is None or isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, dict | list):
        text = _dumps(value)
    else:
        text = str(value)
    return _harmless(text) if safe and text is not None else text


def _csv_line(fields: Iterable[str | None]) -> bytes:
    """Null is nothing, an empty text is `""`."""
    return (",".join(map(_csv_field, fields)) + "\n").encode()


def _csv_field(text: str | None) -> str:
    if text is None:
        return ""
    if text and not any(letter in text for letter in ',"\n\r#'):
        return text
    return '"' + text.replace('"', '""') + '"'


def _parquet_type(kind: pa.DataType) -> pa.DataType:
    """The type that Parquet has for it; text for what it has none for."""
    return pa.string() if _unknown_to_parquet(kind) else kind


def _unknown_to_parquet(kind: pa.DataType) -> bool:
    if pa.types.is_interval(kind) or pa.types.is_union(kind):
        return True
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(_unknown_to_parquet(kind.field(place).type) for place in range(kind.num_fields))


def _as_text(column: pa.ChunkedArray) -> pa.Array:
    """JSON; a text as it is."""
    values = [value for chunk in column.chunks for value in _Values().of(chunk)]
    return pa.array(
        [value if value is None or isinstance(value, str) else _dumps(value) for value in values], pa.string()
    )


def _grouped(answer: Answer) -> Iterator[pa.Table]:
    batches: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in answer:
        batches.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield pa.Table.from_batches(batches)
            batches, rows, size = [], 0, 0
    if batches:
        yield pa.Table.from_batches(batches)
