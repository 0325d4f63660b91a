"""Publishing the catalog: immutable files with rising numbers, the highest of which readers open.

There is no pointer that could be half written or point to the wrong file: a file is created under the next number or
not at all. Of two publishers one creates it; the other finds that nothing is left to do, or starts from the winner's
file. What is published can be lost at any time without harm: it is made again from commit records and shards.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from logitlake_schemas import layout
from logitlake_shared.catalog.index_file import attach, identities, read_every_block, write_index_file
from logitlake_shared.catalog.tables import Pinned, pin
from logitlake_shared.errors import LakeCorruptError, LakeError
from logitlake_shared.lake import Lake
from logitlake_shared.store import ObjectStore

__all__ = [
    "Published",
    "fetch",
    "made_here",
    "newest_number",
    "publish_catalog",
    "read_published",
    "rebuild_catalog",
]

_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Published:
    """A published catalog, every block of it read; or one that was made here."""

    number: int
    """no published one has 0"""
    data: bytes
    """the file"""
    identities: frozenset[tuple[str, int, str, str]]
    """what it was made from: see `Pinned.identity`"""
    shards: list[dict[str, Any]]
    """its rows of `shards`"""


def publish_catalog(lake: Lake) -> int:
    """Publishes the catalog of the newest snapshots and returns its number; the newest one's when nothing came since.

    Starts from the newest file and reads only the shards that it does not know. A file that is damaged or of another
    catalog version counts as none. Raises `LakeError` when no cache has a snapshot, `LakeCorruptError` for a shard
    that is missing or damaged.
    """
    return _publish(lake, rebuild=False)


def rebuild_catalog(lake: Lake) -> int:
    """As `publish_catalog`, from commit records and shards alone: no published file is looked into."""
    return _publish(lake, rebuild=True)


def newest_number(store: ObjectStore) -> int:
    """The number of the newest published catalog; 0 when there is none.

    What a DuckDB that opened one to write left beside it (`.duckdb.wal`) is none.
    """
    names = [name for name in store.names(layout.catalog_prefix()) if name.endswith(".duckdb")]
    return layout.catalog_number(names[-1]) if names else 0


def fetch(store: ObjectStore, number: int, folder: Path) -> Path:
    """Catalog `number` as a file of this machine: where it lies in a local lake, else a copy in `folder`."""
    name = layout.catalog_path(number)
    # DuckDB takes a backslash in a path for a separator; such a file is copied, as a remote one is.
    if store.root is not None and "\\" not in str(store.root):
        return store.root / name
    source = store.open(name)
    if source is None:
        raise LakeError(f"{store.uri}/{name}: gone while it was fetched (collected?); ask again")
    target = folder / "fetched.duckdb"
    with target.open("wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            file.write(chunk)
    source.close()
    return target


def read_published(store: ObjectStore, number: int) -> Published:
    """What catalog `number` holds. Raises `LakeCorruptError` where it is damaged or of another catalog version."""
    with tempfile.TemporaryDirectory(prefix="logitlake-catalog-") as folder:
        return _read(fetch(store, number, Path(folder)), number, f"{store.uri}/{layout.catalog_path(number)}")


def made_here(lake: Lake, caches: Sequence[str] | None = None) -> Published:
    """A catalog of these caches (of all that the lake shows), made from commit records and shards, published nowhere.

    Raises `LakeError` where none has a snapshot, `LakeCorruptError` for a shard that is missing or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="logitlake-catalog-") as folder:
        path = Path(folder) / "new.duckdb"
        write_index_file(path, pin(lake, caches), None)
        return _read(path, 0, str(path))


def _read(path: Path, number: int, where: str) -> Published:
    with duckdb.connect(":memory:") as connection:
        data = path.read_bytes()
        try:
            if not attach(connection, path, "cat"):
                raise LakeCorruptError(
                    f"{where}: no catalog of this release's version; run `logitlake rebuild`, or take that release"
                )
            read_every_block(connection, "cat")
            shards = connection.sql("FROM cat.shards ORDER BY shard").to_arrow_table().to_pylist()
            return Published(number, data, frozenset(identities(connection, "cat")), shards)
        except duckdb.Error as error:
            raise LakeCorruptError(f"{where}: cannot be opened: {error}; run `logitlake rebuild`") from error


def _publish(lake: Lake, *, rebuild: bool) -> int:
    while True:
        newest = newest_number(lake.store)
        pinned = pin(lake)
        with tempfile.TemporaryDirectory(prefix="logitlake-catalog-") as folder:
            base = None if rebuild or not newest else _usable(lake.store, newest, Path(folder))
            if base is not None and _is_current(base, pinned):
                return newest
            path = Path(folder) / "new.duckdb"
            write_index_file(path, pinned, base)
            data = path.read_bytes()
        if lake.store.put_new(layout.catalog_path(newest + 1), data):
            return newest + 1


def _usable(store: ObjectStore, number: int, folder: Path) -> Path | None:
    """The published file if it can be built upon, every block of it."""
    path = fetch(store, number, folder)
    with duckdb.connect(":memory:") as connection:
        try:
            if not attach(connection, path, "old"):
                return None
            read_every_block(connection, "old")
        except duckdb.Error:
            return None
    return path


def _is_current(path: Path, pinned: list[Pinned]) -> bool:
    with duckdb.connect(":memory:") as connection:
        attach(connection, path, "old")
        return identities(connection, "old") == {pin.identity for pin in pinned}
