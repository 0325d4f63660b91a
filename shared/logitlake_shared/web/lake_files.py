"""A lake's files over HTTP, read-only, as an object store: with that, `lake = "https://…"` is a lake like any other.

What a reader needs of a store is to get an object, whole or by range, to know its size, and to list a folder. obstore
speaks that over HTTP as the reading half of WebDAV (RFC 4918): GET, HEAD and PROPFIND. So the student, the catalog and
`logitlake` read a lake through this application with the code that reads S3. Nothing can be written through it, and
what is no object of the lake is not there: no name with `..`, no link that leads out, no file that a writer has not
finished.

`may_read(scope, name)` decides object by object; what may not be read is neither served nor listed.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import quote
from xml.sax.saxutils import escape

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from logitlake_schemas import layout
from logitlake_shared.store import ObjectStore, StoredObject

__all__ = ["LakeFiles"]

MayRead = Callable[[Scope, str], bool]

METHODS = ("GET", "HEAD", "PROPFIND")
# Names are the layout's: words with no dot in front, `/` between them.
_NAME = re.compile(r"(?:[A-Za-z0-9_=@+-][A-Za-z0-9._=@+-]*/)*[A-Za-z0-9_=@+-][A-Za-z0-9._=@+-]*")
_TOP = (layout.LAKE_MANIFEST, "caches", "catalog")
_CHUNK_BYTES = 2**20
# Numbers that no size has are nonsense, too.
_RANGE = re.compile(r"bytes=(\d{0,1000})-(\d{0,1000})", re.IGNORECASE)


class LakeFiles:
    """The ASGI application; mount it where the lake is to be."""

    def __init__(self, store: ObjectStore, may_read: MayRead) -> None:
        self._store, self._may_read = store, may_read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request. Raises `HTTPException` 404 and 405 for whoever mounts it to explain."""
        request = Request(scope, receive)
        if request.method not in METHODS:
            raise HTTPException(405, headers={"Allow": ", ".join(METHODS)})
        name = request.path_params["path"]
        is_list = request.method == "PROPFIND"
        answer = await (self._list(request, name.rstrip("/")) if is_list else self._file(request, name))
        await answer(scope, receive, send)

    async def _file(self, request: Request, name: str) -> Response:
        """GET and HEAD: the object, or the part of it that `Range` asks for."""
        if not self._is_open(request.scope, name):
            raise HTTPException(404)
        if (root := self._store.root) is not None:
            path = root / name
            if not await to_thread.run_sync(lambda: path.is_file() and path.resolve().is_relative_to(root)):
                raise HTTPException(404)
            _keep_one_range(request, (await to_thread.run_sync(path.stat)).st_size)
            return _File(path, media_type=_media_type(name))
        size = await to_thread.run_sync(self._store.size, name)
        if size is None:
            raise HTTPException(404)
        # No validator goes out with it, so one that comes back is of something else (RFC 9110, 13.1.5).
        asked = None if "if-range" in request.headers else request.headers.get("range")
        part = _part(asked, size)
        start, stop = part or (0, size)
        headers = {"Accept-Ranges": "bytes", "Content-Length": str(stop - start)}
        if part is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        body = self._remote(name, start, stop) if request.method == "GET" else iter(())
        return StreamingResponse(body, 200 if part is None else 206, headers, _media_type(name))

    async def _remote(self, name: str, start: int, stop: int) -> AsyncIterator[bytes]:
        file = await to_thread.run_sync(self._store.open, name)
        if file is None:  # removed since its size was told
            raise HTTPException(404)
        with file:
            file.seek(start)
            while start < stop:
                data = await to_thread.run_sync(file.read, min(_CHUNK_BYTES, stop - start))
                start += len(data)
                yield data

    async def _list(self, request: Request, name: str) -> Response:
        """PROPFIND: what is in a folder, at any depth, or directly in it and its folders (`Depth: 1`)."""
        if name and not self._is_open(request.scope, name):
            raise HTTPException(404)
        is_deep = request.headers.get("depth", "infinity") == "infinity"
        prefixes = [name] if name else list(_TOP)
        objects, folders = await to_thread.run_sync(self._listed, request.scope, prefixes, is_deep)
        base = request.url.path.rstrip("/").removesuffix(name).rstrip("/")
        body = _multistatus(base, [name, *folders], objects)
        return Response(body, 207, media_type="application/xml; charset=utf-8")

    def _listed(self, scope: Scope, prefixes: Iterable[str], is_deep: bool) -> tuple[list[StoredObject], list[str]]:
        objects: list[StoredObject] = []
        folders: list[str] = []
        for prefix in prefixes:
            below, here = ([], self._store.entries(prefix)) if is_deep else self._store.level(prefix)
            folders += below
            objects += here
        return (
            [entry for entry in objects if self._is_open(scope, entry.name)],
            [folder for folder in folders if self._is_open(scope, folder)],
        )

    def _is_open(self, scope: Scope, name: str) -> bool:
        return bool(_NAME.fullmatch(name)) and name.split("/")[0] in _TOP and self._may_read(scope, name)


class _File(FileResponse):
    """Read in larger pieces than starlette's: shards are large, and each piece crosses a thread and the event loop."""

    chunk_size = _CHUNK_BYTES


def _part(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the byte after the last, also where that is all there is: who asks for a part expects to be told.

    Several ranges, or nonsense, are no part but mean the whole (RFC 9110, 14.2).
    """
    found = _RANGE.fullmatch(header or "")
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if first and last and int(first) > int(last):
        return None
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise HTTPException(416, headers={"Content-Range": f"bytes */{size}"})
    return start, stop


def _keep_one_range(request: Request, size: int) -> None:
    """Takes `Range` out of a request where it means the whole: `FileResponse` has answers of its own to such."""
    try:
        is_whole = _part(request.headers.get("range"), size) is None
    except HTTPException:
        if "if-range" not in request.headers:
            raise
        is_whole = True  # what was read of it before is of something else, or there is nothing more
    if is_whole:
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]


def _media_type(name: str) -> str:
    return "application/json" if name.endswith(".json") else "application/octet-stream"


def _multistatus(base: str, folders: Iterable[str], objects: Iterable[StoredObject]) -> str:
    epoch = datetime.fromtimestamp(0, UTC)  # a folder has no time of its own, and one is asked for
    of_folder = "<resourcetype><collection/></resourcetype>"
    entries = [(f"{folder}/" if folder else "", of_folder, epoch) for folder in folders]
    for entry in objects:
        size = f"<resourcetype/><getcontentlength>{entry.bytes}</getcontentlength>"
        entries.append((entry.name, size, entry.modified))
    return '<?xml version="1.0" encoding="utf-8"?>\n<multistatus xmlns="DAV:">{}</multistatus>'.format(
        "".join(
            f"<response><href>{escape(quote(f'{base}/{name}'))}</href><propstat><prop>{prop}"
            f"<getlastmodified>{format_datetime(modified, usegmt=True)}</getlastmodified></prop>"
            "<status>HTTP/1.1 200 OK</status></propstat></response>"
            for name, prop, modified in entries
        )
    )
