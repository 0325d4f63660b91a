"""The lake over HTTP: what is shown is what the lake says, page by page, to those whose token covers it."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route
from tests.shared.conftest import made_scores

from logitlake_schemas import UnitError
from logitlake_shared.cache_figures import cache_figures
from logitlake_shared.catalog import publish_catalog
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.student_scores import scores_path
from logitlake_shared.web.sessions import OPEN_PATHS
from logitlake_shared.web.tokens import TokenStore

Teacher = Callable[..., tuple[Any, str]]
OPEN = {"/livez", "/readyz", *OPEN_PATHS}
# What tells of no cache in particular.
OF_NO_CACHE = {"/openapi.json", "/metrics", "/v1/caches", "/v1/sql", "/v1/queries/{query_id}", "/v1/schema"}
OF_NO_CACHE |= {"/v1/queries", "/v1/queries/{query_id}/result", "/", "/sql", "/sql/answer", "/health", "/logout"}
OF_NO_CACHE |= {"/v1/tokens", "/v1/tokens/{token_id}"}


def every_item(client: httpx.Client, path: str, limit: int, **query: Any) -> list[Any]:
    """A list, read to its end."""
    items: list[Any] = []
    cursor: str | None = None
    while True:
        asked = query | {"limit": limit} | ({} if cursor is None else {"cursor": cursor})
        page = client.get(path, params=asked).json()
        items += page["data"]
        assert len(page["data"]) <= limit
        cursor = page["next_cursor"]
        if not page["has_more"]:
            assert cursor is None
            return items


@pytest.fixture
def client(teacher: Teacher) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=teacher()[1]) as client:
        yield client


def test_caches_are_those_of_the_lake(client: httpx.Client, small_lake: Path) -> None:
    lake = Lake.open(small_lake)
    caches = every_item(client, "/v1/caches", limit=1)
    assert [cache["name"] for cache in caches] == lake.cache_names()
    for told in caches:
        cache = lake.cache(told["name"])
        figures = cache_figures(cache, cache.open_snapshot())
        assert told["fingerprint"] == cache.fingerprint
        assert told["snapshot"] == 1
        assert (told["figures"]["rows"], told["figures"]["bytes"]) == (figures.rows, figures.bytes)
        assert told == client.get(f"/v1/caches/{told['name']}").json()


def test_a_cache_without_a_snapshot_has_no_figures(client: httpx.Client, small_lake: Path) -> None:
    lake = Lake.open(small_lake)
    lake.create_cache("empty", lake.cache("main").spec)
    told = client.get("/v1/caches/empty").json()
    assert told["snapshot"] is told["figures"] is None
    assert client.get("/v1/caches/empty/snapshots/1").status_code == 404
    for what in ("errors", "samples"):
        assert client.get(f"/v1/caches/empty/{what}").json()["data"] == []


def test_files_have_the_bytes_that_were_committed(client: httpx.Client, small_lake: Path) -> None:
    """All of a snapshot's, with sha256 and length, whole and by range."""
    commits = Lake.open(small_lake).cache("main").open_snapshot().commits
    files = every_item(client, "/v1/caches/main/snapshots/1/files", limit=2)
    assert {file["path"] for file in files} == {entry.path for commit in commits for entry in commit.shards}
    for file in files:
        data = client.get(file["url"]).content
        assert len(data) == file["bytes"]
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
        part = client.get(file["url"], headers={"range": "bytes=4-9"})
        assert (part.status_code, part.content) == (206, data[4:10])


def test_a_sample_is_shown_token_by_token_with_its_image(client: httpx.Client, small_lake: Path) -> None:
    sample = LakeDataset(small_lake, "main")[2]
    told = client.get(f"/v1/caches/main/samples/{sample.sample_id}", params={"top": 3}).json()
    (response,) = told["responses"]
    assert [token["token_id"] for token in response["tokens"]] == sample.response_ids.tolist()
    assert [token["logprob"] for token in response["tokens"]] == pytest.approx(sample.rows.label_logprob_T.tolist())
    assert all(len(token["alternatives"]) <= 3 for token in response["tokens"])
    (image,) = told["images"]
    shown = client.get(image["url"])
    assert shown.content == sample.images[0]
    assert shown.headers["content-type"] == "image/png"
    assert "saved_to" not in image


def test_samples_are_listed_by_id(client: httpx.Client, small_lake: Path) -> None:
    """All of them page by page, or those of a task or a split; a cursor is of its own list."""
    for cache, dataset in (("main", LakeDataset(small_lake, "main")), ("pairs", PairDataset(small_lake, "pairs"))):
        url = f"/v1/caches/{cache}/samples"
        listed = every_item(client, url, limit=2)
        assert [entry["id"] for entry in listed] == dataset.ids()
        assert [entry["num_tokens"] for entry in listed] == dataset.num_tokens.tolist()
        for name in ("task", "split"):
            value = getattr(dataset[0], name)
            some = [entry["id"] for entry in listed if entry[name] == value]
            assert [entry["id"] for entry in every_item(client, url, limit=1, **{name: value})] == some
        assert every_item(client, url, limit=1, task="no'such") == []
    cursor = client.get("/v1/caches/main/samples?limit=1").json()["next_cursor"]
    assert client.get(f"/v1/caches/main/samples?limit=1&cursor={cursor}&split=test").status_code == 422


def test_a_student_stands_beside_the_teacher(client: httpx.Client, small_lake: Path, tmp_path: Path) -> None:
    """Every stage that was scored on the cache can be asked for, and each token has its figures."""
    sample, other = (LakeDataset(small_lake, "main")[place] for place in (0, 1))
    url = f"/v1/caches/main/samples/{sample.sample_id}"
    assert client.get(url).json()["students"] == []
    (scored,) = made_scores(small_lake, scores_path(tmp_path / "runs/demo/d2s", "main", None), num_samples=1)
    alone = client.get(url).json()
    assert (alone["students"], alone["student"]) == (["demo/d2s"], None)
    assert [token["student"] for token in alone["responses"][0]["tokens"]] == [None] * len(sample.response_ids)
    made_scores(small_lake, scores_path(tmp_path / "runs" / "demo" / "d2d", "main", "other"), split="other")
    told = client.get(url, params={"student": "demo/d2s", "top": 3}).json()
    assert told["students"] == ["demo/d2s"]  # the other has no samples of this one's split
    assert told["student"] == "demo/d2s"
    for t, token in enumerate(told["responses"][0]["tokens"]):
        assert token["student"]["forward_kl"] == pytest.approx(float(scored.forward_kl_T[t]))
        assert [choice["token_id"] for choice in token["student"]["alternatives"]] == scored.topk_ids_TK[t, :3].tolist()
    for asked, says in (
        (f"{url}?student=nobody", "no student 'nobody' was scored on this cache; there are demo/d2d, demo/d2s"),
        (f"/v1/caches/main/samples/{other.sample_id}?student=demo/d2s", "is none of them; score it again for all"),
        (f"/v1/caches/pairs/samples/{PairDataset(small_lake, 'pairs').ids()[0]}?student=demo/d2s", "no student"),
    ):
        answer = client.get(asked)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert says in answer.json()["detail"]
        assert str(tmp_path) not in answer.text


def test_damaged_scores_are_not_the_lakes_trouble(client: httpx.Client, small_lake: Path, tmp_path: Path) -> None:
    """A flipped bit in a page: the footer still offers the student, and the sample itself is shown as ever."""
    path = scores_path(tmp_path / "runs/demo/d2s", "main", None)
    (scored,) = made_scores(small_lake, path, num_samples=1)
    data = bytearray(path.read_bytes())
    data[pq.read_metadata(path).row_group(0).column(0).data_page_offset + 40] ^= 16
    path.write_bytes(data)
    url = f"/v1/caches/main/samples/{scored.sample_id}"
    assert client.get(url).json()["students"] == ["demo/d2s"]
    answer = client.get(url, params={"student": "demo/d2s"})
    assert (answer.status_code, answer.json()["code"]) == (500, "scores_corrupt")
    assert "logitlake-student score" in answer.json()["hint"]
    assert answer.json()["detail"].startswith("…/main.parquet: cannot be read as scores")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/caches/nope",
        "/v1/caches/..",
        "/v1/caches/main/snapshots/2",
        "/v1/caches/main/snapshots/2/files",
        "/v1/caches/main/samples/nope",
        "/v1/caches/main/samples/a%00b",
        "/v1/caches/main/samples/" + "x" * 3000,
        f"/v1/caches/main/images/{'0' * 64}?sample_id=sample-0010",
        "/v1/nothing",
    ],
)
def test_what_is_not_there_is_not_found(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.json()["code"] == "not_found"
    assert answer.status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v1/caches?limit=0",
        "/v1/caches?limit=201",
        "/v1/caches?cursor=x",
        "/v1/caches/main/snapshots/0",
        "/v1/caches/main/snapshots/x",
        "/v1/caches/main/samples/sample-0010?top=0",
        "/v1/caches/main/images/xyz?sample_id=sample-0010",
        f"/v1/caches/{'c' * 101}",
    ],
)
def test_what_cannot_be_asked_is_explained(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 422
    assert answer.json()["errors"]


def test_errors_are_listed_by_code(client: httpx.Client, small_lake: Path, make_unit: Callable[..., Any]) -> None:
    cache = Lake.open(small_lake).cache("main")
    failed = [UnitError(sample_id=f"bad-{number}", code=code, message="gone") for number, code in enumerate("aabab")]
    cache.publish_unit(replace(make_unit(9), errors=failed))
    cache.snapshot()
    assert len(every_item(client, "/v1/caches/main/errors", limit=2)) == 5
    some = every_item(client, "/v1/caches/main/errors", limit=2, code="a")
    assert [error["sample_id"] for error in some] == ["bad-0", "bad-1", "bad-3"]


def operations(app: Any) -> list[tuple[str, str]]:
    """Method and path of everything that the application can be asked."""
    return [
        (method, route.path)
        for route in app.routes
        if isinstance(route, APIRoute | Route)
        for method in sorted(route.methods or {"GET", "PROPFIND"})
    ]


def filled(path: str, cache: str) -> str:
    values = {"{cache}": cache, "{number}": "1", "{sample_id:path}": "sample-0010", "{sha256}": "0" * 64}
    values |= {"{path:path}": f"caches/{cache}/spec.json", "{query_id}": "qry_1", "{token_id}": "tok_1"}
    for name, value in values.items():
        path = path.replace(name, value)
    assert "{" not in path
    return path


def test_every_route_is_behind_the_door(teacher: Teacher, tokens: TokenStore, small_lake: Path) -> None:
    """The matrix, from the routes themselves: a route that is added without a thought is refused or covered here."""
    publish_catalog(Lake.open(small_lake))
    app, url = teacher()
    of_main, _ = tokens.create("main", "read", ("main",))
    of_pairs, _ = tokens.create("pairs", "read", ("pairs",))
    of_nothing, _ = tokens.create("nothing", "admin", ("nothing",))

    def ask(method: str, path: str, token: str | None) -> int:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        body = {"sql": "SELECT 1"} if method == "POST" else None
        asked = httpx.request(
            method, f"{url}{path}", headers=headers, params={"sample_id": "sample-0010"}, json=body, timeout=60
        )
        return asked.status_code

    for method, route in operations(app):
        path = filled(route, "main")
        if route in OPEN:
            # A token is what /login asks for.
            assert ask(method, path, None) == 200 or (method, route) == ("POST", "/login")
            continue
        assert ask(method, path, None) == 401, route
        if route in OF_NO_CACHE:
            continue
        assert "{cache}" in route or "{path:path}" in route, f"{route} tells of no cache: may it? Say so in OF_NO_CACHE"
        for token in (of_pairs, of_nothing):
            assert ask(method, path, token) == 404, route
        assert ask(method, path, of_main) in (200, 207, 404), route
    assert ask("GET", "/v1/files/catalog/catalog-00000001.duckdb", of_main) == 404
    assert ask("GET", "/metrics", of_main) == 404
    assert ask("POST", "/v1/sql", of_nothing) == 404
    for token, names in ((of_main, ["main"]), (of_pairs, ["pairs"]), (of_nothing, [])):
        answer = httpx.get(f"{url}/v1/caches", headers={"authorization": f"Bearer {token}"})
        assert [cache["name"] for cache in answer.json()["data"]] == names


def test_a_cache_that_is_foreign_is_as_one_that_is_not_there(teacher: Teacher, tokens: TokenStore) -> None:
    """Word for word, but for its name."""
    _, url = teacher()
    text, _ = tokens.create("main", "read", ("main",))
    foreign, missing = (
        httpx.get(f"{url}/v1/caches/{name}", headers={"authorization": f"Bearer {text}"}).json()
        for name in ("pairs", "nopes")
    )
    for answer in (foreign, missing):
        del answer["request_id"]
    assert foreign == {**missing, "detail": missing["detail"].replace("nopes", "pairs")}
