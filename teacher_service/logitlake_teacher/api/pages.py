"""The pages at `/`: caches, one cache, one sample, SQL. Made on the server; the API answers the same.

What is coloured in a sample is the teacher's surprise at each token of the response, in nats; each token leads to its
row, which says what the teacher would have said instead. A student that was scored on the cache stands beside it.
"""

from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse

from logitlake_shared.errors import LogitLakeError
from logitlake_shared.lake import Cache
from logitlake_shared.sql_service import SqlRequest
from logitlake_shared.sql_service.grammar import RELATIONS
from logitlake_shared.web.app import service_of
from logitlake_shared.web.doors import Asking
from logitlake_shared.web.html import render
from logitlake_shared.web.problems import Problem, problem_of, scrubbed
from logitlake_teacher.api.caches import CacheOf, SampleId, StudentName, cache_document, image_url, lake_of, viewed
from logitlake_teacher.api.sql import caches_asked, questions_of

__all__ = ["page_routes"]

_PACKAGE = "logitlake_teacher.api"
_SAMPLES = 50
_TOP = 8
_ROWS = 200
_CELL = 300
# Nats from which a token is coloured one step stronger.
_SURPRISES = (0.1, 0.5, 1.0, 2.0, 4.0)

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
    """`/`, `/caches/…`, `/sql`."""
    router = APIRouter(include_in_schema=False)
    router.add_api_route("/", _overview, response_class=HTMLResponse)
    router.add_api_route("/caches/{cache}", _cache, response_class=HTMLResponse)
    router.add_api_route("/caches/{cache}/samples/{sample_id:path}", _sample, response_class=HTMLResponse)
    router.add_api_route("/sql", _sql, response_class=HTMLResponse)
    return router


def _page(request: Request, template: str, **values: Any) -> HTMLResponse:
    return render(request, template, package=_PACKAGE, **values)


def _overview(request: Request, asking: Asking) -> HTMLResponse:
    asking.require("read")
    lake = lake_of(request)
    caches = [cache_document(lake.cache(name)) for name in lake.cache_names() if asking.sees(name)]
    return _page(request, "overview", caches=caches, problems=service_of(request).problems())


def _cache(request: Request, cache: CacheOf, after: Annotated[str, Query(max_length=4096)] = "") -> HTMLResponse:
    tasks = samples = errors = []
    document = cache_document(cache)
    if document.snapshot is not None:
        tasks = _rows(
            request,
            cache,
            "SELECT task, split, count(*) AS samples, sum(num_tokens)::BIGINT AS tokens FROM sample_index "
            "GROUP BY ALL ORDER BY task, split",
        )
        samples = _rows(
            request,
            cache,
            "SELECT sample_id, task, split, num_tokens FROM sample_index WHERE sample_id > ? ORDER BY sample_id "
            f"LIMIT {_SAMPLES + 1}",
            after,
        )
        errors = _rows(
            request,
            cache,
            "SELECT code, count(*) AS samples, min(sample_id) AS example, min(message) AS says FROM errors "
            "GROUP BY code ORDER BY samples DESC",
        )
    shown = samples[:_SAMPLES]
    next_after = shown[-1]["sample_id"] if len(samples) > _SAMPLES else None
    return _page(
        request,
        "cache",
        cache=document,
        tasks=tasks,
        samples=[sample | {"url": _sample_url(cache, sample["sample_id"])} for sample in shown],
        errors=errors,
        after=after,
        next_url=None if next_after is None else f"/caches/{cache.name}?after={quote(next_after, safe='')}",
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
        step=_step,
        steps=["below 0.1", "0.1", "0.5", "1", "2", "4 and more"],
    )


def _sql(request: Request, asking: Asking, sql: Annotated[str, Query(max_length=65536)] = "") -> HTMLResponse:
    asking.require("read")
    columns: list[str] = []
    rows: list[list[str]] = []
    said = problem = ""
    if sql.strip():
        questions = questions_of(request)
        try:
            asked = SqlRequest(sql, caches=caches_asked(lake_of(request), asking, None), max_rows=_ROWS)
            table, result = questions.answer(asking, asked)
            columns = table.schema.names
            rows = [
                [_cell(value) for value in row] for row in zip(*(c.to_pylist() for c in table.columns), strict=True)
            ]
            cut = f", the first {_ROWS}" if result.truncated else ""
            said = f"{len(rows)} row{'' if len(rows) == 1 else 's'}{cut} in {result.milliseconds:.0f} ms"
        except (LogitLakeError, Problem) as error:
            problem = scrubbed(problem_of(error).detail)
    return _page(
        request,
        "sql",
        sql=sql,
        columns=columns,
        rows=rows,
        said=said,
        problem=problem,
        examples=_EXAMPLES.items(),
        views=RELATIONS,
    )


def _rows(request: Request, cache: Cache, sql: str, *params: str) -> list[dict[str, Any]]:
    with questions_of(request).pool.run(SqlRequest(sql, caches=(cache.name,), params=params)) as result:
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
