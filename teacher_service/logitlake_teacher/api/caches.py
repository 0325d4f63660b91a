"""Caches, their snapshots, files and errors: what `logitlake ls` shows, over HTTP.

Each route asks `CacheOf` for its cache, so a cache that the token does not cover is not there, whatever is asked of it.
"""

from operator import attrgetter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request

from logitlake_schemas import Snapshot
from logitlake_shared.cache_figures import cache_figures
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.web.cursors import Cursor, Limit, Page, page_of
from logitlake_shared.web.doors import Asking
from logitlake_shared.web.problems import Problem
from logitlake_teacher.api.documents import (
    CacheDocument,
    FileDocument,
    SnapshotDocument,
    figures_document,
)
from logitlake_teacher.api.files import FILES

__all__ = ["CacheOf", "cache_document", "cache_routes", "lake_of"]

Name = Annotated[str, Path(max_length=100, examples=["main"])]


def lake_of(request: Request) -> Lake:
    """The lake that is served."""
    lake: Lake = request.app.state.lake
    return lake


def _cache(request: Request, asking: Asking, cache: Name) -> Cache:
    """The cache of the path, if it is there for whoever asks."""
    asking.require("read", cache)
    if not lake_of(request).has_cache(cache):
        raise Problem("not_found", f"no cache {cache!r}")
    return lake_of(request).cache(cache)


CacheOf = Annotated[Cache, Depends(_cache)]


def cache_routes() -> APIRouter:
    """The routes below `/v1/caches`."""
    router = APIRouter(prefix="/v1/caches", tags=["caches"])
    router.add_api_route("", _list_caches, response_model=Page[CacheDocument])
    router.add_api_route("/{cache}", _one_cache, response_model=CacheDocument)
    router.add_api_route("/{cache}/snapshots/{number}", _one_snapshot, response_model=SnapshotDocument)
    router.add_api_route("/{cache}/snapshots/{number}/files", _list_files, response_model=Page[FileDocument])
    router.add_api_route("/{cache}/errors", _list_errors, response_model=Page[dict[str, Any]])
    return router


def _list_caches(request: Request, asking: Asking, limit: Limit = 50, cursor: Cursor = None) -> Page[CacheDocument]:
    """The caches that the token covers, by name."""
    asking.require("read")
    lake = lake_of(request)
    names = [(name, name) for name in lake.cache_names() if asking.sees(name)]
    page = page_of(names, "caches", limit, cursor)
    caches = [cache_document(lake.cache(name)) for name in page.data]
    return Page(data=caches, next_cursor=page.next_cursor, has_more=page.has_more)


def _one_cache(cache: CacheOf) -> CacheDocument:
    """One cache, with the figures of its newest snapshot."""
    return cache_document(cache)


def _one_snapshot(cache: CacheOf, number: Annotated[int, Path(ge=1)]) -> SnapshotDocument:
    """A snapshot in figures."""
    snapshot = _snapshot(cache, number)
    figures = figures_document(cache_figures(cache, snapshot))
    return SnapshotDocument(cache=cache.name, number=number, spec_fingerprint=cache.fingerprint, figures=figures)


def _list_files(
    cache: CacheOf, number: Annotated[int, Path(ge=1)], limit: Limit = 50, cursor: Cursor = None
) -> Page[FileDocument]:
    """The committed files of a snapshot, by path, each with its sha256 and where its bytes are."""
    entries = [entry for commit in _snapshot(cache, number).commits for entry in commit.shards]
    files = [
        (
            entry.path,
            FileDocument(
                path=entry.path,
                kind=entry.kind,
                bytes=entry.bytes,
                sha256=entry.sha256,
                rows=entry.rows,
                tokens=entry.tokens,
                url=f"{FILES}/{entry.path}",
            ),
        )
        for entry in sorted(entries, key=attrgetter("path"))
    ]
    return page_of(files, f"files of {cache.name} {number}", limit, cursor)


def _list_errors(
    cache: CacheOf,
    code: Annotated[
        str | None, Query(max_length=100, description="of this code only", examples=["image_missing"])
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[dict[str, Any]]:
    """Samples that are not there, and why, in the newest snapshot."""
    snapshot = _newest(cache)
    errors = [
        (f"{commit.unit} {place:09d}", {"unit": commit.unit} | error.model_dump(mode="json"))
        for commit in (() if snapshot is None else snapshot.commits)
        for place, error in enumerate(commit.errors)
        if code is None or error.code == code
    ]
    return page_of(errors, f"errors of {cache.name} {code}", limit, cursor)


def cache_document(cache: Cache) -> CacheDocument:
    """A cache as its newest snapshot shows it."""
    snapshot = _newest(cache)
    return CacheDocument(
        name=cache.name,
        kind=cache.spec.kind,
        fingerprint=cache.fingerprint,
        snapshot=None if snapshot is None else snapshot.number,
        figures=None if snapshot is None else figures_document(cache_figures(cache, snapshot)),
        spec=cache.spec.model_dump(mode="json"),
    )


def _snapshot(cache: Cache, number: int) -> Snapshot:
    if number > cache.newest_snapshot_number():
        raise Problem("not_found", f"cache {cache.name!r} has no snapshot {number}")
    return cache.open_snapshot(number)


def _newest(cache: Cache) -> Snapshot | None:
    number = cache.newest_snapshot_number()
    return cache.open_snapshot(number) if number else None
