"""Long questions: asked now, read later, by whoever asked and by nobody else."""

import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from logitlake_shared.web.tokens import TokenStore

Teacher = Callable[..., tuple[Any, str]]
QUESTION = "SELECT task, count(*) AS tokens FROM tokens GROUP BY task ORDER BY task"
# More than a core can do in an hour.
ENDLESS = "SELECT sum(sqrt(a.range * b.range)) FROM range(10000000) a, range(10000000) b"
PATIENCE_S = 60.0


@pytest.fixture
def client(teacher: Teacher) -> Iterator[httpx.Client]:
    """Of the service over the small lake."""
    with httpx.Client(base_url=teacher()[1], timeout=PATIENCE_S) as made:
        yield made


def until_ended(client: httpx.Client, query_id: str, **keywords: Any) -> dict[str, Any]:
    """The question once it does not run."""
    end = time.monotonic() + PATIENCE_S
    while (query := client.get(f"/v1/queries/{query_id}", **keywords).json())["state"] == "running":
        assert time.monotonic() < end
        time.sleep(0.05)  # there is nothing to wait for but the answer
    return query  # type: ignore[no-any-return]


def test_an_answer_is_read_later_as_often_as_one_likes_in_any_format(client: httpx.Client) -> None:
    """The same rows as `/v1/sql` gives; then it is forgotten."""
    asked = client.post("/v1/queries", json={"sql": QUESTION})
    assert asked.status_code == 202, asked.text
    query_id = asked.json()["id"]
    assert asked.headers["location"] == f"/v1/queries/{query_id}"
    query = until_ended(client, query_id)
    assert (query["state"], query["truncated"]) == ("succeeded", None)
    expected = client.post("/v1/sql", json={"sql": QUESTION}).json()["rows"]
    result = f"/v1/queries/{query_id}/result"
    for _ in range(2):
        assert client.get(result).json()["rows"] == expected
    parquet = client.get(result, headers={"Accept": "application/vnd.apache.parquet"})
    assert [list(row.values()) for row in pq.read_table(io.BytesIO(parquet.content)).to_pylist()] == expected
    assert client.get(result, headers={"Accept": "image/png"}).status_code == 406
    assert client.delete(f"/v1/queries/{query_id}").status_code == 204
    assert client.get(f"/v1/queries/{query_id}").status_code == 404


def test_what_was_asked_of_csv_holds_when_it_is_read(client: httpx.Client) -> None:
    """Text that a spreadsheet would take for a formula is kept from it."""
    body = {"sql": "SELECT '=1+1' AS t", "csv_safe": True}
    query_id = client.post("/v1/queries", json=body).json()["id"]
    until_ended(client, query_id)
    csv = {"Accept": "text/csv"}
    later = client.get(f"/v1/queries/{query_id}/result", headers=csv).text
    assert later == client.post("/v1/sql", json=body, headers=csv).text
    assert later != client.post("/v1/sql", json=body | {"csv_safe": False}, headers=csv).text


def test_a_question_that_fails_or_is_ended_says_so(client: httpx.Client) -> None:
    """Refused at once where that is known; else with its code, where the answer would be."""
    assert client.post("/v1/queries", json={"sql": "SELECT 1", "max_rows": 10**9}).json()["code"] == "query_failed"
    failed = client.post("/v1/queries", json={"sql": "DROP TABLE tokens"}).json()["id"]
    assert until_ended(client, failed)["code"] == "query_refused"
    assert client.get(f"/v1/queries/{failed}/result").json()["code"] == "query_refused"
    endless = client.post("/v1/queries", json={"sql": ENDLESS}).json()["id"]
    assert client.get(f"/v1/queries/{endless}/result").json()["code"] == "conflict"
    assert client.delete(f"/v1/queries/{endless}").status_code == 204
    assert until_ended(client, endless)["state"] == "cancelled"
    halfway = "SELECT CASE WHEN range < 100000 THEN '1' ELSE 'broken' END::INT AS n FROM range(200000)"
    broken = client.post("/v1/queries", json={"sql": halfway, "max_rows": 200_000}).json()["id"]
    assert until_ended(client, broken)["code"] == "query_failed"
    late = client.post("/v1/queries", json={"sql": ENDLESS, "timeout_ms": 300}).json()["id"]
    assert until_ended(client, late)["code"] == "timeout"


def test_a_question_of_somebody_else_is_not_there(client: httpx.Client, tokens: TokenStore) -> None:
    """Not to look at, not to read, not to end; and it sees the caches of whoever asked it."""
    ada, bob = ({"Authorization": f"Bearer {tokens.create(name, 'read', ('main',))[0]}"} for name in ("ada", "bob"))
    query_id = client.post("/v1/queries", json={"sql": "SELECT cache FROM caches"}, headers=ada).json()["id"]
    until_ended(client, query_id, headers=ada)
    for method, way in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
        assert client.request(method, f"/v1/queries/{query_id}{way}", headers=bob).status_code == 404
    assert client.get(f"/v1/queries/{query_id}/result", headers=ada).json()["rows"] == [["main"]]
