"""Questions that take longer than anybody wants to hold a connection: asked now, read later, in any format.

An answer lies in a file of the service's until it is forgotten: when whoever asked says so, when newer answers need the
room, or when the service ends. A question of somebody else's is not there.
"""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import pyarrow as pa
from fastapi import APIRouter, Header, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from logitlake_shared.errors import LogitLakeError, QueryBusyError, QueryCancelledError
from logitlake_shared.sql_service import SqlRequest
from logitlake_shared.sql_service.formats import FORMATS, encode
from logitlake_shared.web.doors import Asking, Principal
from logitlake_shared.web.problems import Problem, problem_of, scrubbed
from logitlake_teacher.api.sql import Question, SqlQuestions, format_of, headers_of, questions_of, request_of

__all__ = ["LongQueries", "QueryDocument", "query_routes"]

# Answers that are kept, the newest.
_KEPT = 32


class QueryDocument(BaseModel):
    """A question that was asked."""

    model_config = ConfigDict(frozen=True, from_attributes=True, use_attribute_docstrings=True)

    id: str = Field(examples=["qry_01K0000000000000000000000"])
    state: Literal["running", "succeeded", "failed", "cancelled"]
    created: float = Field(examples=[1_790_000_000.0])
    """seconds since 1970"""
    snapshot: dict[str, int] = Field(examples=[{"main": 1}])
    """of each cache, the snapshot that was asked; empty until that is known"""
    rows: int = Field(examples=[1_000])
    """that were answered until now"""
    truncated: str | None = Field(examples=[None])
    """the limit that cut the answer short"""
    milliseconds: float | None = Field(examples=[12.5])
    code: str | None = Field(default=None, examples=[None])
    """of the problem that ended it"""
    detail: str | None = Field(default=None, examples=[None])


@dataclass(eq=False)
class _Query:
    """One question; its answer is what `formats.encode` takes."""

    request: SqlRequest
    csv_safe: bool
    principal: str
    path: FilePath
    state: Literal["running", "succeeded", "failed", "cancelled"] = "running"
    created: float = field(default_factory=time.time)
    snapshot: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    truncated: str = ""
    milliseconds: float = 0.0
    problem: Problem | None = None
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    query_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.query_id = self.request.query_id

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """The batches of the answer, from its file."""
        with pa.OSFile(str(self.path)) as file:
            yield from pa.ipc.open_stream(file)

    def document(self) -> QueryDocument:
        """As a user sees it."""
        has_ended = self.state != "running"
        return QueryDocument(
            id=self.query_id,
            state=self.state,
            created=self.created,
            snapshot=self.snapshot,
            rows=self.rows,
            truncated=self.truncated or None,
            milliseconds=self.milliseconds if has_ended else None,
            code=None if self.problem is None else self.problem.code,
            detail=None if self.problem is None else scrubbed(self.problem.detail),
        )


class LongQueries:
    """Those of one service."""

    def __init__(self, questions: SqlQuestions) -> None:
        self._questions = questions
        self._queries: dict[str, _Query] = {}
        """in the order in which they were asked"""

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the service lives; then answers are forgotten and what runs is ended."""
        limits = self._questions.pool.limits
        with tempfile.TemporaryDirectory(prefix="logitlake-answers-") as folder:
            self._folder = FilePath(folder)
            self._threads = ThreadPoolExecutor(limits.num_running, "queries")
            try:
                yield
            finally:
                for query_id in list(self._queries):
                    self._questions.pool.cancel(query_id)
                self._threads.shutdown(cancel_futures=True)

    def ask(self, principal: Principal, request: SqlRequest, *, csv_safe: bool) -> QueryDocument:
        """Begins a question. Raises `QueryBusyError` where too many wait."""
        limits = self._questions.pool.limits
        if sum(query.state == "running" for query in self._queries.values()) >= limits.num_running + limits.num_waiting:
            raise QueryBusyError("too many questions wait already; ask again soon")
        ended = [query for query in self._queries.values() if query.state != "running"]
        for query in ended[: max(0, len(ended) - _KEPT + 1)]:
            self._drop(query)
        query = _Query(request, csv_safe, principal.id, self._folder / f"{request.query_id}.arrow")
        self._queries[request.query_id] = query
        self._threads.submit(self._run, principal, query)
        return query.document()

    def find(self, principal: Principal, query_id: str) -> _Query | None:
        """The question of this id, if it is theirs."""
        query = self._queries.get(query_id)
        return query if query is not None and query.principal == principal.id else None

    def forget(self, query: _Query) -> None:
        """Ends a question that runs, and drops the answer of one that does not."""
        if query.state == "running":
            self._questions.pool.cancel(query.query_id)
            query.state = "cancelled"  # also where it had not begun
        else:
            self._drop(query)

    def _run(self, principal: Principal, query: _Query) -> None:
        if query.state != "running":
            return
        try:
            with self._questions.asked(principal, query.request) as result, pa.OSFile(str(query.path), "wb") as file:
                query.snapshot, query.schema = result.snapshot, result.schema
                with pa.ipc.new_stream(file, result.schema) as writer:
                    for batch in result:
                        writer.write_batch(batch)
                        query.rows = result.rows
            query.truncated, query.milliseconds = result.truncated, result.milliseconds
            if query.state == "running":
                query.state = "succeeded"
        except Exception as error:
            query.problem = problem_of(error)
            if query.state == "running":
                query.state = "cancelled" if isinstance(error, QueryCancelledError) else "failed"
            if not isinstance(error, LogitLakeError):
                raise

    def _drop(self, query: _Query) -> None:
        self._queries.pop(query.query_id, None)
        query.path.unlink(missing_ok=True)


QueryId = Annotated[str, Path(max_length=100, examples=["qry_01K0000000000000000000000"])]


def query_routes() -> APIRouter:
    """The routes below `/v1/queries`."""
    router = APIRouter(prefix="/v1/queries", tags=["sql"])
    content: dict[str, Any] = {format_.media_type: {} for format_ in FORMATS.values()}
    router.add_api_route("", _ask_long, methods=["POST"], status_code=202, response_model=QueryDocument)
    router.add_api_route("/{query_id}", _one, response_model=QueryDocument)
    router.add_api_route(
        "/{query_id}/result",
        _result,
        response_class=StreamingResponse,
        responses={200: {"description": "The rows, in the format that `Accept` asks for", "content": content}},
    )
    router.add_api_route("/{query_id}", _end, methods=["DELETE"], status_code=204, response_class=Response)
    return router


def _queries(request: Request) -> LongQueries:
    queries: LongQueries = request.app.state.queries
    return queries


def _ask_long(request: Request, response: Response, asking: Asking, question: Question) -> QueryDocument:
    """Ask a question and read its answer later. It may take as long as the service allows, unless it says less."""
    asking.require("read")
    limits = questions_of(request).pool.limits
    timeout_ms = question.timeout_ms or round(1000 * limits.max_timeout_s)
    asked = request_of(request, asking, question.model_copy(update={"timeout_ms": timeout_ms}))
    asked.resolved(limits).to_bytes()  # what cannot be asked is refused now
    document = _queries(request).ask(asking, asked, csv_safe=question.csv_safe)
    response.headers["Location"] = f"/v1/queries/{document.id}"
    return document


def _one(request: Request, asking: Asking, query_id: QueryId) -> QueryDocument:
    """How a question of one's own is."""
    return _found(request, asking, query_id).document()


def _result(
    request: Request, asking: Asking, query_id: QueryId, accept: Annotated[str, Header(max_length=1000)] = "*/*"
) -> StreamingResponse:
    """The answer to a question that succeeded; as often as one likes."""
    query = _found(request, asking, query_id)
    name = format_of(accept)
    if query.problem is not None:
        raise query.problem
    if query.state != "succeeded":
        raise Problem("conflict", f"question {query_id} is {query.state}: there is no answer yet")
    pieces = encode(query, name, csv_safe=query.csv_safe)
    return StreamingResponse(pieces, media_type=FORMATS[name].media_type, headers=headers_of(query))


def _end(request: Request, asking: Asking, query_id: QueryId) -> Response:
    """End a question of one's own, however it was asked, or forget its answer."""
    asking.require("read")
    query = _queries(request).find(asking, query_id)
    if query is not None:
        _queries(request).forget(query)
    elif not questions_of(request).cancel(asking, query_id):
        raise Problem("not_found", f"no question {query_id!r} of yours is under way")
    return Response(status_code=204)


def _found(request: Request, asking: Principal, query_id: str) -> _Query:
    asking.require("read")
    query = _queries(request).find(asking, query_id)
    if query is None:
        raise Problem("not_found", f"no question {query_id!r} of yours")
    return query
