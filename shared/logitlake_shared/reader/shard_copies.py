"""Local copies of an object store's shards, in a folder that several processes share.

A shard is fetched whole, once: its row groups are then read from the local disk. Copies are named by their content,
so any number of lakes may use one folder; a copy appears by rename, complete or not at all, and its sha256 is
verified by every process before its first use there. The folder holds at most `max_bytes`, the least recently used
copies leave first; a copy that is open somewhere stays readable until it is closed.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from logitlake_schemas import ShardEntry, sha256_hex
from logitlake_shared.errors import ConfigError
from logitlake_shared.shards import committed_bytes
from logitlake_shared.store import ObjectStore

__all__ = ["DEFAULT_BYTES", "FOLDER_VARIABLE", "ShardCopies", "default_folder"]

FOLDER_VARIABLE = "LOGITLAKE_SHARD_COPIES"
DEFAULT_BYTES = 32 * 2**30
_SUFFIX = ".parquet"


def default_folder() -> Path:
    """$LOGITLAKE_SHARD_COPIES, or `logitlake/shards` in the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitlake" / "shards"


class ShardCopies:
    """The copies in `folder`. Raises `ConfigError` where it cannot be written."""

    def __init__(self, folder: str | Path | None = None, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder, self._max_bytes = Path(folder) if folder is not None else default_folder(), max_bytes
        self._verified: set[str] = set()
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot hold copies of shards: {error}; name another folder by {FOLDER_VARIABLE}"
            ) from error

    def open(self, store: ObjectStore, entry: ShardEntry) -> pa.OSFile:
        """The shard's local copy, open, fetched if it is not there; close it.

        A file and not a path: another process may remove the copy at any moment, and what is open stays readable.
        Raises `LakeCorruptError` when the store's bytes are not those that were committed.
        """
        path = self.folder / f"{entry.sha256}{_SUFFIX}"
        with self._lock:
            lock = self._locks.setdefault(entry.sha256, threading.Lock())
        with lock:  # one thread fetches, the others wait
            file = self._good_copy(path, entry)
            if file is None:
                file = self._write(path, committed_bytes(store, entry))
                self._verified.add(entry.sha256)
                self._trim(path)
        return file

    def _good_copy(self, path: Path, entry: ShardEntry) -> pa.OSFile | None:
        try:
            file = pa.OSFile(str(path), "rb")
        except FileNotFoundError:
            return None
        if entry.sha256 not in self._verified or file.size() != entry.bytes:
            # A copy that rotted on the local disk is fetched again: the store's bytes are the truth.
            if sha256_hex(file.read()) != entry.sha256:
                file.close()
                return None
            self._verified.add(entry.sha256)
            file.seek(0)
        with suppress(FileNotFoundError):
            os.utime(path)  # most recently used
        return file

    def _write(self, path: Path, data: bytes) -> pa.OSFile:
        building = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            building.write_bytes(data)
            file = pa.OSFile(str(building), "rb")
            building.replace(path)
        finally:
            building.unlink(missing_ok=True)
        return file

    def _trim(self, newest: Path) -> None:
        """Removes the least recently used copies over the bound; `newest` always stays."""
        with self._locked():
            copies = []
            for path in self.folder.glob(f"*{_SUFFIX}"):
                try:
                    status = path.stat()
                except FileNotFoundError:  # another process removed it before it waited for this lock
                    continue
                copies.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in copies)
            for _, size, path in sorted(copies):
                if total <= self._max_bytes:
                    break
                if path != newest:
                    path.unlink(missing_ok=True)
                    total -= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
