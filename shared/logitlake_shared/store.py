"""Objects in a folder, in memory or in an object store, behind one small interface.

Everything a lake commits goes through `put_new`: create an object under a name that nobody used, or learn that it is
taken. obstore gives that on S3, GCS and Azure, `logitlake_shared.durable` on a local disk (obstore's own writes there
are not synced before they are seen), so that one protocol commits everywhere and a thousand writers need no lock.
When `put_new` returns, the object is durable: what is written next (a commit record, say) never outlives what it
names.

`overwrite` and `delete` are for repair and collection alone: the first only ever writes the bytes that a content name
stands for, the second only removes what no record names.
"""

import errno
import io
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError
from obstore.store import AzureStore, GCSStore, HTTPStore, LocalStore, MemoryStore, S3Store, from_url

from logitlake_shared.durable import create_file, replace_file
from logitlake_shared.errors import LakeError

if TYPE_CHECKING:
    from obstore.store import ClientConfig

__all__ = ["TOKEN_VARIABLE", "ObjectStore", "StoredObject", "memory_store", "open_store", "token_headers"]

Backend = AzureStore | GCSStore | HTTPStore | LocalStore | MemoryStore | S3Store

# A request that conflicts with another one is over in some ten milliseconds.
_CONFLICT_ATTEMPTS = 5
_CONFLICT_WAIT_S = 0.05
# What opens a lake that a service hands out.
TOKEN_VARIABLE = "LOGITLAKE_TOKEN"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# How a local file is named while it is written; obstore does the same and never lists one.
_STAGED = re.compile(r"#\d+$")


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing shows it."""

    name: str
    bytes: int
    modified: datetime
    """when it was written, by the store's own clock"""


class ObjectStore:
    """Named immutable objects below one root. Names are relative, with `/` between parts."""

    def __init__(self, uri: str, backend: Backend, root: Path | None, listed_under: str = "") -> None:
        self.uri = uri
        self.root = root
        """the folder, where the store is a local one"""
        self._backend = backend
        # obstore lists a server's objects by their whole path, and takes names without what its address ends in.
        self._listed_under = listed_under

    def put_new(self, name: str, data: bytes) -> bool:
        """Creates the object durably and returns True; returns False, changing nothing, when the name is taken."""
        try:
            if self.root is not None:
                return create_file(self.root / name, data)
            return self._put_new_remote(name, data)
        except LakeError:
            raise
        except Exception as error:  # obstore raises one class per backend fault
            raise LakeError(f"{self.uri}: writing {name} failed: {error}") from error

    def overwrite(self, name: str, data: bytes) -> None:
        """Creates or replaces the object durably and atomically: a reader sees the old bytes or the new ones."""
        try:
            if self.root is not None:
                replace_file(self.root / name, data)
            else:
                obstore.put(self._backend, name, data, mode="overwrite", use_multipart=False)
        except Exception as error:
            raise LakeError(f"{self.uri}: writing {name} failed: {error}") from error

    def delete(self, name: str) -> None:
        """Removes the object; fine when there is none."""
        try:
            if self.root is not None:
                (self.root / name).unlink(missing_ok=True)
            else:
                obstore.delete(self._backend, name)
        except FileNotFoundError:
            return
        except Exception as error:
            raise LakeError(f"{self.uri}: deleting {name} failed: {error}") from error

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None when there is no such object."""
        try:
            return bytes(obstore.get(self._backend, name).bytes())
        except FileNotFoundError:  # obstore's NotFoundError is one
            return None
        except Exception as error:
            raise LakeError(f"{self.uri}: reading {name} failed: {error}") from error

    def open(self, name: str) -> BinaryIO | None:
        """The object as a seekable file that reads what is asked of it, or None when there is no such object.

        A local file is read by position, not mapped: a file that is cut short under a reader is then an error and not
        the end of the process.
        """
        try:
            if self.root is not None:
                return cast(BinaryIO, pa.OSFile(str(self.root / name), "rb"))
            return cast(BinaryIO, _RemoteFile(self._backend, name))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise LakeError(f"{self.uri}: opening {name} failed: {error}") from error

    def size(self, name: str) -> int | None:
        """The object's length in bytes, or None when there is no such object."""
        try:
            return int(obstore.head(self._backend, name)["size"])
        except FileNotFoundError:
            return None
        except Exception as error:
            raise LakeError(f"{self.uri}: reading {name} failed: {error}") from error

    def names(self, prefix: str) -> list[str]:
        """The names of all objects below the folder `prefix`, sorted."""
        return [entry.name for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> list[StoredObject]:
        """All objects below the folder `prefix`, sorted by name."""
        return sorted(self._entries(prefix), key=lambda entry: entry.name)

    def folders(self, prefix: str) -> list[str]:
        """The folders directly below the folder `prefix`, sorted, as names; does not list what is in them."""
        return self.level(prefix)[0]

    def level(self, prefix: str) -> tuple[list[str], list[StoredObject]]:
        """What is directly below the folder `prefix`, folders and objects, sorted; does not look into the folders."""
        try:
            listed = obstore.list_with_delimiter(self._backend, prefix)
            folders = {self._name(name) for name in listed["common_prefixes"]} - {prefix}
            objects = [self._object(entry) for entry in listed["objects"]]
        except Exception as error:
            raise LakeError(f"{self.uri}: listing {prefix} failed: {error}") from error
        return sorted(folders), sorted(objects, key=lambda entry: entry.name)

    def leftovers(self, prefix: str) -> list[StoredObject]:
        """What writers that were stopped left below the folder `prefix`: no listing shows it as an object.

        On a local disk that is `<name>#<n>` (see `logitlake_shared.durable`); an object store keeps no such thing.
        """
        if self.root is None:
            return []
        found = []
        for path in sorted((self.root / prefix).rglob("*#*")):
            if _STAGED.search(path.name) and path.is_file():
                status = path.stat()
                modified = datetime.fromtimestamp(status.st_mtime, UTC)
                found.append(StoredObject(str(path.relative_to(self.root)), status.st_size, modified))
        return found

    def _put_new_remote(self, name: str, data: bytes) -> bool:
        for attempt in range(_CONFLICT_ATTEMPTS):
            try:
                obstore.put(self._backend, name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                # S3 says "conflict, try again" while another request on the name is under way; obstore calls that
                # taken too, but there may be nothing.
                if self.size(name) is not None:
                    return False
                time.sleep(_CONFLICT_WAIT_S * 2**attempt)
            else:
                return True
        raise LakeError(
            f"{self.uri}: {name} can neither be created nor is it there, {_CONFLICT_ATTEMPTS} times in a row; another "
            "writer may hold it: try again"
        )

    def _name(self, listed: str) -> str:
        return listed.removeprefix(self._listed_under)

    def _object(self, listed: Any) -> StoredObject:
        return StoredObject(self._name(listed["path"]), listed["size"], listed["last_modified"])

    def _entries(self, prefix: str) -> Iterator[StoredObject]:
        try:
            for page in obstore.list(self._backend, prefix=prefix):
                yield from map(self._object, page)
        except Exception as error:
            raise LakeError(f"{self.uri}: listing {prefix} failed: {error}") from error


class _RemoteFile(io.RawIOBase):
    """An object as a seekable file: each read is one range request.

    pyarrow asks a file for `closed`, which obstore's own reader does not have.
    """

    def __init__(self, backend: Backend, name: str) -> None:
        super().__init__()
        self._backend, self._name, self._at = backend, name, 0
        self._size = int(obstore.head(backend, name)["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self._at)
        length = left if size is None or size < 0 else min(size, left)
        if not length:
            return b""
        try:
            data = bytes(obstore.get_range(self._backend, self._name, start=self._at, length=length))
        except Exception as error:  # obstore raises one class per backend fault, a reader of files expects this one
            raise OSError(errno.EIO, f"reading {self._name} failed: {error}") from error
        self._at += len(data)
        return data


def open_store(uri: str | Path, token: str | None = None) -> ObjectStore:
    """The store at `uri`: a folder, `s3://bucket/prefix`, `gs://…`, `az://…`; credentials come from the environment.

    `https://host/v1/files` is a lake that a LogitLake service hands out, to be read only; the environment's
    `LOGITLAKE_TOKEN`, or `token`, opens it. A folder is created when it does not exist.
    """
    text = str(uri)
    if text.startswith(("http://", "https://")):
        return _served_store(text, token)
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


def token_headers(url: str, token: str | None = None) -> dict[str, str]:
    """What opens a service's door: `token`, or that of the environment where it is None; nothing where there is none.

    Raises `LakeError` where it would be sent unencrypted to another machine.
    """
    address = urlsplit(url)
    sent = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if sent and address.scheme == "http" and address.hostname not in _LOOPBACK:
        raise LakeError(
            f"{url}: {TOKEN_VARIABLE} is set, and would be sent unencrypted; use an https:// address, or a tunnel to "
            "127.0.0.1"
        )
    return {"authorization": f"Bearer {sent}"} if sent else {}


def _served_store(url: str, token: str | None = None) -> ObjectStore:
    address = urlsplit(url)
    options: ClientConfig = {"allow_http": address.scheme == "http"}
    if address.hostname in _LOOPBACK:
        # A proxy of the environment would be asked for this machine's own services, too, and be sent their token. One
        # that is named here, and excluded, keeps those of the environment out.
        options |= {"proxy_url": "http://127.0.0.1:9", "proxy_excludes": ",".join(_LOOPBACK)}
    if headers := token_headers(url, token):
        options["default_headers"] = headers
    try:
        store = HTTPStore(url, client_options=options)
    except Exception as error:
        raise LakeError(f"{url}: cannot be opened: {error}") from error
    path = address.path.strip("/")
    return ObjectStore(url, store, None, listed_under=f"{path}/" if path else "")


def memory_store() -> ObjectStore:
    """An empty store that lives as long as the object; for tests and trials."""
    return ObjectStore("memory://", MemoryStore(), None)
