"""SQL over a lake: DuckDB views on the newest snapshot of every cache. The only file that imports duckdb.

    samples  one row a captured sample            tokens  one row a response token, its text-free scalars as columns
    topk     one row a cached entry of a token    pairs   one row a preference pair
    images   one row an encoded image             shards  one row a committed file
    errors   one row a sample that failed         caches  one row a cache: teacher, fingerprint, counts, stored error

The usual questions need `samples` and `tokens` and never unpack a top-k. Shards are registered as Arrow datasets, so
that a local folder and an object store are the same code, and DuckDB itself is locked in: no file, network or
extension access, no change of settings, a fresh connection for each catalog. (A statement allow-list would not do:
since DuckDB 2 a `WITH … AS (COPY …)` parses as a SELECT.)
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from logitlake_schemas import IMAGE_COLUMNS, PAIR_COLUMNS, SAMPLE_COLUMNS, Column, CommitRecord, ShardKind, arrow_schema
from logitlake_shared.cache_figures import cache_figures
from logitlake_shared.errors import LakeError, QueryError
from logitlake_shared.lake import Cache, Lake

__all__ = ["Catalog"]

_COLUMNS: dict[ShardKind, Sequence[Column]] = {
    "samples": SAMPLE_COLUMNS,
    "pairs": PAIR_COLUMNS,
    "images": IMAGE_COLUMNS,
}
# The columns that say which sample a token belongs to.
_TOKEN_OWNER = ("cache", "sample_id", "task", "source", "split")
_LOCKED = (
    "SET enable_external_access = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET python_enable_replacements = false",
    "SET lock_configuration = true",
)
_SHARDS_SCHEMA = pa.schema(
    [
        ("cache", pa.string()),
        ("unit", pa.string()),
        ("kind", pa.string()),
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
    ]
)
_ERRORS_SCHEMA = pa.schema([(name, pa.string()) for name in ("cache", "unit", "sample_id", "code", "message")])
_CACHES_SCHEMA = pa.schema(
    [
        ("cache", pa.string()),
        ("kind", pa.string()),
        ("snapshot", pa.int64()),
        ("fingerprint", pa.string()),
        ("teacher", pa.string()),
        ("engine", pa.string()),
        ("units", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("bytes", pa.int64()),
        ("bytes_per_token", pa.float64()),
        ("errors", pa.int64()),
        ("stored_kl_mean", pa.float64()),
        ("stored_kl_max", pa.float64()),
        ("mean_k", pa.float64()),
    ]
)


class Catalog:
    """An open catalog of a lake; close it, or use it as a context manager.

    Raises `LakeError` when no cache has a snapshot yet.
    """

    def __init__(self, lake: Lake) -> None:
        self._connection = duckdb.connect(":memory:")
        pinned = [(cache, cache.open_snapshot()) for cache in _caches_with_snapshot(lake)]
        if not pinned:
            raise LakeError(f"{lake.store.uri}: no cache has a snapshot yet; let a capture finish first")
        commits = [(cache, commit) for cache, snapshot in pinned for commit in snapshot.commits]
        self._register("shards", _shards(commits))
        self._register("errors", _errors(commits))
        figures = [asdict(cache_figures(cache, snapshot)) for cache, snapshot in pinned]
        self._register("caches", pa.Table.from_pylist(figures, _CACHES_SCHEMA))
        for kind in _COLUMNS:
            self._create_rows_view(lake, kind, commits)
        self._connection.execute(_tokens_view())
        self._connection.execute(_topk_view())
        for statement in _LOCKED:
            self._connection.execute(statement)

    def query(self, sql: str) -> pa.Table:
        """The answer to one SQL statement. Raises `QueryError` with DuckDB's own explanation."""
        try:
            statements = self._connection.extract_statements(sql)
            if len(statements) != 1:
                raise QueryError(f"expected one SQL statement, got {len(statements)}; ask one question at a time")
            relation = self._connection.sql(sql)
            if relation is None:
                raise QueryError("the statement returns no rows; the catalog answers questions and changes nothing")
            return relation.to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(f"{error}") from error

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _register(self, name: str, rows: Any) -> None:
        self._connection.register(name, rows)

    def _create_rows_view(self, lake: Lake, kind: ShardKind, commits: Sequence[tuple[Cache, CommitRecord]]) -> None:
        """One registered dataset for each cache, joined under the view `kind` with the cache's name as a column."""
        schema = arrow_schema(_COLUMNS[kind])
        filesystem, root = lake.store.arrow_filesystem()
        selects = []
        for number, cache in enumerate(dict.fromkeys(cache.name for cache, _ in commits)):
            paths = [
                f"{root}{entry.path}"
                for owner, commit in commits
                for entry in commit.shards
                if owner.name == cache and entry.kind == kind
            ]
            if paths:
                dataset = ds.dataset(paths, schema=schema, format="parquet", filesystem=filesystem)
                self._register(f"{kind}_{number}", dataset)
                selects.append(f"SELECT {_quoted(cache)} AS cache, * FROM {kind}_{number}")
        if not selects:
            self._register(f"{kind}_none", schema.empty_table())
            selects.append(f"SELECT '' AS cache, * FROM {kind}_none")
        self._connection.execute(f"CREATE VIEW {kind} AS {' UNION ALL '.join(selects)}")


def _tokens_view() -> str:
    """Unnests every column of grain `token`; several unnests of one SELECT run side by side."""
    token_columns = [column.name for column in SAMPLE_COLUMNS if column.grain == "token"]
    names = {"response_ids": "token_id"}
    unnested = ", ".join(f"unnest({name}) AS {names.get(name, name)}" for name in token_columns)
    return (
        f"CREATE VIEW tokens AS SELECT {', '.join(_TOKEN_OWNER)}, "
        f"unnest(range(len(response_ids))) AS position, {unnested} FROM samples"
    )


def _topk_view() -> str:
    places = (
        "flatten(list_transform(range(len(k)), lambda t: "
        "list_transform(range(k[t + 1]), lambda r: {'position': t, 'rank': r + 1})))"
    )
    return (
        f"CREATE VIEW topk AS SELECT {', '.join(_TOKEN_OWNER)}, place.position AS position, place.rank AS rank, "
        "token_id, logprob FROM (SELECT "
        f"{', '.join(_TOKEN_OWNER)}, unnest({places}) AS place, unnest(topk_ids) AS token_id, "
        "unnest(topk_logprobs) AS logprob FROM samples)"
    )


def _caches_with_snapshot(lake: Lake) -> list[Cache]:
    return [cache for name in lake.cache_names() if (cache := lake.cache(name)).has_snapshot()]


def _shards(commits: Sequence[tuple[Cache, CommitRecord]]) -> pa.Table:
    rows = [
        {"cache": cache.name, "unit": commit.unit, **entry.model_dump()}
        for cache, commit in commits
        for entry in commit.shards
    ]
    return pa.Table.from_pylist(rows, _SHARDS_SCHEMA)


def _errors(commits: Sequence[tuple[Cache, CommitRecord]]) -> pa.Table:
    rows = [
        {"cache": cache.name, "unit": commit.unit, **error.model_dump()}
        for cache, commit in commits
        for error in commit.errors
    ]
    return pa.Table.from_pylist(rows, _ERRORS_SCHEMA)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def open_catalog(lake: str | Path) -> Catalog:
    """The catalog of the lake at `lake`."""
    return Catalog(Lake.open(lake))
