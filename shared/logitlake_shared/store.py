"""Objects in a folder, in memory or in an object store, behind one small interface.

Everything a lake writes goes through `put_new`: create an object under a name that nobody used, or learn that it is
taken. obstore gives that on a local disk, S3, GCS and Azure alike, so that one code path commits everywhere and a
thousand writers need no lock. On a local disk the file and its folder are synced before `put_new` returns, so that
what is written next (a commit record, say) never outlives what it names.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import AzureStore, GCSStore, HTTPStore, LocalStore, MemoryStore, S3Store, from_url

from logitlake_shared.errors import LakeError

__all__ = ["ObjectStore", "memory_store", "open_store"]

Backend = AzureStore | GCSStore | HTTPStore | LocalStore | MemoryStore | S3Store


class ObjectStore:
    """Named immutable objects below one root. Names are relative, with `/` between parts."""

    def __init__(self, uri: str, backend: Backend, root: Path | None) -> None:
        self.uri = uri
        self.root = root
        """the folder, where the store is a local one"""
        self._backend = backend

    def put_new(self, name: str, data: bytes) -> bool:
        """Creates the object durably and returns True; returns False, changing nothing, when the name is taken."""
        try:
            obstore.put(self._backend, name, data, mode="create")
        except AlreadyExistsError:
            return False
        except Exception as error:  # obstore raises one class per backend fault
            raise LakeError(f"{self.uri}: writing {name} failed: {error}") from error
        if self.root is not None:
            _sync(self.root / name)
        return True

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None when there is no such object."""
        try:
            return bytes(obstore.get(self._backend, name).bytes())
        except FileNotFoundError:  # obstore's NotFoundError is one
            return None
        except Exception as error:
            raise LakeError(f"{self.uri}: reading {name} failed: {error}") from error

    def names(self, prefix: str) -> list[str]:
        """The names of all objects below the folder `prefix`, sorted."""
        return sorted(self._names(prefix))

    def arrow_filesystem(self) -> tuple[Any, str]:
        """What pyarrow needs to read this store's objects itself: a filesystem, and the prefix of every name."""
        if self.root is not None:
            return None, f"{self.root}/"
        from obstore.fsspec import FsspecStore
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        scheme, _, rest = self.uri.partition("://")
        return PyFileSystem(FSSpecHandler(FsspecStore(cast(Any, scheme)))), f"{rest.rstrip('/')}/"

    def _names(self, prefix: str) -> Iterator[str]:
        try:
            for page in obstore.list(self._backend, prefix=prefix):
                yield from (entry["path"] for entry in page)
        except Exception as error:
            raise LakeError(f"{self.uri}: listing {prefix} failed: {error}") from error


def open_store(uri: str | Path) -> ObjectStore:
    """The store at `uri`: a folder, `s3://bucket/prefix`, `gs://…`, `az://…`; credentials come from the environment.

    A folder is created when it does not exist.
    """
    text = str(uri)
    if "://" in text and not text.startswith("file://"):
        try:
            return ObjectStore(text, from_url(text), None)
        except Exception as error:
            raise LakeError(f"{text}: cannot be opened: {error}") from error
    root = Path(text.removeprefix("file://")).expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        return ObjectStore(text, LocalStore(prefix=root), root)
    except OSError as error:
        raise LakeError(f"{text}: cannot be opened as a folder: {error}") from error


def memory_store() -> ObjectStore:
    """An empty store that lives as long as the object; for tests and trials."""
    return ObjectStore("memory://", MemoryStore(), None)


def _sync(path: Path) -> None:
    for target in (path, path.parent):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
