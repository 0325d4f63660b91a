"""Samples and pairs, token by token, and their images; a student that was scored on them beside the teacher."""

from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from logitlake_shared.errors import DataError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.sql_service import SqlRequest
from logitlake_shared.student_scores import LinkedStudents
from logitlake_shared.tools.inspect_sample import FoundSample, SampleView, find_sample, stored_images, view_sample
from logitlake_shared.tools.token_text import find_token_text
from logitlake_shared.web.cursors import Cursor, Limit, Page, decode_cursor, encode_cursor
from logitlake_shared.web.problems import Problem, scrubbed
from logitlake_teacher.api.caches import CacheOf, lake_of
from logitlake_teacher.api.documents import SampleDocument, SampleEntry
from logitlake_teacher.api.sql import questions_of

__all__ = ["Of", "SampleId", "StudentName", "image_url", "sample_routes", "samples_after", "viewed"]

SampleId = Annotated[str, Path(max_length=4096, examples=["train-00145-0-caption"])]
StudentName = Annotated[str | None, Query(max_length=250, description="one of `students`", examples=["demo/d2s"])]
Of = Annotated[str | None, Query(max_length=1000, description="only those of it")]
# Formats of a lake's images, as browsers know them; anything else is bytes to be saved.
_IMAGE_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def sample_routes() -> APIRouter:
    """The routes below `/v1/caches/{cache}/samples` and `/images`."""
    router = APIRouter(prefix="/v1/caches/{cache}", tags=["samples"])
    router.add_api_route("/samples", _list_samples, response_model=Page[SampleEntry])
    router.add_api_route("/samples/{sample_id:path}", _one_sample, response_model=SampleDocument)
    router.add_api_route("/images/{sha256}", _one_image, response_class=Response)
    return router


def samples_after(
    request: Request, cache: Cache, after: str, limit: int, task: str | None = None, split: str | None = None
) -> list[SampleEntry]:
    """Up to `limit` samples or pairs of the newest snapshot whose ids come after `after`, by id."""
    if not cache.newest_snapshot_number():
        return []
    conditions, params = ["sample_id > ?"], [after]
    for column, value in (("task", task), ("split", split)):
        if value is not None:
            conditions.append(f"{column} = ?")
            params.append(value)
    sql = (
        f"SELECT sample_id AS id, task, source, split, num_tokens FROM sample_index WHERE {' AND '.join(conditions)} "
        f"ORDER BY sample_id LIMIT {limit}"
    )
    with questions_of(request).pool.run(SqlRequest(sql, caches=(cache.name,), params=params)) as result:
        return [SampleEntry.model_validate(row) for row in result.read_all().to_pylist()]


def _list_samples(
    request: Request, cache: CacheOf, task: Of = None, split: Of = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[SampleEntry]:
    """The samples or pairs of a cache, by id, in the newest snapshot."""
    of_list = f"samples of {cache.name} {task!r} {split!r}"
    after = "" if cursor is None else decode_cursor(cursor, of_list)
    found = samples_after(request, cache, after, limit + 1, task, split)
    page, has_more = found[:limit], len(found) > limit
    return Page(data=page, next_cursor=encode_cursor(page[-1].id, of_list) if has_more else None, has_more=has_more)


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
    return view, [] if students is None else students.scored_on(view.split)


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


def _found_sample(lake: Lake, cache: Cache, sample_id: str) -> FoundSample:
    """Where a sample or pair lies. Raises `Problem` `not_found`."""
    try:
        return find_sample(lake, sample_id, cache.name)
    except DataError:
        raise Problem("not_found", f"no sample or pair {sample_id!r} in cache {cache.name!r}") from None
