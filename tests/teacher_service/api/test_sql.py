"""SQL over HTTP: the answers of the lake's own SQL, in every format, of the caches that the token covers."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, get_args

import httpx
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.collector import Collector, collector
from tests.served import served

from logitlake_shared.catalog import open_catalog
from logitlake_shared.catalog.column_docs import COLUMN_DOCS
from logitlake_shared.sql_service.formats import FORMATS
from logitlake_shared.web.problems import Problem
from logitlake_shared.web.tokens import TokenStore
from logitlake_teacher.api.app import teacher_app
from logitlake_teacher.api.pages import FileFormat
from logitlake_teacher.api.sql import format_of
from logitlake_teacher.config.serve import ServeConfig

__all__ = ["collector"]

Teacher = Callable[..., tuple[Any, str]]
GOLDEN = Path(__file__).parents[2] / "golden" / "format-1" / "lake"
QUESTION = "SELECT task, count(*) AS tokens, avg(entropy) AS entropy FROM tokens GROUP BY task ORDER BY task"
# More than a core can do in an hour.
ENDLESS = "SELECT sum(sqrt(a.range * b.range)) FROM range(10000000) a, range(10000000) b"
TIMEOUT_S = 60
READERS: dict[str, Callable[[bytes], pa.Table]] = {
    "application/vnd.apache.arrow.stream": lambda data: pa.ipc.open_stream(data).read_all(),
    "application/vnd.apache.parquet": lambda data: pq.read_table(io.BytesIO(data)),
    "text/csv": lambda data: polars.read_csv(data).to_arrow(),
    "application/x-ndjson": lambda data: pa.Table.from_pylist([json.loads(line) for line in data.splitlines()[:-1]]),
}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a service over the golden lake, which nobody changes."""
    app = teacher_app(ServeConfig(lake=str(GOLDEN)))
    with served(app) as url, httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        yield client


def ask(client: httpx.Client, sql: str, accept: str = "application/json", **more: Any) -> httpx.Response:
    return client.post("/v1/sql", json={"sql": sql, **more}, headers={"accept": accept})


@pytest.mark.parametrize("media_type", READERS)
def test_every_format_holds_the_answer_of_the_lake(client: httpx.Client, media_type: str) -> None:
    with open_catalog(GOLDEN) as catalog:
        expected = catalog.query(QUESTION)
    answer = ask(client, QUESTION, media_type)
    assert answer.headers["content-type"].split(";")[0] == media_type
    assert answer.headers["x-snapshot"] == "draws=2,exact=2,grid=2,pairs=1"
    table = READERS[media_type](answer.content)
    assert table.column_names == expected.column_names
    assert table.column("task").to_pylist() == expected.column("task").to_pylist()
    assert table.column("entropy").to_pylist() == pytest.approx(expected.column("entropy").to_pylist())


def test_parameters_and_snapshots_are_taken(client: httpx.Client) -> None:
    question = "SELECT $x + 1 AS y, (SELECT count(*) FROM caches) AS n"
    assert ask(client, question, params={"x": 41}, snapshot={"grid": 1}).json()["rows"] == [[42, 4]]
    assert ask(client, "SELECT ? AS y", params=["a"]).json()["rows"] == [["a"]]


@pytest.mark.parametrize(
    ("sql", "more", "status", "code"),
    [
        ("COPY (SELECT 1) TO '/tmp/x'", {}, 422, "query_refused"),
        ("SELECT * FROM '/etc/passwd'", {}, 422, "query_refused"),
        ("SELECT * FROM read_text('/etc/passwd')", {}, 422, "query_refused"),
        ("SELECT nothing FROM tokens", {}, 422, "query_failed"),
        ("SELEC 1", {}, 422, "query_failed"),
        (ENDLESS, {"timeout_ms": 300}, 504, "timeout"),
        ("SELECT 1", {"timeout_ms": 10**9}, 422, "query_failed"),
        ("SELECT 1", {"timeout_ms": 10**400}, 422, "invalid_request"),
        ("SELECT 1", {"snapshot": {"grid": 99}}, 404, "not_found"),
        ("SELECT 1", {"snapshot": {"nope": 1}}, 404, "not_found"),
        ("SELECT 1", {"caches": ["grid"], "snapshot": {"nope": 1}}, 404, "not_found"),
        ("SELECT 1", {"caches": ["nope"]}, 404, "not_found"),
        ("SELECT 1", {"caches": []}, 404, "not_found"),
        ("SELECT 1", {"sq": 1}, 422, "invalid_request"),
        ("", {}, 422, "invalid_request"),
    ],
)
def test_what_is_not_answered_is_explained(
    client: httpx.Client, sql: str, more: dict[str, Any], status: int, code: str
) -> None:
    answer = ask(client, sql, **more)
    assert (answer.json()["code"], answer.status_code) == (code, status), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_another_format_is_not_acceptable(client: httpx.Client) -> None:
    assert ask(client, "SELECT 1", "text/html").status_code == 406
    assert ask(client, "SELECT 1", "text/html, */*;q=0.1").status_code == 200


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("text/csv, application/json", "text/csv"),
        ("application/json, text/csv", "application/json"),
        ("application/json;q=0.1, text/csv", "text/csv"),
        ("text/csv;q=0, */*", "application/json"),
        ("*/*;q=0.5, text/csv;q=0.4", "application/json"),
        ("application/json;q=0.000, application/*, text/*;q=0.1", "application/vnd.apache.arrow.stream"),
        ("text/*", "text/csv"),
        ("TEXT/CSV; charset=utf-8; Q=1.0", "text/csv"),
        ("text/csv;q=0", None),
        ("*/*;q=0", None),
        ("image/png, text/html", None),
    ],
)
def test_the_format_is_the_one_that_is_accepted_best(accept: str, expected: str | None) -> None:
    """And one whose quality is 0 is none."""
    if expected is None:
        with pytest.raises(Problem, match="answers are"):
            format_of(accept)
    else:
        assert FORMATS[format_of(accept)].media_type == expected


def test_what_is_cut_short_says_so(client: httpx.Client) -> None:
    answer = ask(client, "SELECT * FROM range(100)", max_rows=7).json()
    assert (len(answer["rows"]), answer["truncated"]) == (7, "rows")


def test_a_token_asks_its_caches_alone(teacher: Teacher, tokens: TokenStore) -> None:
    """In every view; and another cache cannot be named."""
    text, _ = tokens.create("main", "read", ("main",))
    with httpx.Client(base_url=teacher()[1], headers={"authorization": f"Bearer {text}"}, timeout=TIMEOUT_S) as client:
        question = " UNION ALL ".join(
            f"SELECT DISTINCT '{view}' AS view, cache FROM {view}"
            for view in ("samples", "tokens", "topk", "pairs", "images", "sample_index", "shards", "caches", "errors")
        )
        assert {cache for _, cache in ask(client, question).json()["rows"]} == {"main"}
        for asked in ({"caches": ["pairs"]}, {"caches": ["main", "pairs"]}):
            assert ask(client, "SELECT 1", **asked).status_code == 404
        named = ask(client, "SELECT 1", snapshot={"pairs": 1})
        assert named.status_code >= 400


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def endless(teacher: Teacher, tokens: TokenStore) -> Iterator[tuple[Any, str, str, list[httpx.Response]]]:
    """A question that does not end, by a token of its own: the application, address, token, and what it is answered."""
    app, url = teacher()
    text, _ = tokens.create("patient", "read")
    answers: list[httpx.Response] = []
    headers = {"authorization": f"Bearer {text}"}
    body = {"sql": ENDLESS, "timeout_ms": 50_000}
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/sql", json=body, headers=headers, timeout=TIMEOUT_S))
    )
    thread.start()
    until(lambda: app.state.questions.pool.num_running == 1)
    yield app, url, text, answers
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_a_question_is_cancelled_by_whoever_asked_it(endless: Any, tokens: TokenStore) -> None:
    app, url, text, answers = endless
    (query_id,) = app.state.questions.asked_by
    stranger, _ = tokens.create("stranger", "admin")
    path = f"{url}/v1/queries/{query_id}"
    assert httpx.delete(path, headers={"authorization": f"Bearer {stranger}"}).status_code == 404
    assert httpx.delete(path, headers={"authorization": f"Bearer {text}"}).status_code == 204
    until(lambda: bool(answers))
    assert answers[0].json()["code"] == "query_cancelled"
    assert httpx.delete(path, headers={"authorization": f"Bearer {text}"}).status_code == 404
    assert not app.state.questions.asked_by


def test_workers_are_counted_by_what_they_do(endless: Any) -> None:
    """One that answers is busy until its question ends; with none kept warm, none is ready then."""
    app, url, text, _ = endless
    headers = {"authorization": f"Bearer {text}"}

    def counted(state: str) -> str:
        lines = httpx.get(f"{url}/metrics", headers=headers).text.splitlines()
        return next(line for line in lines if line.startswith(f'logitlake_sql_workers{{state="{state}"}}'))

    assert counted("busy").endswith(" 1.0")
    (query_id,) = app.state.questions.asked_by
    httpx.delete(f"{url}/v1/queries/{query_id}", headers=headers)
    until(lambda: counted("busy").endswith(" 0.0"))
    assert counted("ready").endswith(" 0.0")


def test_whoever_hangs_up_ends_the_question(teacher: Teacher) -> None:
    """After the first bytes of an answer that has no end; nobody waits for its deadline."""
    app, url = teacher()
    body = {
        "sql": "SELECT range, repeat('x', 1000) AS x FROM range(100000000)",
        "timeout_ms": 50_000,
        "max_rows": 10**6,
    }
    body["max_bytes"] = 2**28
    with httpx.stream("POST", f"{url}/v1/sql", json=body, timeout=TIMEOUT_S) as answer:
        next(answer.iter_bytes())
        assert app.state.questions.pool.num_running == 1
    until(lambda: app.state.questions.pool.num_running == 0)
    until(lambda: not app.state.questions.asked_by)


def test_a_page_whose_answer_breaks_off_leaves_no_question(teacher: Teacher) -> None:
    """An error after the answer began: it is shown, and nothing is under way any longer."""
    app, url = teacher()
    sql = "SELECT max(CASE WHEN range < 100000 THEN '1' ELSE 'broken' END::INT) FROM range(200000)"
    page = httpx.get(f"{url}/sql", params={"sql": sql}, timeout=TIMEOUT_S)
    assert page.status_code == 200
    assert "Could not convert string" in page.text
    assert app.state.questions.asked_by == {}


def test_a_page_has_the_whole_answer_as_a_file(client: httpx.Client) -> None:
    """All rows, though it shows 200; safe in a spreadsheet; what cannot be answered is a problem, and no file."""
    sql = "SELECT range AS n, '=1+1' AS text FROM range(300)"
    for name in get_args(FileFormat):
        assert escape(f"&format={name}") in client.get("/sql", params={"sql": sql}).text
        answer = client.get("/sql/answer", params={"sql": sql, "format": name})
        assert answer.headers["content-disposition"] == f'attachment; filename="answer.{name}"'
        assert answer.headers["content-type"].startswith(FORMATS[name].media_type)
    assert client.get("/sql/answer", params={"sql": sql, "format": "csv"}).text.splitlines()[-1] == "299,'=1+1"
    refused = client.get("/sql/answer", params={"sql": "DROP TABLE x", "format": "csv"})
    assert (refused.status_code, refused.json()["code"]) == (422, "query_refused")
    assert "content-disposition" not in refused.headers
    assert client.get("/sql/answer", params={"sql": sql, "format": "exe"}).status_code == 422


def test_how_questions_end_is_counted(client: httpx.Client) -> None:
    def counts() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        named = (line.rpartition(" ") for line in lines if line.startswith("logitlake_sql_queries_total"))
        return {name: float(count) for name, _, count in named}

    before = counts()
    ask(client, "SELECT 1")
    ask(client, "DROP TABLE x")
    after = counts()
    for verdict in ("answered", "query_refused"):
        name = f'logitlake_sql_queries_total{{verdict="{verdict}"}}'
        assert after[name] == before.get(name, 0) + 1


def test_the_schema_names_every_view_and_its_columns(client: httpx.Client) -> None:
    views = {view["name"]: view["columns"] for view in client.get("/v1/schema").json()}
    assert list(views) == ["samples", "tokens", "topk", "pairs", "images", "sample_index", "shards", "caches", "errors"]
    described = ask(client, "DESCRIBE tokens").json()
    assert [column["name"] for column in views["tokens"]] == [row[0] for row in described["rows"]]
    named = {column["name"] for columns in views.values() for column in columns}
    assert named == set(COLUMN_DOCS)  # each is explained, and no explanation is of a column that went


def test_a_question_is_a_span_below_its_request(collector: Collector, teacher: Teacher) -> None:
    """How long it took to begin; its text is nowhere."""
    _, url = teacher(traces=True)
    answer = httpx.post(f"{url}/v1/sql", json={"sql": "SELECT 'canary'"}, timeout=TIMEOUT_S)
    request, begun = collector.wait(2)
    assert (request.name, begun.name) == ("POST /v1/sql", "sql.begin")
    assert begun.parent_span_id == request.span_id
    assert [one.value.string_value for one in begun.attributes] == [answer.headers["x-query-id"]]
    assert request.start_time_unix_nano <= begun.start_time_unix_nano
    assert begun.end_time_unix_nano <= request.end_time_unix_nano
    assert not any(b"canary" in one.SerializeToString() for one in (request, begun))
