"""SQL for many: questions over the caches that the token covers, each answered by a process of its own.

`logitlake_shared.sql_service` decides what may be asked and what it may cost; here it becomes HTTP: who asks sees their
caches alone, `Accept` chooses the format, an answer streams while it is made, and whoever hangs up ends the question.
Each question leaves a line in the log: who, the digest of the text, rows, milliseconds, and how it ended.
"""

import hashlib
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Annotated, Any

import pyarrow as pa
from anyio import CancelScope, to_thread
from fastapi import APIRouter, Header, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import StreamingResponse

from logitlake_shared.catalog.column_docs import COLUMN_DOCS
from logitlake_shared.errors import LogitLakeError
from logitlake_shared.lake import Lake
from logitlake_shared.sql_service import SqlPool, SqlRequest, SqlResult
from logitlake_shared.sql_service.formats import FORMATS, Answer, encode
from logitlake_shared.sql_service.grammar import RELATIONS
from logitlake_shared.web.doors import Asking, Principal
from logitlake_shared.web.problems import Problem, problem_of
from logitlake_shared.web.traces import span
from logitlake_teacher.api.documents import ColumnDocument, ViewDocument

__all__ = [
    "Question",
    "SqlQuestions",
    "caches_asked",
    "format_of",
    "headers_of",
    "questions_of",
    "request_of",
    "schema",
    "sql_routes",
    "streamed_answer",
]

_log = logging.getLogger("logitlake.sql")

Scalar = str | int | float | bool | None
_COLUMNS_OF_VIEWS = " UNION ALL ".join(
    f"SELECT '{view}' AS view, row_number() OVER () AS number, column_name AS name, column_type AS type "
    f"FROM (DESCRIBE {view})"
    for view in RELATIONS
)
_JSON = "application/json"
# Where quality is equal and nothing else decides.
_PREFERRED = sorted(FORMATS, key=lambda name: FORMATS[name].media_type != _JSON)
_QUALITY = re.compile(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")


class Question(BaseModel):
    """One question in DuckDB's SQL."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sql: str = Field(min_length=1, examples=["SELECT task, avg(entropy) FROM tokens GROUP BY task"])
    """one SELECT, DESCRIBE or SUMMARIZE over the views of `/v1/schema`"""
    params: list[Scalar] | dict[str, Scalar] = Field(default=[], examples=[[]])
    """what stands for `?` (a list) or `$name` (an object)"""
    caches: list[str] | None = Field(default=None, examples=[["main"]])
    """caches to look at; default: all that the token covers"""
    snapshot: dict[str, int] = Field(default={}, examples=[{"main": 1}])
    """the snapshot of a cache, by its name; default: the newest"""
    timeout_ms: int | None = Field(default=None, gt=0, lt=2**63, examples=[10_000])
    """how long it may take, to the last byte that is read"""
    max_rows: int | None = Field(default=None, gt=0, examples=[1_000])
    """rows of the answer; what is cut short says so"""
    max_bytes: int | None = Field(default=None, gt=0, examples=[1_000_000])
    """bytes of the answer, as Arrow"""
    csv_safe: bool = False
    """in CSV, keep spreadsheets from taking text for formulas"""


class SqlQuestions:
    """The questions of one service: its pool, who asked what, figures."""

    def __init__(self, pool: SqlPool, registry: CollectorRegistry) -> None:
        self.pool = pool
        self.asked_by: dict[str, str] = {}
        """the principal of each question under way"""
        self.views: list[ViewDocument] = []
        self._ended = Counter("logitlake_sql_queries", "Questions, by how they ended.", ("verdict",), registry=registry)
        self._seconds = Histogram(
            "logitlake_sql_query_seconds", "Time to the end of an answer in SQL.", registry=registry
        )
        workers = Gauge(
            "logitlake_sql_workers", "Processes that answer, by what they do.", ("state",), registry=registry
        )
        workers.labels("ready").set_function(lambda: pool.num_ready)
        workers.labels("busy").set_function(lambda: pool.num_running)

    def begin(self, principal: Principal, request: SqlRequest) -> SqlResult:
        """The answer, once it begins. Raises `QueryError` and its kin."""
        self.asked_by[request.query_id] = principal.id
        try:
            with span("sql.begin", query_id=request.query_id):
                return self.pool.run(request)
        except Exception as error:
            self.end(principal, request, None, problem_of(error).code)
            raise

    @contextmanager
    def asked(self, principal: Principal, request: SqlRequest) -> Iterator[SqlResult]:
        """The answer, to be read within the block. Raises as `begin` does."""
        verdict = "answered"
        with self.begin(principal, request) as result:
            try:
                yield result
            except Exception as error:
                verdict = problem_of(error).code
                raise
            finally:
                self.end(principal, request, result, verdict)

    def answer(self, principal: Principal, request: SqlRequest) -> tuple[pa.Table, SqlResult]:
        """The whole answer, and what is known of it. Raises as `begin` does."""
        with self.asked(principal, request) as result:
            return result.read_all(), result

    def cancel(self, principal: Principal, query_id: str) -> bool:
        """Ends a question of theirs; whether there was one."""
        return self.asked_by.get(query_id) == principal.id and self.pool.cancel(query_id)

    def end(self, principal: Principal, request: SqlRequest, result: SqlResult | None, verdict: str) -> None:
        """Writes down how a question ended."""
        self.asked_by.pop(request.query_id, None)
        self._ended.labels(verdict).inc()
        facts: dict[str, Any] = {
            "query_id": request.query_id,
            "principal": principal.id,
            "sql_sha256": hashlib.sha256(request.sql.encode(errors="replace")).hexdigest(),
            "verdict": verdict,
        }
        if result is not None:
            self._seconds.observe(result.milliseconds / 1000)
            facts |= {"rows": result.rows, "milliseconds": result.milliseconds, "truncated": result.truncated}
        _log.info("a question ended: %s", verdict, extra=facts)


def sql_routes() -> APIRouter:
    """`/v1/sql`, `/v1/schema`."""
    router = APIRouter(prefix="/v1", tags=["sql"])
    content: dict[str, Any] = {format_.media_type: {} for format_ in FORMATS.values()}
    said = "The rows, in the format that `Accept` asks for"
    answer: dict[int | str, dict[str, Any]] = {200: {"description": said, "content": content}}
    router.add_api_route("/sql", _ask, methods=["POST"], response_class=StreamingResponse, responses=answer)
    router.add_api_route("/schema", schema, response_model=list[ViewDocument])
    return router


def questions_of(request: Request) -> SqlQuestions:
    """Those of the service that a request came to."""
    questions: SqlQuestions = request.app.state.questions
    return questions


def request_of(request: Request, asking: Principal, question: Question) -> SqlRequest:
    """What a question is to the pool. Raises `Problem` for a cache that is not theirs."""
    lake: Lake = request.app.state.lake
    caches = caches_asked(lake, asking, question.caches)
    for name in question.snapshot:
        if not (lake.has_cache(name) if caches is None else name in caches):
            raise Problem("not_found", f"snapshot: no cache {name!r} among those that are asked")
    return SqlRequest(
        question.sql,
        caches=caches,
        params=question.params,
        snapshot=question.snapshot,
        timeout_s=None if question.timeout_ms is None else question.timeout_ms / 1000,
        max_rows=question.max_rows,
        max_bytes=question.max_bytes,
    )


def _ask(
    request: Request, asking: Asking, question: Question, accept: Annotated[str, Header(max_length=1000)] = "*/*"
) -> StreamingResponse:
    """Answer one question. `X-Query-Id` names it: `DELETE /v1/queries/{id}` ends it, and so does hanging up."""
    asking.require("read")
    return streamed_answer(request, asking, question, format_of(accept))


def streamed_answer(request: Request, asking: Principal, question: Question, name: str) -> StreamingResponse:
    """The answer in the format `name` (of `FORMATS`), while it is made. Raises as `SqlQuestions.begin` does."""
    asked = request_of(request, asking, question)
    questions = questions_of(request)
    result = questions.begin(asking, asked)
    return StreamingResponse(
        _streamed(questions, asking, asked, result, encode(result, name, csv_safe=question.csv_safe)),
        media_type=FORMATS[name].media_type,
        headers=headers_of(result),
    )


def headers_of(answer: Answer) -> dict[str, str]:
    """What the headers say of an answer."""
    snapshot = ",".join(f"{cache}={number}" for cache, number in sorted(answer.snapshot.items()))
    return {"X-Query-Id": answer.query_id, "X-Snapshot": snapshot}


async def _streamed(
    questions: SqlQuestions, asking: Principal, asked: SqlRequest, result: SqlResult, pieces: Iterator[bytes]
) -> AsyncIterator[bytes]:
    verdict = "interrupted"
    try:
        async for piece in iterate_in_threadpool(pieces):
            yield piece
        verdict = "answered"
    except LogitLakeError as error:
        verdict = problem_of(error).code
        raise  # half the answer is out: the connection breaks, and no format of ours is whole without its end
    finally:
        with CancelScope(shield=True):
            await to_thread.run_sync(result.close)
        questions.end(asking, asked, result, verdict)


def schema(request: Request, asking: Asking) -> list[ViewDocument]:
    """The views that SQL may ask, with their columns."""
    asking.require("read")
    questions = questions_of(request)
    if not questions.views:
        caches = caches_asked(request.app.state.lake, asking, None)
        with questions.pool.run(SqlRequest(_COLUMNS_OF_VIEWS, caches=caches)) as result:
            rows = sorted(result.read_all().to_pylist(), key=itemgetter("number"))
        questions.views = [
            ViewDocument(
                name=view,
                columns=[
                    ColumnDocument(name=row["name"], type=row["type"], doc=COLUMN_DOCS[row["name"]])
                    for row in rows
                    if row["view"] == view
                ],
            )
            for view in RELATIONS
        ]
    return questions.views


def format_of(accept: str) -> str:
    """The format that is accepted best (RFC 9110, 12.5.1): of equals the first that is named, JSON where anything is.

    Raises `Problem` `not_acceptable`.
    """
    accepted: dict[str, tuple[float, int]] = {}
    for place, part in enumerate(accept.lower().split(",")):
        media_range, *parameters = (piece.strip() for piece in part.split(";"))
        found = [quality[1] for text in parameters if (quality := _QUALITY.fullmatch(text))]
        accepted.setdefault(media_range or "*/*", (float(found[0]) if found else 1.0, -place))

    def rank(name: str) -> tuple[float, int]:
        media_type = FORMATS[name].media_type
        ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
        return next((accepted[one] for one in ranges if one in accepted), (0.0, 0))

    best = max(_PREFERRED, key=rank)
    if not rank(best)[0]:
        raise Problem("not_acceptable", f"answers are {', '.join(format_.media_type for format_ in FORMATS.values())}")
    return best


def caches_asked(lake: Lake, asking: Principal, wanted: list[str] | None) -> tuple[str, ...] | None:
    """What is asked of what may be seen; None for all there is. Raises `Problem` `not_found`."""
    if wanted is None and asking.sees_all:
        return None
    for name in wanted or ():
        asking.require("read", name)
        if not lake.has_cache(name):
            raise Problem("not_found", f"no cache {name!r}")
    chosen = tuple(filter(asking.sees, lake.cache_names()) if wanted is None else dict.fromkeys(wanted))
    if not chosen:
        raise Problem("not_found", "no cache that you may ask")
    return chosen
