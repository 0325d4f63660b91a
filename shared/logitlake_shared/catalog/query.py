"""Questions to a lake: DuckDB views over the catalog's tables and over the shards.

Opening attaches the newest published file read-only and checks, by the sha256 of each cache's newest snapshot, what it
speaks for. What came since is added in memory; without any file everything is. Then DuckDB is locked in: no file,
network or extension access, no change of settings, and only questions are answered. (The list of allowed statements
alone would not do: since DuckDB 2 a `WITH … AS (COPY …)` parses as a SELECT. Nor would the lock alone: a view of the
same name could stand before one of ours.)

`logitlake_shared.sql_service` answers questions of people that are not trusted, each in a process of its own. It opens
a catalog of the caches that its caller may see; such a catalog holds nothing of another one, not even unreachably.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self, cast

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from logitlake_schemas import COLUMNS, ShardEntry, ShardKind, layout
from logitlake_shared.catalog.index_file import (
    ID_HASH,
    attach,
    copy_caches,
    create_empty,
    identities,
    quoted,
)
from logitlake_shared.catalog.open_shards import OpenShards, ShardRows, entry_of
from logitlake_shared.catalog.publish import fetch, newest_number
from logitlake_shared.catalog.scan import EntryScan, RowScan, TokenScan
from logitlake_shared.catalog.tables import (
    INDEX_SCHEMA,
    Pinned,
    caches_table,
    errors_table,
    index_batches,
    pin,
    shards_table,
)
from logitlake_shared.errors import LakeCorruptError, LakeError, QueryError
from logitlake_shared.lake import Lake

__all__ = ["Catalog", "Place", "open_catalog"]

_LOCKED = (
    "SET enable_external_access = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET python_enable_replacements = false",
    "SET lock_configuration = true",
)
_ANSWERED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_BATCH_ROWS = 100_000
# How DuckDB's errors about its own file begin.
_DAMAGE = ("IO Error", "FATAL Error")
_INDEXED: tuple[ShardKind, ...] = ("samples", "pairs")
# Numbers of shards that the published file does not know, above any of its own.
_LATE = 1_000_000_000


@dataclass(frozen=True)
class Place:
    """Where a sample or pair lies."""

    cache: str
    entry: ShardEntry
    row_group: int
    row: int
    """in the shard, not in the row group"""


class Catalog:
    """An open catalog of a lake; close it, or use it as a context manager. One thread at a time.

    `caches` names the only ones that there are for this catalog, `snapshots` says where a cache is pinned (else at its
    newest snapshot). `connection`, a fresh one to a database in memory, is used and locked; else one is made.
    `has_disk` is false for a process that can write no file: it cannot fetch the published file from an object store,
    and works without it. `has_index` is false where nobody will ask for `sample_index`, which of some caches is a copy.

    Raises `LakeError` when no cache has a snapshot yet, `LakeCorruptError` when the published file is damaged.
    """

    def __init__(
        self,
        lake: Lake,
        *,
        caches: Sequence[str] | None = None,
        snapshots: Mapping[str, int] | None = None,
        connection: duckdb.DuckDBPyConnection | None = None,
        has_disk: bool = True,
        has_index: bool = True,
    ) -> None:
        self._lake = lake
        self._pinned = {pin.cache.name: pin for pin in pin(lake, caches, snapshots)}
        self._failure: LakeError | None = None
        self._opened = OpenShards()
        self._shards: dict[ShardKind, ShardRows] = {}
        self._connection = duckdb.connect(":memory:") if connection is None else connection
        with ExitStack() as undo:
            undo.callback(self.close)
            known = self._attach_published(partial=caches is not None, has_disk=has_disk, has_index=has_index)
            self._late = [pin for pin in self._pinned.values() if pin.identity not in known]
            try:
                self._create_tables([pin for pin in self._pinned.values() if pin.identity in known])
                self._create_index()
                self._create_rows()
            except duckdb.Error as error:  # every statement is ours, so it is the file
                raise _damaged(error) from error
            for statement in _LOCKED:
                self._connection.execute(statement)
            undo.pop_all()

    @property
    def snapshots(self) -> dict[str, int]:
        """The caches that there are, and the snapshot that each is pinned at."""
        return {name: pin.number for name, pin in self._pinned.items()}

    def query(self, sql: str) -> pa.Table:
        """The answer to one question. Raises `QueryError` with DuckDB's own explanation, `LakeCorruptError`."""
        with self._explained():
            return self._ask(sql).to_arrow_table()

    def query_batches(
        self, sql: str, parameters: Sequence[object] | Mapping[str, object] | None = None, rows: int = _BATCH_ROWS
    ) -> pa.RecordBatchReader:
        """The answer to one question as a stream, for answers larger than memory. Read it before the next question.

        `parameters` stand for `?` or `$name` in it, a batch has at most about `rows` rows. Raises as `query` does,
        while it is read too.
        """
        with self._explained():
            reader = self._ask(sql, parameters).to_arrow_reader(rows)
        return pa.RecordBatchReader.from_batches(reader.schema, self._stream(reader))

    def find(self, sample_id: str, cache: str | None = None) -> list[Place]:
        """Where the sample or pair of this id lies: one place in each cache that has it, by the caches' names.

        A point look-up in the published file. Shards that it does not know are read through once, their ids only.
        """
        question = (
            f'SELECT place.row_group, place."row", shards.* FROM ('
            f'SELECT shard, row_group, "row" FROM cat.sample_index WHERE id_hash = {ID_HASH.format(id="$id")} '
            'AND sample_id = $id UNION ALL SELECT shard, row_group, "row" FROM late_index WHERE sample_id = $id'
            ") place JOIN shards USING (shard) WHERE cache = coalesce($cache, cache) ORDER BY cache"
        )
        with self._explained():
            self._load_shards()
            answer = self._connection.sql(question, params={"id": sample_id, "cache": cache})
            found = answer.to_arrow_table().to_pylist()
        return [Place(row["cache"], entry_of(row), row["row_group"], row["row"]) for row in found]

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attach_published(self, *, partial: bool, has_disk: bool, has_index: bool) -> set[tuple[str, int, str, str]]:
        """Attaches the newest published file as `cat`, or makes an empty one; returns what it was made from."""
        store = self._lake.store
        number = newest_number(store) if has_disk or store.root is not None else 0
        if number:
            # DuckDB keeps the file open; its name is not needed any longer.
            with TemporaryDirectory(prefix="logitlake-catalog-") if has_disk else nullcontext(os.devnull) as folder:
                path = fetch(store, number, Path(folder))
                try:
                    if attach(self._connection, path, "cat"):
                        known = identities(self._connection, "cat")
                        if not partial or {identity[0] for identity in known} <= self._pinned.keys():
                            return known
                        self._connection.execute("DETACH cat")
                        attach(self._connection, path, "published")
                        copy_caches(self._connection, "published", "cat", list(self._pinned), index=has_index)
                        return known
                except duckdb.Error as error:
                    raise LakeCorruptError(
                        f"{store.uri}/{layout.catalog_path(number)}: cannot be opened: {error}; run `logitlake rebuild`"
                    ) from error
        create_empty(self._connection, "cat")
        return set()

    def _create_tables(self, current: Sequence[Pinned]) -> None:
        """The views of the catalog's tables: rows of the published file, and of caches that changed since."""
        names = ", ".join(quoted(pin.cache.name) for pin in current) or "NULL"
        for table, late in (("caches", caches_table(self._late)), ("errors", errors_table(self._late))):
            self._connection.register(f"late_{table}", late)
            self._connection.execute(
                f"CREATE VIEW {table} AS SELECT * FROM cat.{table} WHERE cache IN ({names}) "
                f"UNION ALL BY NAME SELECT * FROM late_{table}"
            )
        self._connection.register("late_rows", shards_table(self._late))
        late_shards = self._connection.sql(
            f"SELECT coalesce(known.shard, {_LATE} + row_number() OVER ())::INTEGER "
            "AS shard, late_rows.*, known.first_id, known.last_id "
            "FROM late_rows LEFT JOIN cat.shards known USING (path)"
        )
        # As an Arrow table it is out of reach of statements that write.
        self._connection.register("late_shards", late_shards.to_arrow_table())
        self._connection.execute(
            f"CREATE VIEW shards AS SELECT * FROM cat.shards WHERE cache IN ({names}) "
            "UNION ALL BY NAME SELECT * FROM late_shards"
        )

    def _create_index(self) -> None:
        self._connection.register("late_index_rows", _Lazy(INDEX_SCHEMA, self._late_index))
        self._connection.execute(
            "CREATE VIEW late_index AS SELECT s.shard, i.* EXCLUDE (path) "
            "FROM late_index_rows i JOIN late_shards s USING (path)"
        )
        columns = 'sample_id, path, row_group, "row", task, source, split, num_tokens'
        self._connection.execute(
            f"CREATE VIEW sample_index AS SELECT cache, {columns} FROM ("
            "SELECT * EXCLUDE (id_hash) FROM cat.sample_index UNION ALL BY NAME FROM late_index"
            ") JOIN shards USING (shard)"
        )

    def _create_rows(self) -> None:
        scans: tuple[tuple[str, type[RowScan], ShardKind], ...] = (
            ("samples", RowScan, "samples"),
            ("tokens", TokenScan, "samples"),
            ("topk", EntryScan, "samples"),
            ("pairs", RowScan, "pairs"),
            ("images", RowScan, "images"),
        )
        is_local = self._lake.store.root is not None
        for name, scan, kind in scans:
            rows = scan(kind, self._shards_of(kind), self._opened, self._note, is_local=is_local)
            self._connection.register(name, rows)

    def _shards_of(self, kind: ShardKind) -> Callable[[], ShardRows]:
        return lambda: self._shards[kind]

    def _load_shards(self) -> None:
        """Fetches what the scans need to know; before the first question, for within one the connection is taken."""
        if not self._shards:
            rows = self._connection.sql("FROM shards ORDER BY cache, first_id, path").to_arrow_table()
            caches = {name: pin.cache for name, pin in self._pinned.items()}
            for kind in COLUMNS:
                self._shards[kind] = ShardRows(rows.filter(pc.field("kind") == kind), caches)

    def _late_index(self) -> pa.Table:
        """The index rows of the shards that the published file does not know."""
        late = [
            (shard.cache, shard.entry)
            for kind in _INDEXED
            for shard in self._shards[kind].select(pc.field("shard") > _LATE)
        ]
        return pa.Table.from_batches(index_batches(late, self._note), INDEX_SCHEMA)

    def _ask(self, sql: str, parameters: Sequence[object] | Mapping[str, object] | None = None) -> Any:
        statements = self._connection.extract_statements(sql)
        if len(statements) != 1:
            raise QueryError(f"expected one SQL statement, got {len(statements)}; ask one question at a time")
        if statements[0].type not in _ANSWERED:
            raise QueryError(
                f"a {statements[0].type.name} statement is not answered: the catalog answers SELECT (also WITH, FROM, "
                "DESCRIBE, SUMMARIZE, SHOW TABLES) and EXPLAIN, and changes nothing. Write PIVOT with IN (…)"
            )
        self._load_shards()
        answer = self._connection.sql(sql, params=parameters or None)
        for name, kind in zip(answer.columns, answer.types, strict=True):
            if "UHUGEINT" in str(kind):  # handed on as a signed number, so half of its values would be wrong
                raise QueryError(f"column {name!r} is a {kind}, for which Arrow has no type; cast it to VARCHAR")
        return answer

    def _stream(self, reader: Any) -> Iterator[pa.RecordBatch]:
        with self._explained():
            yield from reader

    def _note(self, failure: LakeError) -> None:
        self._failure = failure

    def _explained(self) -> "_Explained":
        self._failure = None
        return _Explained(self)


class _Explained:
    """Turns DuckDB's errors into ours; an error of the lake that passed through DuckDB comes out as it was."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = self._catalog._failure
        if failure is not None and error is not None:
            raise failure from error
        # Shards are read by us: the one file that DuckDB reads is the published catalog. A block whose checksum is
        # wrong is a bare `duckdb.Error`.
        if isinstance(error, duckdb.IOException | duckdb.FatalException) or type(error) is duckdb.Error:
            raise _damaged(error) from error
        # While a stream is read, Arrow makes an OSError of whatever DuckDB says.
        if isinstance(error, OSError) and str(error).startswith(_DAMAGE):
            raise _damaged(error) from error
        if isinstance(error, duckdb.Error | pa.ArrowException | OSError):
            raise QueryError(f"{error}") from error


def _damaged(error: Exception) -> LakeCorruptError:
    return LakeCorruptError(f"the published catalog cannot be read: {error}; run `logitlake rebuild`")


class _Lazy(ds.InMemoryDataset):  # type: ignore[misc]
    """A table that is made when it is first asked for."""

    def __init__(self, schema: pa.Schema, make: Callable[[], pa.Table]) -> None:
        super().__init__(schema.empty_table())
        self._make = make

    @cached_property
    def _table(self) -> Any:
        return ds.dataset(self._make())

    def scanner(self, *arguments: Any, **options: Any) -> Any:
        """What DuckDB calls."""
        return cast(Any, self._table).scanner(*arguments, **options)


def open_catalog(lake: str | Path) -> Catalog:
    """The catalog of the lake at `lake`."""
    return Catalog(Lake.open(lake))
