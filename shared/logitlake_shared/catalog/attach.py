"""A lake for a DuckDB of one's own: its files on this machine, and the statements that attach them.

The newest published catalog is attached as `lake`; the shards that it names become the views `samples`, `pairs` and
`images`, with the columns that they have in `logitlake sql`. From a store elsewhere, both are copied first: a copy has
the lake's own names and the committed sha256, appears whole or not at all, and one that is there and whole is not
fetched again, so whoever was stopped goes on where they were. The catalog comes last: in a folder it never names what
is not there.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from logitlake_schemas import COLUMNS, ShardEntry, layout
from logitlake_shared.catalog.index_file import quoted
from logitlake_shared.catalog.open_shards import entry_of
from logitlake_shared.catalog.publish import Published, made_here, newest_number, read_published
from logitlake_shared.catalog.tables import pin
from logitlake_shared.durable import remove_staged, replace_file
from logitlake_shared.errors import ConfigError, LakeCorruptError, LakeError
from logitlake_shared.file_locks import try_lock
from logitlake_shared.lake import Lake
from logitlake_shared.shards import committed_bytes, missing_error

__all__ = ["Attachable", "attach_statements", "check_files", "copy_files", "find_attachable"]

# Files fetched at once: a store elsewhere answers slowly.
_CONNECTIONS = 8
# What DuckDB takes for something else in a path: the sign between two search paths, signs of a pattern, a separator.
_NOT_IN_A_PATH = ",*?[]{}\\"


@dataclass(frozen=True)
class Attachable:
    """What is to be attached."""

    catalog: Published
    caches: tuple[str, ...]
    files: tuple[ShardEntry, ...]
    """that the catalog names of these caches"""
    late: tuple[str, ...]
    """of which caches the lake knows more than the catalog does, in words"""


def find_attachable(lake: Lake, cache: str | None = None, *, is_copied: bool = False) -> Attachable:
    """The newest published catalog and its files; of this cache alone where one is named.

    Of what is to be copied from a lake that shows no catalog, one that is made here. Raises `LakeError` where there is
    none, or it does not know the cache, `LakeCorruptError` where it or a shard is damaged.
    """
    store = lake.store
    if number := newest_number(store):
        catalog = read_published(store, number)
    elif is_copied:
        catalog = made_here(lake, None if cache is None else [cache])
    else:
        raise LakeError(
            f"{store.uri}: there is no catalog to attach: none was published; run `logitlake rebuild` on the lake, or "
            "make a copy that has one: --to FOLDER"
        )
    known = {name: snapshot for name, snapshot, _, _ in catalog.identities}
    if cache is not None and cache not in known:
        lake.cache(cache)  # a name that is no cache is another mistake
        raise LakeError(
            f"{store.uri}: catalog {number} does not know cache {cache!r}, only {', '.join(sorted(known)) or 'none'}; "
            "let its capture finish, or run `logitlake rebuild` on the lake"
        )
    caches = tuple(sorted(known)) if cache is None else (cache,)
    files = []
    for row in catalog.shards:
        owner, entry = row["cache"], entry_of(row)
        # What comes from elsewhere writes nowhere but where a shard's place is.
        if not layout.valid_name(owner) or entry.path.rpartition("/")[0] not in layout.shard_prefixes(owner):
            raise LakeCorruptError(
                f"{store.uri}/{layout.catalog_path(number)}: names {entry.path!r}, which is no file of cache "
                f"{owner!r}; run `logitlake rebuild`"
            )
        if owner in caches:
            files.append(entry)
    late = tuple(
        f"cache {pinned.cache.name!r}: snapshot {known.get(pinned.cache.name, 'none')} in catalog {number}, "
        f"{pinned.number} in the lake"
        for pinned in pin(lake)
        if pinned.identity not in catalog.identities and cache in (None, pinned.cache.name)
    )
    return Attachable(catalog, caches, tuple(files), late)


def check_files(lake: Lake, found: Attachable) -> None:
    """Raises `LakeCorruptError` where a file of a lake is not there in full length."""
    for entry in found.files:
        if lake.store.size(entry.path) != entry.bytes:
            raise missing_error(f"{lake.store.uri}/{entry.path}")


def copy_files(lake: Lake, found: Attachable, folder: Path, advance: Callable[[int], None]) -> int:
    """Copies what is to be attached into the folder, and returns how many files were fetched.

    Raises `ConfigError` where that is no folder for it, `LakeCorruptError` for bytes that are not those committed.
    """

    def copy(entry: ShardEntry) -> int:
        path = folder / entry.path
        if _is_whole(path, entry):
            return 0
        replace_file(path, committed_bytes(lake.store, entry))
        return 1

    if (folder / layout.LAKE_MANIFEST).exists():
        raise ConfigError(f"{folder}: is a lake; attach it as it is, or name a folder of its own for the copy")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder), ThreadPoolExecutor(_CONNECTIONS, "attach") as pool:
            for left in {(folder / entry.path).parent for entry in found.files}:
                remove_staged(left)
            num_fetched = 0
            for fetched in pool.map(copy, found.files):
                num_fetched += fetched
                advance(1)
            replace_file(folder / layout.catalog_path(found.catalog.number), found.catalog.data)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot hold a copy: {error}; run it again to go on, or name another") from error
    return num_fetched


def attach_statements(folder: Path, found: Attachable) -> list[str]:
    """What a DuckDB, 1.4 or later, is told. Raises `ConfigError` for a folder whose name it cannot take."""
    root = str(folder.resolve())
    if signs := sorted({sign for sign in root if sign in _NOT_IN_A_PATH}):
        raise ConfigError(
            f"{root}: DuckDB takes {' '.join(signs)} in a path for something else; use a folder without, e.g. by --to"
        )
    path = f"{root}/{layout.catalog_path(found.catalog.number)}"
    statements = [f"SET file_search_path = {quoted(root)};", f"ATTACH {quoted(path)} AS lake (READ_ONLY);"]
    names = ", ".join(map(quoted, found.caches))
    for kind in COLUMNS:
        if any(entry.kind == kind for entry in found.files):
            # A view holds no list of its own: the catalog does.
            statements += [
                f"SET VARIABLE {kind} = (SELECT list(path) FROM lake.shards WHERE kind = '{kind}' "
                f"AND cache IN ({names}));",
                f"CREATE TEMP VIEW {kind} AS SELECT split_part(filename, '/', -3) AS cache, * EXCLUDE (filename) "
                # A folder above the lake may be called `day=3`, which is no column of it.
                f"FROM read_parquet(getvariable('{kind}'), union_by_name = true, filename = true, "
                "hive_partitioning = false);",
            ]
    return statements


def _is_whole(path: Path, entry: ShardEntry) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except FileNotFoundError:
        return False


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While nobody else copies into the folder. The lock goes with its process, however that ends."""
    with (folder / ".lock").open("a") as file:
        if not try_lock(file):
            raise ConfigError(f"{folder}: another process copies into it; wait for it, or name another folder")
        yield
