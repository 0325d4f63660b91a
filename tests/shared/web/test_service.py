"""What stands around every answer: doors, limits, ids, headers, problems, logs."""

import io
import json
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.shared.web.conftest import CANARY

from logitlake_shared.errors import ConfigError
from logitlake_shared.web.doors import check_listening
from logitlake_shared.web.logs import JsonFormatter
from logitlake_shared.web.problems import CODES, Problem, problem_of, scrubbed
from logitlake_shared.web.tokens import TokenStore

ROOT = Path(__file__).parents[3]
Service = Callable[..., tuple[Any, str]]
WAIT_S = 30


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What is logged while a test runs, as it would be on standard error."""
    stream, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(stream), root.level
    handler.setFormatter(JsonFormatter())
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


# ---- problems ----


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("QueryError", "query_failed"),
        ("FingerprintMismatchError", "fingerprint_mismatch"),
        ("LakeConflictError", "conflict"),
        ("LakeCorruptError", "lake_corrupt"),
        ("LakeFormatError", "lake_unusable"),
        ("LakeError", "lake_unusable"),
        ("ScoresError", "scores_corrupt"),
        ("RunFilesError", "run_corrupt"),
        ("ConfigError", "config_invalid"),
        ("DataError", "data_invalid"),
        ("ImageError", "data_invalid"),
        ("JobError", "upstream_failed"),
        ("EngineError", "upstream_failed"),
        ("TrainingError", "internal"),
    ],
)
def test_an_error_of_the_tree_is_a_problem(service: Service, error: str, code: str) -> None:
    """Its message, but no path of the machine."""
    _, url = service()
    answer = httpx.get(f"{url}/fails/{error}")
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == problem["status"] == CODES[code].status
    assert problem["code"] == code
    assert problem["type"] == f"/errors#{code}"
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert "somebody" not in answer.text
    assert code == "internal" or "…/main: it failed" in problem["detail"]


def test_our_own_fault_tells_nothing_but_where_to_look(service: Service, logged: io.StringIO) -> None:
    _, url = service()
    answer = httpx.get(f"{url}/bug")
    assert answer.status_code == 500
    assert CANARY not in answer.text
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    (line,) = [line for line in lines if "exception" in line]
    assert CANARY in line["exception"]
    assert line["request_id"] == answer.json()["request_id"]


def test_every_code_is_documented() -> None:
    """`docs/errors.md` holds the table as it is."""
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| <a id=\"(\w+)\"></a>`\w+` \| (\d+) \| (.+?) \| (.+?) \| (yes|no) \|$", page, re.MULTILINE)
    expected = [
        (code.name, str(code.status), code.title, code.hint, "yes" if code.retryable else "no")
        for code in CODES.values()
    ]
    assert rows == expected


def test_faults_of_a_request_are_pointed_at(service: Service) -> None:
    _, url = service()
    problem = httpx.post(f"{url}/body", json={"number": "x", "more/than~asked": 1}).json()
    assert problem["code"] == "invalid_request"
    pointers = {fault["pointer"] for fault in problem["errors"]}
    assert pointers == {"/body/number", "/body/more~1than~0asked"}


@pytest.mark.parametrize(
    ("path", "body", "hints"),
    [
        ("/body", {"number": 1, "nmuber": 1}, {"/body/nmuber": "did you mean `number`?"}),
        ("/body", {"number": 1, "quite": 1}, {"/body/quite": None}),
        (
            "/bodies",
            {"body": {"number": 1, "numbr": 1}, "parts": [{"kind": "b", "widht": 1}]},
            {"/body/body/numbr": "did you mean `number`?", "/body/parts/0/b/widht": "did you mean `width`?"},
        ),
    ],
)
def test_an_unknown_field_names_its_nearest(
    service: Service, path: str, body: dict[str, Any], hints: dict[str, str | None]
) -> None:
    """Of the object that it stands in, in a body of one model or of several."""
    _, url = service()
    problem = httpx.post(f"{url}{path}", json=body).json()
    told = {fault["pointer"]: fault["detail"] for fault in problem["errors"]}
    said = "Extra inputs are not permitted"
    assert told == {pointer: said if hint is None else f"{said}; {hint}" for pointer, hint in hints.items()}


def test_a_body_that_cannot_be_read_is_not_our_fault(service: Service) -> None:
    _, url = service()
    answer = httpx.post(f"{url}/login", content=b"nonsense", headers={"content-type": "multipart/form-data"})
    assert answer.json()["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("method", "path", "code"), [("GET", "/nothing", "not_found"), ("GET", "/echo", "method_not_allowed")]
)
def test_what_the_framework_says_is_a_problem_too(service: Service, method: str, path: str, code: str) -> None:
    _, url = service()
    answer = httpx.request(method, f"{url}{path}")
    assert answer.json()["code"] == code
    assert (code == "method_not_allowed") == ("allow" in answer.headers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/lake/x.json: bad", "…/x.json: bad"),
        ("cannot open '/var/tmp/a b'", "cannot open '…/a b'"),
        ("see https://host/a/b/c", "see https://host/a/b/c"),
        ("lake.toml is missing", "lake.toml is missing"),
        ("a/b ratio", "a/b ratio"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, expected: str) -> None:
    assert scrubbed(text) == expected


def test_an_unknown_exception_is_ours() -> None:
    assert problem_of(KeyError("x")).code == "internal"
    problem = Problem("not_found", "x")
    assert problem_of(problem) is problem


# ---- ids, headers ----


def test_every_answer_has_an_id_and_safe_headers(service: Service) -> None:
    """A client's own id is kept if it is one, and never echoed if it is not."""
    _, url = service()
    for path in ("/livez", "/bug", "/nothing", "/fails/DataError", "/metrics"):
        answer = httpx.get(f"{url}{path}", headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    for hostile in ("a b", "<script>", "x" * 65):
        given = httpx.get(f"{url}/livez", headers={"x-request-id": hostile}).headers["x-request-id"]
        assert re.fullmatch(r"req_[0-9A-Z]{26}", given)


# ---- doors ----


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "tokens.sqlite")


def asked(url: str, token: str | None, path: str = "/caches/main", **query: str) -> int:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.get(f"{url}{path}", headers=headers, params=query).status_code


def test_without_tokens_only_this_machine_is_answered(service: Service) -> None:
    """A name that was made to resolve to 127.0.0.1 is not this machine's."""
    _, url = service()
    assert asked(url, None) == 200
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        answer = httpx.get(f"{url}/caches/main", headers={"host": host})
        assert answer.status_code == 421, host


def test_a_page_of_another_site_changes_nothing_where_there_are_no_tokens(service: Service) -> None:
    """A browser sends its forms to 127.0.0.1, too, and says where they come from; what is no browser says nothing."""
    _, url = service()
    host = url.partition("://")[2]
    for said, status in (
        ({}, 200),
        ({"origin": url}, 200),
        ({"sec-fetch-site": "same-origin", "origin": "null"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[x"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": url}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ):
        answer = httpx.post(f"{url}/body", json={"number": 1}, headers={"host": host, **said})
        assert answer.status_code == status, said
        assert httpx.get(f"{url}/caches/main", headers={"host": host, **said}).status_code == 200


def test_an_origin_that_is_none_is_another_site(service: Service, tmp_path: Path, tokens: TokenStore) -> None:
    """Whoever logs in with it is refused as any other page would be."""
    text, _ = tokens.create("reader", "read")
    _, url = service(tokens=tmp_path / "tokens.sqlite")
    for origin in ("http://[x", "null", "x", "http://evil.example"):
        for host in (url.partition("://")[2], ""):
            headers = {"origin": origin, "host": host}
            answer = httpx.post(f"{url}/login", data={"token": text}, headers=headers)
            assert (answer.status_code, answer.headers.get("set-cookie")) == (401, None), origin


def test_a_host_is_the_same_in_large_letters(service: Service) -> None:
    """RFC 9110, 4.2.3; in the configuration, too."""
    _, url = service(host_names=("Lake.Example.org",))
    for host in ("lake.example.org", "LAKE.example.ORG:8321", "LocalHost"):
        assert httpx.get(f"{url}/caches/main", headers={"host": host}).status_code == 200, host


def test_a_token_opens_what_it_covers(service: Service, tmp_path: Path, tokens: TokenStore) -> None:
    _, url = service(tokens=tmp_path / "tokens.sqlite")
    assert asked(url, None) == 200  # none was made yet
    reader, made = tokens.create("reader", "read", ("main", "team-*"))
    admin, _ = tokens.create("admin", "admin")
    assert asked(url, None) == 401
    assert asked(url, reader) == asked(url, reader, "/caches/team-a") == 200
    assert asked(url, reader, "/caches/other") == 404
    assert asked(url, reader, scope="submit") == 403
    assert asked(url, reader, "/caches/other", scope="submit") == 404
    assert asked(url, admin, "/caches/other", scope="admin") == 200
    assert asked(url, reader, "/metrics") == 404
    assert asked(url, admin, "/metrics") == 200
    tokens.revoke(made.id)
    assert asked(url, reader) == 401
    assert httpx.get(f"{url}/livez").status_code == 200


@pytest.mark.parametrize(
    "spoil", [lambda t: t[:-1] + "x", lambda t: t[:10], lambda t: t + "0", lambda _: "x", lambda _: "' OR 1=1"]
)
def test_what_is_no_token_opens_nothing(
    service: Service, tmp_path: Path, tokens: TokenStore, spoil: Callable[[str], str]
) -> None:
    text, _ = tokens.create("reader", "read")
    _, url = service(tokens=tmp_path / "tokens.sqlite")
    assert asked(url, spoil(text)) == 401


def test_a_token_expires(tokens: TokenStore) -> None:
    assert tokens.find(tokens.create("short", "read", expires_in_s=-1)[0]) is None
    assert tokens.find(tokens.create("long", "read", expires_in_s=60)[0]) is not None


def test_nobody_waits_for_whoever_writes_tokens(service: Service, tmp_path: Path, tokens: TokenStore) -> None:
    """When a token was last used is for people: it keeps nobody from coming in, and the service from nothing."""
    text, made = tokens.create("reader", "read")
    _, url = service(tokens=tmp_path / "tokens.sqlite")
    with closing(sqlite3.connect(tmp_path / "tokens.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert httpx.get(f"{url}/caches/main", headers={"authorization": f"Bearer {text}"}).status_code == 200
        assert tokens.all()[0].last_used is None
    assert asked(url, text) == 200
    assert tokens.all()[0].last_used is not None
    tokens.revoke(made.id)
    assert asked(url, text) == 401


def test_tokens_are_kept_as_hashes_by_their_owner_alone(tokens: TokenStore, tmp_path: Path) -> None:
    text, made = tokens.create("reader", "read")
    path = tmp_path / "tokens.sqlite"
    assert path.stat().st_mode & 0o777 == 0o600
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert text.encode() not in kept
    assert text[4:47].encode() not in kept
    assert tokens.all() == [made]
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        TokenStore(path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_open_address_needs_a_token(host: str, tokens: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token create"):
        check_listening(host, None, None)
    with pytest.raises(ConfigError, match="token create"):
        check_listening(host, tokens, tmp_path / "tokens.sqlite")
    tokens.create("one", "read")
    check_listening(host, tokens, tmp_path / "tokens.sqlite")
    for loopback in ("127.0.0.1", "::1", "localhost"):
        check_listening(loopback, None, None)


# ---- limits ----


def test_a_body_that_is_too_large_is_not_read(service: Service) -> None:
    """Whether its length is told or not."""
    _, url = service(max_body_bytes=1000)

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 500

    assert httpx.post(f"{url}/echo", content=b"x" * 1000).json() == 1000
    assert httpx.post(f"{url}/echo", content=b"x" * 1001).json()["code"] == "body_too_large"
    assert httpx.post(f"{url}/echo", content=chunks()).json()["code"] == "body_too_large"
    # Those that the framework reads, of people that nobody knows too.
    for path, media_type in (("/body", "application/json"), ("/login", "application/x-www-form-urlencoded")):
        answer = httpx.post(f"{url}{path}", content=chunks(), headers={"content-type": media_type})
        assert answer.json()["code"] == "body_too_large", path


def test_who_asks_too_often_is_told_when_to_come_again(service: Service) -> None:
    """A tenth of a minute's requests at once; probes are not counted."""
    _, url = service(requests_per_minute=50)
    with httpx.Client() as client:
        answers = [client.get(f"{url}/caches/main") for _ in range(20)]
        assert [answer.status_code for answer in answers[:5]] == [200] * 5
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 10
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert refused[0].json()["retryable"]
        assert client.get(f"{url}/livez").status_code == 200


@contextmanager
def one_waiting(app: Any, url: str) -> Iterator[list[int]]:
    """While a request is under way; afterwards the list holds its status."""
    app.state.waiting, app.state.go_on, status = threading.Event(), threading.Event(), list[int]()
    thread = threading.Thread(target=lambda: status.append(httpx.get(f"{url}/wait", timeout=WAIT_S).status_code))
    thread.start()
    assert app.state.waiting.wait(WAIT_S)
    try:
        yield status
    finally:
        app.state.go_on.set()
        thread.join(WAIT_S)


def test_too_many_at_once_are_refused(service: Service) -> None:
    app, url = service(max_concurrent=1)
    with one_waiting(app, url) as first:
        assert httpx.get(f"{url}/caches/main").status_code == 429
        assert httpx.get(f"{url}/readyz").status_code == 200
    assert first == [200]
    assert httpx.get(f"{url}/caches/main").status_code == 200


# ---- operation ----


def test_a_service_that_ends_is_not_ready_but_answers(service: Service) -> None:
    app, url = service()
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready", "problems": {}}
    app.state.service.is_ending = True
    assert httpx.get(f"{url}/readyz").status_code == 503
    assert httpx.get(f"{url}/livez").status_code == 200


def test_what_keeps_a_service_from_being_ready_names_no_path_of_the_machine(service: Service) -> None:
    """Whoever reaches it may ask, without a token."""
    app, url = service()
    app.state.service.checks["lake"] = lambda: "/home/somebody/lake: not a lake"
    assert httpx.get(f"{url}/readyz").json()["problems"] == {"lake": "…/lake: not a lake"}
    assert "not a lake" in (page := httpx.get(f"{url}/health").text)
    assert "somebody" not in page


def test_no_secret_is_logged_or_answered(
    service: Service, tmp_path: Path, tokens: TokenStore, logged: io.StringIO
) -> None:
    """B18: a token in a header, a query, a path, a body; right or wrong."""
    text, _ = tokens.create("reader", "read")
    _, url = service(tokens=tmp_path / "tokens.sqlite")
    bearer = {"authorization": f"Bearer {text}"}
    answers = [
        httpx.get(f"{url}/caches/main", headers=bearer),
        httpx.get(f"{url}/caches/main", params={"token": text}),
        httpx.get(f"{url}/nothing/{text}", headers=bearer),
        httpx.post(f"{url}/body", json={"number": text}, headers=bearer),
        httpx.get(f"{url}/caches/main", headers={"authorization": f"Basic {text}"}),
    ]
    logging.getLogger("somebody").warning("a request with %s", text)
    assert "llk_***" in logged.getvalue()
    assert text not in logged.getvalue()
    assert not any(text in answer.text for answer in answers)


def test_metrics_have_bounded_labels(service: Service) -> None:
    """Routes as declared: a thousand paths are one line."""
    _, url = service()
    with httpx.Client() as client:
        for number in range(50):
            client.get(f"{url}/caches/c{number}")
            client.request("TRACE", f"{url}/nothing/{number}")
        text = client.get(f"{url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("logitlake_http_requests_total")]
    assert 'logitlake_http_requests_total{method="GET",route="/caches/{cache}",status="200"} 50.0' in lines
    assert 'logitlake_http_requests_total{method="other",route="none",status="404"} 50.0' in lines
    assert len(lines) <= 3


def test_the_document_is_openapi_and_tells_of_problems(service: Service) -> None:
    _, url = service()
    document = httpx.get(f"{url}/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "application/problem+json" in operation["responses"]["default"]["content"], (method, path)


def test_time_passes_for_the_rate(service: Service) -> None:
    """The bucket fills again with the clock."""
    from logitlake_shared.web.limits import Limits
    from logitlake_shared.web.settings import ServiceSettings

    limits = Limits(ServiceSettings(requests_per_minute=60_000))
    started, taken = time.monotonic(), 0
    while time.monotonic() - started < 0.2:
        try:
            with limits.request("one"):
                taken += 1
        except Problem:
            pass
    # 6,000 at once and a thousand a second.
    assert 6000 < taken <= 6000 + 1000 * (time.monotonic() - started) + 1
