"""Caches, their snapshots and files, and single samples: what `logitlake ls` and `inspect` show, over HTTP.

Each route asks `CacheOf` for its cache, so a cache that the token does not cover is not there, whatever is asked of it.
"""

from dataclasses import asdict
from operator import attrgetter
from pathlib import Path as FilePath
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.responses import Response

from logitlake_schemas import Snapshot
from logitlake_shared.cache_figures import cache_figures
from logitlake_shared.errors import DataError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.student_scores import LinkedStudents
from logitlake_shared.tools.inspect_sample import FoundSample, SampleView, find_sample, stored_images, view_sample
from logitlake_shared.tools.token_text import find_token_text
from logitlake_shared.web.cursors import Cursor, Limit, Page, page_of
from logitlake_shared.web.doors import Asking
from logitlake_shared.web.problems import Problem, scrubbed
from logitlake_teacher.api.documents import (
    CacheDocument,
    FileDocument,
    SampleDocument,
    SnapshotDocument,
    figures_document,
)
from logitlake_teacher.api.files import FILES

__all__ = ["CacheOf", "SampleId", "StudentName", "cache_document", "cache_routes", "image_url", "lake_of", "viewed"]

Name = Annotated[str, Path(max_length=100, examples=["main"])]
SampleId = Annotated[str, Path(max_length=4096, examples=["train-00145-0-caption"])]
StudentName = Annotated[str | None, Query(max_length=250, description="one of `students`", examples=["demo/d2s"])]
# Formats of a lake's images, as browsers know them; anything else is bytes to be saved.
_IMAGE_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


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
    router.add_api_route("/{cache}/samples/{sample_id:path}", _one_sample, response_model=SampleDocument)
    router.add_api_route("/{cache}/images/{sha256}", _one_image, response_class=Response)
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


def _one_sample(
    request: Request,
    cache: CacheOf,
    sample_id: SampleId,
    top: Annotated[int, Query(ge=1, le=100, description="stored entries of each token")] = 5,
    student: StudentName = None,
) -> SampleDocument:
    """A sample or a pair, token by token, with what the teacher would have said instead; a student beside it."""
    view, students = viewed(request, cache, sample_id, top, student)
    images = [asdict(image) | {"url": image_url(cache, image.sha256, sample_id)} for image in view.images]
    for image in images:
        del image["saved_to"]
    return SampleDocument.model_validate(asdict(view) | {"images": images, "students": students})


def viewed(
    request: Request, cache: Cache, sample_id: str, top: int, student: str | None
) -> tuple[SampleView, list[str]]:
    """A sample as people see it, and the students that may stand beside the teacher. Raises `Problem` `not_found`."""
    found = _found_sample(lake_of(request), cache, sample_id)
    decode, note = find_token_text(cache.spec, request.app.state.tokenizer)
    runs: FilePath | None = request.app.state.runs
    students = LinkedStudents(runs, cache) if runs is not None and cache.spec.kind == "samples" else None
    scored = None
    if student is not None:
        if students is None:
            raise Problem("not_found", f"no student {student!r}: this service has no runs to show beside this cache")
        try:
            scored = student, students.find(student, sample_id)
        except DataError as error:
            raise Problem("not_found", str(error)) from None
    view = view_sample(found, decode, scrubbed(note), top=top, student=scored)
    return view, [] if students is None else students.names


def _one_image(
    request: Request,
    cache: CacheOf,
    sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$")],
    sample_id: Annotated[str, Query(max_length=4096, description="a sample that shows the image")],
) -> Response:
    """An image as it was captured, byte for byte."""
    try:
        record = stored_images(_found_sample(lake_of(request), cache, sample_id), [sha256])[sha256]
    except DataError:
        raise Problem("not_found", f"sample {sample_id!r} of cache {cache.name!r} has no such image") from None
    headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, max-age=31536000, immutable"}
    return Response(record["data"], 200, headers, _IMAGE_TYPES.get(record["format"], "application/octet-stream"))


def image_url(cache: Cache, sha256: str, sample_id: str) -> str:
    """Where an image of a sample is."""
    return f"/v1/caches/{cache.name}/images/{sha256}?{urlencode({'sample_id': sample_id})}"


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


def _found_sample(lake: Lake, cache: Cache, sample_id: str) -> FoundSample:
    """Where a sample or pair lies. Raises `Problem` `not_found`."""
    try:
        return find_sample(lake, sample_id, cache.name)
    except DataError:
        raise Problem("not_found", f"no sample or pair {sample_id!r} in cache {cache.name!r}") from None
