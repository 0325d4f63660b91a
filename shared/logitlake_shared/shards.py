"""Rows to Parquet bytes and back.

A shard is written by pyarrow (DuckDB's writer makes it a sixth larger): zstd level 3, the encoding of each column as
`logitlake_schemas.columns` declares it, page checksums, a page index, and row groups of one or two megabytes whatever
the length of the answers, so that one sample can be read without its shard. The footer repeats what is needed to
read a shard alone: format version, kind, cache, unit, spec fingerprint and what storing cost. The same rows give the
same bytes. A nullable column without any value is left out of the file, and is nulls again when it is read. Reading
verifies every page's checksum: without that, pyarrow and DuckDB return wrong values in silence
for nine of ten flipped bits.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitlake_schemas import COLUMNS, FORMAT_VERSION, Column, ShardEntry, ShardKind, StoredError, arrow_schema
from logitlake_shared.errors import LakeCorruptError, LakeError, LakeFormatError
from logitlake_shared.store import ObjectStore

__all__ = [
    "FOOTER_PREFIX",
    "Shard",
    "check_committed",
    "check_format_version",
    "committed_bytes",
    "footer_of",
    "missing_error",
    "read_error",
    "write_shard",
]

FOOTER_PREFIX = "logitlake."
_ZSTD_LEVEL = 3
# Bytes hashed at a time.
_CHUNK_BYTES = 2**20
# Response tokens of a row group: one or two megabytes, read in some ten milliseconds. A larger group shares its
# dictionary of token ids among more tokens, a smaller one is read faster for one sample.
_GROUP_TOKENS = 32_768
_GROUP_IMAGE_BYTES = 4 * 2**20
# A group of very short answers still ends somewhere.
_GROUP_ROWS = 4096
# Room for a dictionary of every id of a vocabulary of 256k; beyond its limit Parquet falls back to plain values.
_DICTIONARY_BYTES = 2**20
_TOKEN_LISTS: dict[ShardKind, tuple[str, ...]] = {
    "samples": ("response_ids",),
    "pairs": ("chosen_ids", "rejected_ids"),
    "images": (),
}


def write_shard(
    table: pa.Table,
    kind: ShardKind,
    *,
    cache: str,
    unit: str,
    spec_fingerprint: str,
    exact: bool = False,
    stored_error: StoredError | None = None,
) -> bytes:
    """The Parquet bytes of `table` with the footer of a shard. `exact` says that its logprobs are not on the grid."""
    columns = [column for column in COLUMNS[kind] if not column.nullable or _has_a_value(table.column(column.name))]
    table = table.select([column.name for column in columns])
    footer = {
        "format_version": str(FORMAT_VERSION),
        "kind": kind,
        "cache": cache,
        "unit": unit,
        "spec_fingerprint": spec_fingerprint,
    }
    if stored_error is not None:
        footer["stored_error"] = stored_error.model_dump_json()
    encodings = {_path(column): _encoding(column, exact) for column in columns}
    sink = pa.BufferOutputStream()
    writer = pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=[path for path, encoding in encodings.items() if encoding == "dictionary"],
        column_encoding={path: "BYTE_STREAM_SPLIT" for path, encoding in encodings.items() if encoding == "split"},
        dictionary_pagesize_limit=_DICTIONARY_BYTES,
        write_page_checksum=True,
        write_page_index=True,
        # Parquet's own types say all that Arrow's schema would say again in every footer.
        store_schema=False,
    )
    with writer:
        start = 0
        for rows in _group_rows(table, kind):
            writer.write_table(table.slice(start, rows), row_group_size=rows)
            start += rows
        writer.add_key_value_metadata({f"{FOOTER_PREFIX}{key}": value for key, value in footer.items()})
    return bytes(sink.getvalue())


class Shard:
    """An open shard: its footer, and its rows as they are asked for. Close it.

    `source` is what `pyarrow.parquet` opens; `where` names the shard in errors. Raises `LakeCorruptError`,
    `LakeFormatError`.
    """

    def __init__(self, source: pa.NativeFile | BinaryIO | pa.BufferReader, where: str) -> None:
        self._where = where
        try:
            # Joining neighbouring columns into one request pays where a request is slow, not on a local disk.
            remote = not isinstance(source, pa.OSFile)
            self._file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=remote)
        except (pa.ArrowException, OSError) as error:
            raise read_error(self._where, error) from error
        metadata = self._file.metadata
        self.footer = _footer(metadata)
        """the keys of `write_shard`, without their prefix"""
        self.num_rows: int = metadata.num_rows
        self.group_rows: tuple[int, ...] = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        """rows of each row group"""
        check_format_version(self.footer.get("format_version", "none"), where)
        self._schema = _declared_schema(self.footer.get("kind", "none"), where)
        self._stored = frozenset(self._file.schema_arrow.names)

    def read(self, columns: Sequence[str] | None = None, group: int | None = None) -> pa.Table:
        """All rows, or those of one row group, on the calling thread. Raises `LakeCorruptError`, `LakeFormatError`.

        The table has the declared columns, or those of `columns` in that order; a nullable one that the file does not
        hold is nulls.
        """
        names = self._schema.names if columns is None else list(columns)
        stored = [name for name in names if name in self._stored]
        try:
            if group is None:
                table = self._file.read(columns=stored, use_threads=False)
            else:
                table = self._file.read_row_group(group, columns=stored, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise read_error(self._where, error) from error
        return table if table.schema.names == names else self._completed(table, names)

    def _completed(self, table: pa.Table, names: Sequence[str]) -> pa.Table:
        fields = [self._schema.field(name) for name in names]
        missing = [field.name for field in fields if field.name not in self._stored and not field.nullable]
        if missing:
            raise LakeFormatError(f"{self._where}: columns {', '.join(missing)} are missing; run `logitlake verify`")
        arrays = [
            table.column(field.name) if field.name in self._stored else pa.nulls(table.num_rows, field.type)
            for field in fields
        ]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def index(self) -> pa.Table:
        """What a shard of samples or pairs holds, one row a row of it, from a read of its smallest columns.

        Columns: `id`, `task`, `source`, `split` (strings), `num_tokens` (int32, response tokens; chosen and rejected
        together for a pair), `group` (int32, the row group), `row` (int32, the place in the shard).
        """
        if self.footer["kind"] == "pairs":
            table = self.read(["pair_id", "task", "source", "split", "chosen_ids", "rejected_ids"])
            num_tokens = _lengths(table, "chosen_ids") + _lengths(table, "rejected_ids")
        else:
            table = self.read(["sample_id", "task", "source", "split", "response_lengths"])
            num_tokens = _sums(table, "response_lengths")
        return pa.table(
            {
                "id": table.column(0),
                **{name: table.column(name) for name in ("task", "source", "split")},
                "num_tokens": num_tokens.astype(np.int32),
                "group": np.repeat(np.arange(len(self.group_rows), dtype=np.int32), self.group_rows),
                "row": np.arange(table.num_rows, dtype=np.int32),
            }
        )

    def close(self) -> None:
        """Closes the source."""
        self._file.close(force=True)


def footer_of(data: bytes) -> bytes:
    """The end of a Parquet file: its metadata, four bytes that say how long they are, and `PAR1`."""
    return data[-int.from_bytes(data[-8:-4], "little") - 8 :]


def check_committed(source: BinaryIO, entry: ShardEntry, where: str, *, whole: bool) -> None:
    """Compares a shard, or its footer alone, with what its commit record says. Raises `LakeCorruptError`, `OSError`."""
    length = source.seek(0, os.SEEK_END)
    what, expected = ("", entry.sha256) if whole else ("a footer of ", entry.footer_sha256)
    digest = hashlib.sha256()
    source.seek(0 if whole else max(length - entry.footer_bytes, 0))
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
    if length != entry.bytes or digest.hexdigest() != expected:
        raise LakeCorruptError(
            f"{where}: expected {entry.bytes} bytes with {what}sha256 {expected}, got {length} bytes with "
            f"{digest.hexdigest()}; restore the file from a copy, or let `logitlake verify --repair` return its unit "
            "to the plan"
        )
    source.seek(0)


def committed_bytes(store: ObjectStore, entry: ShardEntry) -> bytes:
    """The whole shard. Raises `LakeCorruptError` where it is missing or not what was committed."""
    where = f"{store.uri}/{entry.path}"
    data = store.get(entry.path)
    if data is None:
        raise missing_error(where)
    check_committed(io.BytesIO(data), entry, where, whole=True)
    return data


def missing_error(where: str) -> LakeCorruptError:
    """What it means that a committed shard is not in the store."""
    return LakeCorruptError(
        f"{where}: committed but missing; restore it, or let `logitlake verify --repair` return its unit to the plan"
    )


def read_error(where: str, error: Exception) -> LakeError:
    """What a failed read of `where` means: the system could not read (it has an errno), or the bytes are wrong."""
    if isinstance(error, OSError) and error.errno is not None:
        return LakeError(f"{where}: reading failed: {error}; nothing says that the bytes are wrong: try again")
    return LakeCorruptError(f"{where}: not a readable shard: {error}; run `logitlake verify`")


def check_format_version(version: str, where: str) -> None:
    """Raises `LakeFormatError` naming both versions unless this release reads `version`."""
    if version != str(FORMAT_VERSION):
        raise LakeFormatError(
            f"{where}: format version {version}, this release reads {FORMAT_VERSION}; install the release of logitlake "
            "that wrote it, or a later one"
        )


def _footer(metadata: Any) -> dict[str, str]:
    pairs = {key.decode(): value.decode() for key, value in (metadata.metadata or {}).items()}
    return {key.removeprefix(FOOTER_PREFIX): value for key, value in pairs.items() if key.startswith(FOOTER_PREFIX)}


def _declared_schema(kind: str, where: str) -> pa.Schema:
    columns = {name: columns for name, columns in COLUMNS.items() if name == kind}
    if not columns:
        raise LakeFormatError(
            f"{where}: a shard of {kind}, expected one of {', '.join(COLUMNS)}; run `logitlake verify`"
        )
    return arrow_schema(columns.popitem()[1])


def _has_a_value(column: pa.ChunkedArray) -> bool:
    return bool(column.null_count < len(column))


def _path(column: Column) -> str:
    """The column's leaf as Parquet names it."""
    return f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name


def _encoding(column: Column, exact: bool) -> str:
    # Off the grid there are as many values as entries, and nothing for a dictionary to hold.
    return "split" if exact and column.name == "topk_logprobs" else column.encoding


def _group_rows(table: pa.Table, kind: ShardKind) -> list[int]:
    """How many rows each row group takes."""
    stops = np.cumsum(_weights(table, kind))
    budget = _GROUP_IMAGE_BYTES if kind == "images" else _GROUP_TOKENS
    groups: list[int] = []
    start = 0
    while start < len(stops):
        before = int(stops[start - 1]) if start else 0
        stop = int(np.searchsorted(stops, before + budget, side="right"))
        stop = min(max(stop, start + 1), start + _GROUP_ROWS)
        groups.append(stop - start)
        start = stop
    return groups


def _weights(table: pa.Table, kind: ShardKind) -> npt.NDArray[np.int64]:
    if kind == "images":
        return np.asarray(pc.binary_length(table.column("data")).to_numpy(), np.int64)
    return np.asarray(np.sum([_lengths(table, name) for name in _TOKEN_LISTS[kind]], axis=0), np.int64)


def _lengths(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """The length of each row's list."""
    return np.asarray(pc.list_value_length(table.column(name)).to_numpy(), np.int64)


def _sums(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """The sum of each row's list."""
    stops = np.cumsum(_lengths(table, name))
    totals = np.concatenate([[0], np.cumsum(pc.list_flatten(table.column(name)).to_numpy(), dtype=np.int64)])
    return np.diff(totals[stops], prepend=0)
