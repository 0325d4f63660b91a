"""The catalog as a DuckDB file: how one is made, and how a reader attaches it.

A file is written whole and never changed. `STORAGE_VERSION 'v1.0.0'` is the oldest that DuckDB offers, so that DuckDB
1.4 and 2 both attach it. `sample_index` is sorted by a hash of the id: DuckDB keeps the smallest and largest value of
each stretch of a column, so a point look-up by `id_hash` reads one stretch of it, whatever the ids look like. (Sorted
by the ids themselves it would not: of a string only the first eight bytes are kept, and ids share their beginnings. An
ART index would be as large as the table.)
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from logitlake_schemas import FORMAT_VERSION, ShardEntry
from logitlake_shared.catalog.tables import (
    CATALOG_VERSION,
    INDEX_SCHEMA,
    SHARDS_SCHEMA,
    Pinned,
    about_table,
    caches_table,
    errors_table,
    index_batches,
    shards_table,
)
from logitlake_shared.errors import LakeError
from logitlake_shared.lake import Cache

__all__ = [
    "ID_HASH",
    "attach",
    "copy_caches",
    "create_empty",
    "identities",
    "quoted",
    "read_every_block",
    "write_index_file",
]

STORAGE_VERSION = "v1.0.0"
ID_HASH = "(md5_number_lower({id}) >> 32)::UINTEGER"
"""The key of `sample_index`; md5 because it is the same in every version of DuckDB, which its own `hash` is not."""

_SHARD_COLUMNS = ", ".join(SHARDS_SCHEMA.names)
_INDEX_COLUMNS = 'sample_id, row_group, "row", task, source, split, num_tokens'


IndexReader = Callable[[Sequence[tuple[Cache, ShardEntry]], Callable[[LakeError], None]], Iterator[pa.RecordBatch]]


def write_index_file(
    path: Path, pinned: Sequence[Pinned], base: Path | None, read: IndexReader = index_batches
) -> None:
    """Writes the catalog of these snapshots to `path`, which must not exist.

    `base`, an older file of the same version, spares the reading of the shards that it knows. Shards are immutable and
    named by their content, so that a row of it is as good as one read now. `read` reads the other shards. Raises
    `LakeCorruptError`.
    """
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"SET temp_directory = {quoted(str(path.parent))}")
        connection.execute(f"ATTACH {quoted(str(path))} AS new (STORAGE_VERSION '{STORAGE_VERSION}')")
        if base is None:
            create_empty(connection, "old")
        else:
            attach(connection, base, "old")
        # DuckDB makes a text of an error that passes through it.
        failures: list[LakeError] = []
        try:
            _fill(connection, pinned, lambda unknown: read(unknown, failures.append))
        except duckdb.Error as error:
            raise failures[0] if failures else error from error
        connection.execute("DETACH new")


def create_empty(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Makes a catalog without rows, of views that nothing can be inserted into, as the schema `name`."""
    connection.execute(f"CREATE SCHEMA {name}")
    empty = {"about": about_table(), "caches": caches_table([]), "errors": errors_table([])}
    for table, rows in (empty | {"shards": shards_table([]), "sample_index": INDEX_SCHEMA.empty_table()}).items():
        connection.register(f"empty_{table}", rows)
    for table in empty:
        connection.execute(f"CREATE VIEW {name}.{table} AS FROM empty_{table}")
    connection.execute(
        f"CREATE VIEW {name}.shards AS "
        f"SELECT 0::INTEGER AS shard, {_SHARD_COLUMNS}, '' AS first_id, '' AS last_id FROM empty_shards"
    )
    connection.execute(
        f"CREATE VIEW {name}.sample_index AS "
        f"SELECT 0::UINTEGER AS id_hash, 0::INTEGER AS shard, {_INDEX_COLUMNS} FROM empty_sample_index"
    )


def attach(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> bool:
    """Attaches the file read-only as `name` and returns True; returns False for a file of another version.

    A catalog comes from wherever the lake does. A view in it would be somebody's question that we ask, with the files
    of this machine at hand, so a file with views is none of ours. Raises `duckdb.Error` for what is not a DuckDB file,
    and for one that is damaged where it was looked into.
    """
    connection.execute(f"ATTACH {quoted(str(path))} AS {name} (READ_ONLY)")
    views = f"SELECT count(*) FROM duckdb_views() WHERE database_name = {quoted(name)} AND NOT internal"
    if connection.execute(views).fetchall() == [(0,)]:
        versions = connection.execute(f"SELECT catalog_version, format_version FROM {name}.about").fetchall()
        if versions == [(CATALOG_VERSION, FORMAT_VERSION)]:
            return True
    connection.execute(f"DETACH {name}")
    return False


def copy_caches(
    connection: duckdb.DuckDBPyConnection, source: str, name: str, caches: Sequence[str], *, index: bool
) -> None:
    """Copies what the attached catalog `source` says of these caches into the schema `name`, and detaches it.

    So no question can reach what it says of the others, whatever way it finds. Without `index`, the one large table,
    `sample_index` stays empty.
    """
    chosen = ", ".join(quoted(cache) for cache in caches) or "NULL"
    connection.execute(f"CREATE SCHEMA {name}")
    for table in ("caches", "shards", "errors"):
        connection.execute(f"CREATE TABLE {name}.{table} AS FROM {source}.{table} WHERE cache IN ({chosen})")
    connection.execute(
        f"CREATE TABLE {name}.sample_index AS "
        f"FROM {source}.sample_index WHERE {index} AND shard IN (SELECT shard FROM {name}.shards)"
    )
    connection.execute(f"DETACH {source}")


def identities(connection: duckdb.DuckDBPyConnection, name: str) -> set[tuple[str, int, str, str]]:
    """What the attached catalog was made from: see `Pinned.identity`."""
    rows = connection.execute(f"SELECT cache, snapshot, fingerprint, snapshot_sha256 FROM {name}.caches").fetchall()
    return set(rows)


def read_every_block(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Reads all of the attached catalog. Raises `duckdb.Error` where a block is not what its checksum says."""
    for table in ("about", "caches", "shards", "errors", "sample_index"):
        connection.execute(f"SELECT bit_xor(hash(t)) FROM {name}.{table} t").fetchall()


def quoted(text: str) -> str:
    """`text` as a SQL string."""
    return "'" + text.replace("'", "''") + "'"


def _fill(
    connection: duckdb.DuckDBPyConnection,
    pinned: Sequence[Pinned],
    read: Callable[[Sequence[tuple[Cache, ShardEntry]]], Iterator[pa.RecordBatch]],
) -> None:
    """Makes the tables of `new` from the snapshots, from `old`, and from the shards that `old` does not know."""
    connection.register("new_shards", shards_table(pinned))
    connection.execute(
        f"CREATE TEMP TABLE numbered AS SELECT row_number() OVER ()::INTEGER AS shard, {_SHARD_COLUMNS} FROM new_shards"
    )
    rows = read(_unknown(connection, pinned))
    connection.register("new_index", pa.RecordBatchReader.from_batches(INDEX_SCHEMA, rows))
    connection.execute(
        "CREATE TABLE new.sample_index AS "
        f"SELECT {ID_HASH.format(id='sample_id')} AS id_hash, shard, {_INDEX_COLUMNS} "
        "FROM new_index JOIN numbered USING (path) "
        f"UNION ALL SELECT id_hash, n.shard, {_INDEX_COLUMNS} "
        "FROM old.sample_index JOIN old.shards o USING (shard) JOIN numbered n USING (path) "
        'ORDER BY id_hash, shard, "row"'
    )
    connection.execute(
        f"CREATE TABLE new.shards AS SELECT shard, {_SHARD_COLUMNS}, first_id, last_id FROM numbered LEFT JOIN "
        "(SELECT shard, min(sample_id) AS first_id, max(sample_id) AS last_id FROM new.sample_index GROUP BY shard) "
        "USING (shard) ORDER BY shard"
    )
    for table, rows in (("about", about_table()), ("caches", caches_table(pinned)), ("errors", errors_table(pinned))):
        connection.register("new_rows", rows)
        connection.execute(f"CREATE TABLE new.{table} AS FROM new_rows")


def _unknown(connection: duckdb.DuckDBPyConnection, pinned: Sequence[Pinned]) -> list[tuple[Cache, ShardEntry]]:
    known = {path for (path,) in connection.execute("SELECT path FROM old.shards").fetchall()}
    return [
        (pin.cache, entry)
        for pin in pinned
        for commit in pin.snapshot.commits
        for entry in commit.shards
        if entry.kind != "images" and entry.path not in known
    ]
