"""Shards as tables that DuckDB scans: rows as they are stored, one row a token, or one row a cached entry.

DuckDB sees a `pyarrow` dataset and asks it for some columns under some filter. It is answered from the lake's own
`Shard`: any store, every page's checksum verified, no file access from SQL. Flattening a list column in Arrow costs
next to nothing, while DuckDB's `unnest` costs more than reading it; so `tokens` and `topk` are flattened here.

No shard is opened before a question needs it. A filter on the ids opens only the shards whose first and last id allow
it. Open shards are kept for the next question, small ones are handed on together: DuckDB likes large batches.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from logitlake_schemas import COLUMNS, SAMPLE_COLUMNS, ShardKind, arrow_schema
from logitlake_shared.catalog.open_shards import OpenShards, ScannedShard, ShardRows
from logitlake_shared.catalog.pruning import Bounds
from logitlake_shared.errors import LakeError

__all__ = ["EntryScan", "RowScan", "TokenScan", "flatten_lists"]

# Batches are made ahead of what DuckDB asks for, so that decoding and questioning overlap. A remote store answers each
# request slowly, but many at once.
_THREADS_LOCAL, _THREADS_REMOTE = 2, 16
# What small shards are joined to: fewer and larger batches are cheaper, up to about here.
_BATCH_TOKENS = 131_072

# Names repeat for thousands of rows; DuckDB computes on each distinct value once.
_NAME = pa.dictionary(pa.int32(), pa.string())
_CACHE = pa.field("cache", _NAME, nullable=False)
_OWNER = ("sample_id", "task", "source", "split")
_DECLARED = {column.name: column for column in SAMPLE_COLUMNS}
_ADVANTAGE = ("label_logprob", "label_logprob_no_image")
# What the unnested columns are called.
_SINGULAR = {"response_ids": "token_id", "topk_ids": "token_id", "topk_logprobs": "logprob"}


class RowScan(ds.InMemoryDataset):  # type: ignore[misc]
    """The rows of all shards of one kind, with the cache's name as the first column.

    `shards` is called at the first question and gives the shards of this kind. `failed` is told of a `LakeError`
    before it goes through DuckDB, which makes a text of it.
    """

    def __init__(
        self,
        kind: ShardKind,
        shards: Callable[[], ShardRows],
        opened: OpenShards,
        failed: Callable[[LakeError], None],
        *,
        is_local: bool,
    ) -> None:
        super().__init__(_CACHE_ONLY.empty_table())
        self._kind, self._shards, self._opened, self._failed = kind, shards, opened, failed
        self._is_local = is_local
        self._bounds: Bounds | None = None
        self._schema = self._make_schema()

    @property
    def schema(self) -> pa.Schema:
        """The columns as DuckDB sees them."""
        return self._schema

    def scanner(
        self,
        columns: Sequence[str] | None = None,
        filter: Any = None,  # noqa: A002 (the name that pyarrow gave it)
        **_: Any,
    ) -> "_Answer":
        """What DuckDB calls: the rows that `filter` (a `pyarrow` expression) selects, with these columns."""
        wanted = self._schema.names if columns is None else list(columns)
        return _Answer(pa.schema([self._schema.field(name) for name in wanted]), lambda: self._answer(wanted, filter))

    def _make_schema(self) -> pa.Schema:
        return pa.schema([_CACHE, *arrow_schema(COLUMNS[self._kind])])

    def _stored_columns(self, columns: Sequence[str]) -> list[str]:
        """The columns of the shard that these columns of the view are made from; at least one."""
        return [name for name in columns if name != "cache"] or [self._schema.names[1]]

    def _rows(self, cache: str, stored: pa.Table, columns: Sequence[str]) -> pa.Table:
        """Rows of the view from rows of a shard, `columns` of them."""
        return _select(
            {name: _repeated(cache, stored.num_rows) if name == "cache" else _column(stored, name) for name in columns},
            columns,
            self._schema,
        )

    def _answer(self, columns: list[str], predicate: Any) -> Iterator[pa.RecordBatch]:
        """The batches, some of them made ahead of the consumer."""
        needed = columns if predicate is None else [*dict.fromkeys([*columns, *_fields(predicate, self._schema)])]

        def read(run: Sequence[ScannedShard]) -> list[pa.RecordBatch]:
            rows = self._rows(run[0].cache.name, self._stored(run, self._stored_columns(needed)), needed)
            selected = rows if predicate is None else rows.filter(predicate).select(columns)
            batches: list[pa.RecordBatch] = selected.combine_chunks().to_batches()
            return batches

        threads = _THREADS_LOCAL if self._is_local else _THREADS_REMOTE
        pool = ThreadPoolExecutor(threads, "catalog-scan")
        try:
            runs = _runs(self._surviving(predicate))
            pending = [pool.submit(read, run) for run in islice(runs, 2 * threads)]
            while pending:
                batches = pending.pop(0).result()
                pending += [pool.submit(read, run) for run in islice(runs, 1)]
                yield from batches
        except LakeError as error:
            self._failed(error)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _surviving(self, predicate: Any) -> ShardRows:
        shards = self._shards()
        if predicate is None:
            return shards
        if self._bounds is None:
            id_column = {"samples": "sample_id", "pairs": "pair_id", "images": None}[self._kind]
            self._bounds = shards.bounds(id_column, self._schema)
        return shards.take(self._bounds.places(predicate))

    def _stored(self, run: Sequence[ScannedShard], columns: list[str]) -> pa.Table:
        """The rows of some shards, one after the other."""
        tables = []
        for shard in run:
            opened = self._opened.take(shard)
            try:
                tables.append(opened.read(columns))
            except BaseException:
                opened.close()
                raise
            self._opened.give(shard, opened)
        return pa.concat_tables(tables).combine_chunks()


class TokenScan(RowScan):
    """One row a response token of every sample: the columns of grain `token`, and whose token it is.

    `visual_advantage` is computed: what the label's logprob loses in nats when the images are left out.
    """

    def _make_schema(self) -> pa.Schema:
        schema = _flat_schema("token", [pa.field("position", pa.int32(), nullable=False)])
        return schema.append(pa.field("visual_advantage", pa.float32()))

    def _stored_columns(self, columns: Sequence[str]) -> list[str]:
        wanted = [*columns, *(_ADVANTAGE if "visual_advantage" in columns else ())]
        stored = [name for name in _names("token") if _SINGULAR.get(name, name) in wanted]
        # Some list says how many tokens each sample has; the ranks are the smallest.
        counted = [] if any(not _DECLARED[name].nullable for name in stored) else ["label_rank"]
        return [*(name for name in _OWNER if name in columns), *stored, *counted]

    def _rows(self, cache: str, stored: pa.Table, columns: Sequence[str]) -> pa.Table:
        lists = {name: _column(stored, name) for name in _names("token") if name in stored.schema.names}
        lengths = _lengths(next(values for name, values in lists.items() if not _DECLARED[name].nullable))
        made = {_SINGULAR.get(name, name): flatten_lists(values, lengths) for name, values in lists.items()}
        if "position" in columns:
            made["position"] = _positions(lengths)
        if "visual_advantage" in columns:
            made["visual_advantage"] = pc.subtract(*(made[name] for name in _ADVANTAGE))
        return _select(made | _owners(cache, stored, lengths, columns), columns, self._schema)


class EntryScan(RowScan):
    """One row a cached entry: the columns of grain `topk`, the entry's rank, and whose token it belongs to."""

    def _make_schema(self) -> pa.Schema:
        places = [pa.field(name, pa.int32(), nullable=False) for name in ("position", "rank")]
        return _flat_schema("topk", places)

    def _stored_columns(self, columns: Sequence[str]) -> list[str]:
        stored = [name for name in _names("topk") if _SINGULAR.get(name, name) in columns]
        return [*(name for name in _OWNER if name in columns), "k", *stored]

    def _rows(self, cache: str, stored: pa.Table, columns: Sequence[str]) -> pa.Table:
        k = _column(stored, "k")
        tokens, k_T = _lengths(k), k.flatten().to_numpy().astype(np.int64)
        sample_T = np.repeat(np.arange(len(tokens)), tokens)
        entries = np.bincount(sample_T, weights=k_T, minlength=len(tokens)).astype(np.int64)
        made = {
            _SINGULAR.get(name, name): flatten_lists(_column(stored, name), entries)
            for name in _names("topk")
            if name in stored.schema.names
        }
        if "position" in columns:
            made["position"] = pa.array(np.repeat(_positions(tokens).to_numpy(), k_T))
        if "rank" in columns:
            made["rank"] = pa.array(_positions(k_T).to_numpy() + np.int32(1))
        return _select(made | _owners(cache, stored, entries, columns), columns, self._schema)


@dataclass(frozen=True)
class _Answer:
    """What DuckDB takes for a scanner."""

    projected_schema: pa.Schema
    batches: Callable[[], Iterator[pa.RecordBatch]]

    def to_reader(self) -> pa.RecordBatchReader:
        """The stream of the answer."""
        return pa.RecordBatchReader.from_batches(self.projected_schema, self.batches())


_CACHE_ONLY = pa.schema([_CACHE])


def _names(grain: str) -> list[str]:
    return [column.name for column in SAMPLE_COLUMNS if column.grain == grain]


def _flat_schema(grain: str, places: Sequence[pa.Field]) -> pa.Schema:
    owners = [pa.field(name, _NAME, nullable=False) for name in _OWNER]
    columns = [column for column in SAMPLE_COLUMNS if column.grain == grain]
    values = [
        pa.field(_SINGULAR.get(column.name, column.name), column.type.value_type, column.nullable) for column in columns
    ]
    return pa.schema([_CACHE, *owners, *places, *values])


def _fields(predicate: Any, schema: pa.Schema) -> list[str]:
    """The columns that an expression speaks of: those without which it cannot be bound."""
    fields = []
    for name in schema.names:
        others = pa.schema([field for field in schema if field.name != name])
        try:
            ds.dataset(others.empty_table()).scanner(filter=predicate)
        except pa.ArrowInvalid:
            fields.append(name)
    return fields


def _runs(shards: ShardRows) -> Iterator[list[ScannedShard]]:
    """Neighbours of one cache, together at most a batch, or one shard alone."""
    run: list[ScannedShard] = []
    size = 0
    for shard in shards:
        weight = max(shard.entry.tokens, shard.entry.rows)
        if run and (shard.cache.name != run[0].cache.name or size + weight > _BATCH_TOKENS):
            yield run
            run, size = [], 0
        run.append(shard)
        size += weight
    if run:
        yield run


def _column(stored: pa.Table, name: str) -> pa.Array:
    """One array."""
    chunks = stored.column(name).chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def _lengths(lists: pa.Array) -> npt.NDArray[np.int64]:
    return np.diff(lists.offsets.to_numpy()).astype(np.int64)


def _positions(lengths: npt.NDArray[np.int64]) -> pa.Array:
    """0, 1, … within each list."""
    starts = np.cumsum(lengths) - lengths
    return pa.array((np.arange(int(lengths.sum())) - np.repeat(starts, lengths)).astype(np.int32))


def flatten_lists(lists: pa.Array, lengths: npt.NDArray[np.int64]) -> pa.Array:
    """The elements of all lists; a null list gives as many nulls as its row has elements elsewhere."""
    values = lists.flatten()
    if not lists.null_count:
        return values
    if lists.null_count == len(lists):
        return pa.nulls(int(lengths.sum()), values.type)
    present = np.repeat(lists.is_valid().to_numpy(zero_copy_only=False), lengths)
    return values.take(pa.array(np.cumsum(present) - 1, pa.int64(), mask=~present))


def _repeated(value: str, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([value]), safe=False)


def _owners(
    cache: str, stored: pa.Table, lengths: npt.NDArray[np.int64], columns: Sequence[str]
) -> dict[str, pa.Array]:
    """The columns that say whose row it is, each sample's value as often as `lengths` says."""
    owners = {"cache": _repeated(cache, int(lengths.sum()))} if "cache" in columns else {}
    for name in _OWNER:
        if name in columns:
            encoded = _column(stored, name).dictionary_encode()
            indices = pa.array(np.repeat(encoded.indices.to_numpy(), lengths))
            owners[name] = pa.DictionaryArray.from_arrays(indices, encoded.dictionary, safe=False)
    return owners


def _select(made: dict[str, pa.Array], columns: Sequence[str], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_arrays(
        [made[name] for name in columns], schema=pa.schema([schema.field(name) for name in columns])
    )
