"""`logitlake.Client` against a real service: what it gives is what the lake gives, and nothing less looks like it."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tests.served import served
from tests.shared.conftest import small_lake
from tests.teacher_service.api.conftest import Api, api, capture, teacher, tokens
from tests.teacher_service.conftest import teacher_world

import logitlake
from logitlake_shared.catalog import open_catalog
from logitlake_shared.errors import ConfigError, LakeError, ServiceError
from logitlake_shared.reader import LakeDataset
from logitlake_shared.web.tokens import TokenStore

__all__ = ["api", "capture", "small_lake", "teacher", "teacher_world", "tokens"]

QUESTION = "SELECT task, count(*) AS tokens, avg(entropy) AS entropy FROM tokens GROUP BY task ORDER BY task"


@pytest.fixture
def client(teacher: Callable[..., tuple[Any, str]]) -> Iterator[logitlake.Client]:
    """A client of the service over the small lake."""
    with logitlake.Client(teacher()[1], patience_s=5) as made:
        yield made


# ---- SQL ----


def test_an_answer_is_the_lakes_own_in_every_shape(client: logitlake.Client, small_lake: Path) -> None:
    """Arrow, pandas, polars, dicts, batch by batch."""
    with open_catalog(small_lake) as catalog:
        expected = catalog.query(QUESTION)
    assert client.sql(QUESTION).arrow().equals(expected)
    assert client.sql(QUESTION).polars().to_dicts() == expected.to_pylist()
    assert client.sql(QUESTION).pandas().to_dict("records") == expected.to_pylist()
    assert client.sql(QUESTION).rows() == expected.to_pylist()
    with client.sql("SELECT range AS n FROM range(9000)") as answer:
        assert [value for batch in answer for value in batch.column("n").to_pylist()] == list(range(9000))
        assert (answer.truncated, answer.milliseconds is not None) == (None, True)
        assert answer.snapshot == {name["name"]: name["snapshot"] for name in client.caches()}


def test_parameters_limits_and_what_was_cut_short(client: logitlake.Client) -> None:
    """A cut answer says by which limit."""
    assert client.sql("SELECT ?::INT + ?::INT AS n", [1, 2]).rows() == [{"n": 3}]
    assert client.sql("SELECT $a AS a", {"a": "x"}).rows() == [{"a": "x"}]
    answer = client.sql("SELECT * FROM range(100)", max_rows=10)
    assert answer.arrow().num_rows == 10
    assert answer.truncated == "rows"


@pytest.mark.parametrize(
    ("sql", "code"),
    [
        ("DROP TABLE tokens", "query_refused"),
        ("SELECT nope FROM tokens", "query_failed"),
        ("SELECT sum(sqrt(a.range * b.range)) FROM range(10000000) a, range(10000000) b", "timeout"),
    ],
)
def test_a_problem_is_an_error_with_its_code(client: logitlake.Client, sql: str, code: str) -> None:
    """And the id under which the service's log has it."""
    with pytest.raises(ServiceError) as caught:
        client.sql(sql, timeout_s=0.5 if code == "timeout" else 60).arrow()
    assert caught.value.code == code
    assert caught.value.request_id in str(caught.value)


def test_an_answer_that_breaks_off_is_no_table(client: logitlake.Client) -> None:
    """The question fails when half of its answer is out."""
    sql = "SELECT max(CASE WHEN range < 100000 THEN '1' ELSE 'broken' END::INT) OVER () AS n FROM range(200000)"
    with pytest.raises(ServiceError):
        client.sql(sql, max_rows=200_000).arrow()


def test_a_long_answer_comes_whole_in_pieces(client: logitlake.Client) -> None:
    """Of many batches and messages larger than a read."""
    answer = client.sql("SELECT range AS n, repeat('x', 50) AS s FROM range(100000)", max_rows=100_000, max_bytes=2**24)
    table = answer.arrow()
    assert (table.num_rows, answer.truncated) == (100_000, None)
    assert table.column("n").to_pylist() == list(range(100_000))


def test_a_stream_without_its_end_is_an_error() -> None:
    """Cut at any byte, by a service that says nothing of it."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    schema = pa.schema([("n", pa.int64())], {"logitlake.query_id": "q", "logitlake.snapshot": "{}"})
    with pa.ipc.new_stream(sink, schema) as writer:
        for start in range(3):
            writer.write_batch(pa.record_batch([pa.array(range(start, start + 100))], schema=schema))
    whole = sink.getvalue().to_pybytes()
    cut = [0]

    async def answer(request: Request) -> Response:
        return StreamingResponse(iter([whole[: cut[0]]]))

    app = Starlette(routes=[Route("/v1/sql", answer, methods=["POST"])])
    with served(app) as url, logitlake.Client(url, patience_s=1) as client:
        for cut[0] in range(0, len(whole) + 1, 97):
            with pytest.raises(ServiceError, match="broke off"):
                client.sql("SELECT 1").arrow()


def test_an_answer_is_read_once_and_leaving_it_ends_the_question(client: logitlake.Client) -> None:
    """A second reading is refused in so many words; a loop that is left, without `with`, leaves no question behind."""
    answer = client.sql("SELECT 1 AS n")
    assert answer.rows() == [{"n": 1}]
    with pytest.raises(ServiceError, match="was read") as caught:
        answer.arrow()
    assert caught.value.code == "answered"
    left = client.sql("SELECT range AS n, repeat('x', 100) AS s FROM range(900000)", max_rows=900_000, max_bytes=2**27)
    for _ in left:
        break
    with pytest.raises(ServiceError, match="closed"):
        left.rows()


def test_fewer_rows_than_the_end_says_are_no_answer() -> None:
    """A batch that somebody took out on the way."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    schema = pa.schema([("n", pa.int64())], {"logitlake.query_id": "q", "logitlake.snapshot": "{}"})
    end = {"logitlake.num_rows": "2", "logitlake.truncated": "", "logitlake.milliseconds": "1"}
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([1])], schema=schema))
        writer.write_batch(pa.record_batch([pa.array([], pa.int64())], schema=schema), custom_metadata=end)

    def answer(request: Request) -> Response:
        return Response(sink.getvalue().to_pybytes())

    app = Starlette(routes=[Route("/v1/sql", answer, methods=["POST"])])
    with (
        served(app) as url,
        logitlake.Client(url, patience_s=1) as client,
        pytest.raises(ServiceError, match="1 rows of 2"),
    ):
        client.sql("SELECT 1").arrow()


# ---- the rest of the API ----


def test_the_lake_is_there_in_documents_and_as_itself(client: logitlake.Client, small_lake: Path) -> None:
    """Caches, files, samples, images, schema; and as a lake for whatever reads one."""
    names = [cache["name"] for cache in client.caches()]
    assert "main" in names
    files = list(client.files("main", client.cache("main")["snapshot"]))
    assert all((small_lake / file["path"]).stat().st_size == file["bytes"] for file in files)
    sample_id = LakeDataset(small_lake, "main").ids()[0]
    sample = client.sample("main", sample_id)
    assert sample["id"] == sample_id
    for image in sample["images"]:
        assert client.image("main", sample_id, image["sha256"])
    assert {"tokens", "samples"} <= {view["name"] for view in client.schema()}
    assert list(client.errors("main")) == list(client.errors("main", code=None))
    assert client.lake().cache_names() == names
    with pytest.raises(ServiceError) as caught:
        client.cache("../x")
    assert caught.value.code == "not_found"


def test_a_job_is_submitted_followed_and_read(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """Events by both roads, logs, orders; a job that fails is an error for who waits."""
    with logitlake.Client(str(api().base_url)) as client:
        sent = capture("main")
        plan = client.jobs.plan("capture", sent["config"], wait_s=60)
        job = client.jobs.submit("capture", sent["config"], name="n", labels={"a": "b"}, key="k")
        assert client.jobs.submit("capture", sent["config"], name="n", labels={"a": "b"}, key="k")["id"] == job["id"]
        done = client.jobs.wait(job["id"])
        assert done["counts"]["succeeded"] == plan["result"]["figures"]["items"]
        assert list(client.jobs.events(job["id"])) == list(client.jobs.stream(job["id"]))
        assert "samples" in client.jobs.logs(job["id"])
        assert [one["id"] for one in client.jobs.all(label="a:b")] == [job["id"]]
        edited = client.jobs.edit(job["id"], name="m", labels={"c": "d"}, tag=done["tag"])
        assert (edited["name"], edited["labels"]) == ("m", {"c": "d"})
        assert client.jobs.edit(job["id"], labels={})["name"] == "m"
        with pytest.raises(ServiceError) as caught:
            client.jobs.edit(job["id"], name="x", tag=done["tag"])
        assert caught.value.code == "precondition_failed"
        with pytest.raises(ServiceError) as caught:
            client.jobs.cancel(job["id"])
        assert caught.value.code == "conflict"
        broken = capture("broken")["config"]
        broken["data"][0]["path"] += ".absent"
        with pytest.raises(ServiceError, match="DataError"):
            client.jobs.wait(client.jobs.submit("capture", broken)["id"])


# ---- doors and weather ----


def test_a_token_opens_and_never_goes_unencrypted_to_another_machine(
    teacher: Callable[..., tuple[Any, str]], tokens: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the argument or the environment."""
    text, _ = tokens.create("ada", "read")
    url = teacher()[1]
    with logitlake.Client(url) as client, pytest.raises(ServiceError) as caught:
        client.cache("main")
    assert caught.value.code == "unauthenticated"
    with logitlake.Client(url, text) as client:
        assert client.cache("main")["name"] == "main"
        assert client.lake().cache_names()
    monkeypatch.setenv("LOGITLAKE_TOKEN", text)
    with logitlake.Client(url) as client:
        assert client.cache("main")["name"] == "main"
    for address in ("http://lake.example.org", "http://10.0.0.1:8321"):
        with pytest.raises(LakeError, match="unencrypted"):
            logitlake.Client(address)
    with pytest.raises(ConfigError, match="http"):
        logitlake.Client("lake.example.org")


def test_a_busy_service_is_asked_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """429 and 503 as `Retry-After` says; what may have happened already is not sent twice."""
    asked: list[str] = []

    def answer(request: Request) -> Response:
        asked.append(request.method)
        if len(asked) < 3:
            problem = {"title": "busy", "detail": "d", "hint": "h", "code": "too_many_requests", "retryable": True}
            return JSONResponse(problem, 429, {"Retry-After": "0"})
        if request.method == "POST":
            problem = {"title": "t", "detail": "d", "hint": "h", "code": "upstream_failed", "retryable": True}
            return JSONResponse(problem, 502)
        return JSONResponse({"name": "main"})

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    with served(app) as url, logitlake.Client(url, patience_s=5) as client:
        assert client.cache("main") == {"name": "main"}
        assert asked == ["GET"] * 3
        with pytest.raises(ServiceError) as caught:
            client.jobs.pause("job_1")
        assert caught.value.code == "upstream_failed"
        assert asked[3:] == ["POST"]


@pytest.mark.parametrize(
    "answer",
    [
        Response("<h1>Welcome</h1>", 200, media_type="text/html"),
        Response("", 307, {"Location": "http://127.0.0.1:9/elsewhere"}),
        Response("<h1>Bad gateway</h1>", 418, media_type="text/html"),
        JSONResponse(["not", "a", "problem"], 400),
    ],
    ids=["a page", "a redirect", "a page of an error", "another error"],
)
def test_what_is_no_answer_of_a_service_is_an_error_of_the_tree(answer: Response) -> None:
    """A proxy, or another program: said, not followed, and no token goes anywhere else."""
    app = Starlette(routes=[Route("/{path:path}", lambda _: answer, methods=["GET", "POST"])])
    with served(app) as url, logitlake.Client(url, patience_s=1) as client:
        with pytest.raises(ServiceError, match="no answer of a LogitLake service"):
            client.cache("main")
        with pytest.raises(ServiceError):
            client.sql("SELECT 1").arrow()


def test_a_document_of_another_program_is_an_error_of_the_tree() -> None:
    """JSON that is no list, Arrow that is no answer to a question."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("a", pa.int64())])):
        pass
    arrow = Response(sink.getvalue().to_pybytes())
    routes = [Route("/v1/sql", lambda _: arrow, methods=["POST"]), Route("/{path:path}", lambda _: JSONResponse([{}]))]
    with served(Starlette(routes=routes)) as url, logitlake.Client(url, patience_s=1) as client:
        for ask in (lambda: list(client.caches()), lambda: client.sql("SELECT 1")):
            with pytest.raises(ServiceError, match="LogitLake service"):
                ask()


@pytest.mark.parametrize("job", ["../../login?x#y", "a/b", "a b", "%2e%2e", "é"])
def test_the_id_of_a_job_is_one_part_of_a_path(job: str) -> None:
    """Whatever somebody takes for an id, nothing else is asked for with it, and nothing else is ordered."""
    asked: list[tuple[str, str]] = []

    def answer(request: Request) -> Response:
        asked.append((request.url.query, request.scope["raw_path"].decode()))
        return JSONResponse({})

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST", "PATCH"])])
    with served(app) as url, logitlake.Client(url) as client:
        client.jobs.get(job)
        client.jobs.edit(job, name="x")
        client.jobs.logs(job)
        client.jobs.cancel(job)
    here = f"/v1/jobs/{quote(job, safe='')}"
    assert asked == [("", here), ("", here), ("tail=200", f"{here}/logs"), ("", f"{here}/cancel")]


@pytest.mark.parametrize("address", ["http://ada:s3cret@127.0.0.1:9", "https://s3cret@lake.example.org", "http://[x"])
def test_an_address_that_is_none_or_tells_a_secret_is_refused(address: str) -> None:
    """It would be in every message of an error."""
    with pytest.raises(ConfigError, match="address of a service") as refused:
        logitlake.Client(address)
    assert "s3cret" not in str(refused.value)


def test_a_question_to_a_busy_service_is_asked_again() -> None:
    """A date is a `Retry-After`, too; what is none is as if it were not there."""
    waits = ["Thu, 01 Jan 2026 00:00:00 GMT", "soon", "0"]
    asked: list[str] = []

    def answer(request: Request) -> Response:
        asked.append(request.url.path)
        if len(asked) <= len(waits):
            problem = {"title": "busy", "detail": "d", "hint": "h", "code": "too_many_requests", "retryable": True}
            return JSONResponse(problem, 429, {"Retry-After": waits[len(asked) - 1]})
        return JSONResponse({"title": "t", "detail": "d", "hint": "h", "code": "query_refused"}, 422)

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    with served(app) as url, logitlake.Client(url, patience_s=5) as busy, pytest.raises(ServiceError) as caught:
        busy.sql("SELECT 1").arrow()
    assert caught.value.code == "query_refused"
    assert len(asked) == len(waits) + 1


def test_a_list_that_does_not_go_on_is_an_error() -> None:
    """And not read for ever."""

    def answer(request: Request) -> Response:
        return JSONResponse({"data": [{}], "next_cursor": "same", "has_more": True})

    app = Starlette(routes=[Route("/{path:path}", answer)])
    with served(app) as url, logitlake.Client(url) as client, pytest.raises(ServiceError, match="does not go on"):
        list(client.caches())


def test_no_proxy_of_the_environment_is_asked_for_this_machine(
    teacher: Callable[..., tuple[Any, str]], tokens: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for documents nor for the lake's files: it would see the token."""
    text, _ = tokens.create("ada", "read")
    url = teacher()[1]
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with logitlake.Client(url, text, patience_s=1, timeout_s=10) as client:
            assert client.cache("main")["name"] == "main"
            assert "main" in client.lake().cache_names()
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_an_empty_token_is_none(
    teacher: Callable[..., tuple[Any, str]], tokens: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the environment."""
    monkeypatch.setenv("LOGITLAKE_TOKEN", tokens.create("ada", "read")[0])
    with logitlake.Client(teacher()[1], "") as client, pytest.raises(ServiceError) as caught:
        client.cache("main")
    assert caught.value.code == "unauthenticated"


def test_nobody_there_is_said_within_the_patience() -> None:
    """With the address."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with logitlake.Client(address, patience_s=0.3) as client, pytest.raises(ServiceError, match=address) as caught:
        client.cache("main")
    assert caught.value.code == "unreachable"
