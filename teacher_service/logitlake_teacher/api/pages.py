"""The pages at `/`: caches, one cache, one sample, SQL. Made on the server; the API answers the same.

What is coloured in a sample is the teacher's surprise at each token of the response, in nats; each token leads to its
row, which says what the teacher would have said instead. A student that was scored on the cache stands beside it.
"""

from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse, StreamingResponse

from logitlake_shared.errors import LogitLakeError
from logitlake_shared.lake import Cache
from logitlake_shared.sql_service import SqlRequest
from logitlake_shared.tools.token_text import token_name
from logitlake_shared.web.app import service_of
from logitlake_shared.web.doors import Asking, Principal
from logitlake_shared.web.html import render
from logitlake_shared.web.problems import Problem, problem_of, scrubbed
from logitlake_teacher.api.caches import CacheOf, cache_document, lake_of
from logitlake_teacher.api.documents import ViewDocument
from logitlake_teacher.api.samples import Of, SampleId, StudentName, image_url, samples_after, viewed
from logitlake_teacher.api.sql import Question, caches_asked, questions_of, schema, streamed_answer

__all__ = ["FileFormat", "page_routes"]

_PACKAGE = "logitlake_teacher.api"
_SAMPLES = 50
_TOP = 8
_ROWS = 200
_CELL = 300
# Nats from which a token is coloured one step stronger.
_SURPRISES = (0.1, 0.5, 1.0, 2.0, 4.0)

FileFormat = Literal["csv", "parquet", "arrow"]
Sql = Annotated[str, Query(max_length=65536)]

_EXAMPLES = {
    "Where does the teacher disagree with the data?": (
        "SELECT cache, sample_id, task, avg(label_logprob) AS mean_logprob, max(label_rank) AS worst_rank\n"
        "FROM tokens GROUP BY ALL ORDER BY mean_logprob LIMIT 20"
    ),
    "How often is the response its own first choice?": (
        "SELECT cache, task, avg((label_rank = 1)::INT) AS first, exp(-avg(label_logprob)) AS perplexity\n"
        "FROM tokens GROUP BY ALL ORDER BY perplexity DESC"
    ),
    "How much of its probability is stored?": (
        "SELECT cache, task, 1 - avg(exp(log_tail_mass)) AS cached_mass, avg(k) AS mean_k\n"
        "FROM tokens GROUP BY ALL ORDER BY cached_mass"
    ),
    "What could not be captured?": (
        "SELECT cache, code, count(*) AS samples, min(message) AS says FROM errors GROUP BY ALL ORDER BY samples DESC"
    ),
}


def page_routes() -> APIRouter:
    """`/`, `/caches/…`, `/sql`, `/sql/answer`."""
    router = APIRouter(include_in_schema=False)
    router.add_api_route("/", _overview, response_class=HTMLResponse)
    router.add_api_route("/caches/{cache}", _cache, response_class=HTMLResponse)
    router.add_api_route("/caches/{cache}/samples/{sample_id:path}", _sample, response_class=HTMLResponse)
    router.add_api_route("/sql", _sql, response_class=HTMLResponse)
    router.add_api_route("/sql/answer", _whole_answer, response_class=StreamingResponse)
    return router


def _page(request: Request, template: str, **values: Any) -> HTMLResponse:
    return render(request, template, package=_PACKAGE, **values)


def _overview(request: Request, asking: Asking) -> HTMLResponse:
    asking.require("read")
    lake = lake_of(request)
    caches = [cache_document(lake.cache(name)) for name in lake.cache_names() if asking.sees(name)]
    return _page(request, "overview", caches=caches, problems=service_of(request).problems())


def _cache(
    request: Request,
    cache: CacheOf,
    task: Of = None,
    split: Of = None,
    after: Annotated[str, Query(max_length=4096)] = "",
) -> HTMLResponse:
    tasks = errors = []
    document = cache_document(cache)
    if document.snapshot is not None:
        tasks = _rows(
            request,
            cache,
            "SELECT task, split, count(*) AS samples, sum(num_tokens)::BIGINT AS tokens FROM sample_index "
            "GROUP BY ALL ORDER BY task, split",
        )
        errors = _rows(
            request,
            cache,
            "SELECT code, count(*) AS samples, min(sample_id) AS example, min(message) AS says FROM errors "
            "GROUP BY code ORDER BY samples DESC",
        )
    samples = samples_after(request, cache, after, _SAMPLES + 1, task, split)
    shown = samples[:_SAMPLES]
    chosen = {name: value for name, value in (("task", task), ("split", split)) if value is not None}
    here = f"/caches/{cache.name}"
    has_more = len(samples) > _SAMPLES
    return _page(
        request,
        "cache",
        cache=document,
        tasks=[row | {"url": f"{here}?{urlencode({name: row[name] for name in ('task', 'split')})}"} for row in tasks],
        samples=[(sample, _sample_url(cache, sample.id)) for sample in shown],
        errors=errors,
        after=after,
        chosen=chosen,
        all_url=here,
        next_url=f"{here}?{urlencode(chosen | {'after': shown[-1].id})}" if has_more else None,
    )


def _sample(request: Request, cache: CacheOf, sample_id: SampleId, student: StudentName = None) -> HTMLResponse:
    view, students = viewed(request, cache, sample_id, _TOP, student)
    here = _sample_url(cache, sample_id)
    return _page(
        request,
        "sample",
        view=view,
        images=[(image, image_url(cache, image.sha256, sample_id)) for image in view.images],
        students=[(name, f"{here}?{urlencode({'student': name})}") for name in students],
        alone_url=here,
        name_of=token_name,
        step=_step,
        steps=["below 0.1", "0.1", "0.5", "1", "2", "4 and more"],
    )


def _sql(request: Request, asking: Asking, sql: Sql = "") -> HTMLResponse:
    asking.require("read")
    views: list[ViewDocument] = []
    answer: dict[str, Any] = {}
    problem = ""
    try:
        views = schema(request, asking)
        if sql.strip():
            answer = _answer(request, asking, sql)
    except (LogitLakeError, Problem) as error:
        problem = scrubbed(problem_of(error).detail)
    files = [(name, f"/sql/answer?{urlencode({'sql': sql, 'format': name})}") for name in get_args(FileFormat)]
    return _page(
        request,
        "sql",
        sql=sql,
        views=views,
        answer=answer,
        problem=problem,
        files=files,
        examples=_EXAMPLES.items(),
    )


def _whole_answer(
    request: Request, asking: Asking, sql: Sql, name: Annotated[FileFormat, Query(alias="format")]
) -> StreamingResponse:
    """As a file, not cut to what a page shows."""
    asking.require("read")
    answer = streamed_answer(request, asking, Question(sql=sql, csv_safe=True), name)
    answer.headers["Content-Disposition"] = f'attachment; filename="answer.{name}"'
    return answer


def _answer(request: Request, asking: Principal, sql: str) -> dict[str, Any]:
    asked = SqlRequest(sql, caches=caches_asked(lake_of(request), asking, None), max_rows=_ROWS)
    table, result = questions_of(request).answer(asking, asked)
    rows = [[_cell(value) for value in row] for row in zip(*(c.to_pylist() for c in table.columns), strict=True)]
    cut = f", the first {_ROWS}" if result.truncated else ""
    said = f"{len(rows)} row{'' if len(rows) == 1 else 's'}{cut} in {result.milliseconds:.0f} ms"
    return {"columns": table.schema.names, "rows": rows, "said": said}


def _rows(request: Request, cache: Cache, sql: str) -> list[dict[str, Any]]:
    with questions_of(request).pool.run(SqlRequest(sql, caches=(cache.name,))) as result:
        rows: list[dict[str, Any]] = result.read_all().to_pylist()
    return rows


def _sample_url(cache: Cache, sample_id: str) -> str:
    return f"/caches/{cache.name}/samples/{quote(sample_id)}"


def _step(nats: float) -> str:
    """The class of a colour."""
    return f"s{sum(nats >= least for least in _SURPRISES)}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "NULL" if value is None else str(value)
    return text if len(text) <= _CELL else f"{text[:_CELL]}…"
