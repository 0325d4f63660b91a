"""A lake that is read over HTTP is the lake: same caches, same rows, same answers; and nothing else is served."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from tests.contract.conftest import s3_bucket, s3_endpoint
from tests.served import served

from logitlake_schemas import layout
from logitlake_shared.catalog import open_catalog, publish_catalog
from logitlake_shared.errors import LakeError
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset
from logitlake_shared.store import TOKEN_VARIABLE, ObjectStore, open_store
from logitlake_shared.web.lake_files import LakeFiles

__all__ = ["s3_bucket", "s3_endpoint"]

UNDER = "/v1/files"
BYTES = bytes(range(256)) * 9


def app(store: ObjectStore, may_read: Callable[..., bool] = lambda *_: True) -> Starlette:
    return Starlette(routes=[Route(f"{UNDER}/{{path:path}}", LakeFiles(store, may_read))])


@pytest.fixture
def address(small_lake: Path) -> Iterator[str]:
    """Of the small lake's files."""
    publish_catalog(Lake.open(small_lake))
    with served(app(open_store(small_lake))) as url:
        yield f"{url}{UNDER}"


def test_the_lake_is_the_same(address: str, small_lake: Path) -> None:
    """Listings, snapshots, rows with their images, and SQL."""
    here, there = Lake.open(small_lake), Lake.open(address)
    assert there.cache_names() == here.cache_names() == ["main", "pairs"]
    assert there.cache("main").open_snapshot() == here.cache("main").open_snapshot()
    assert there.store.names("caches") == here.store.names("caches")
    local, remote = LakeDataset(small_lake, "main"), LakeDataset(address, "main")
    assert remote.ids() == local.ids()
    for place in range(len(local)):
        one, other = local[place], remote[place]
        assert one.images == other.images
        assert one.messages == other.messages
        np.testing.assert_array_equal(one.rows.topk_ids, other.rows.topk_ids)
        np.testing.assert_array_equal(one.rows.topk_logprobs, other.rows.topk_logprobs)
    question = "SELECT cache, sample_id, sum(label_logprob) AS logprob FROM tokens GROUP BY ALL ORDER BY ALL"
    with open_catalog(small_lake) as near, open_catalog(address) as far:
        assert far.query(question) == near.query(question)
        assert far.query("SELECT * FROM caches ORDER BY cache") == near.query("SELECT * FROM caches ORDER BY cache")


def test_nothing_is_written_through_it(address: str, small_lake: Path) -> None:
    before = sorted(small_lake.rglob("*"))
    store = Lake.open(address).store
    with pytest.raises(LakeError, match="writing lake"):
        store.put_new("lake-2.json", b"{}")
    for method in ("PUT", "POST", "DELETE", "PATCH", "MKCOL", "MOVE", "COPY", "PROPPATCH", "LOCK"):
        answer = httpx.request(method, f"{address}/{layout.LAKE_MANIFEST}")
        assert answer.status_code == 405, method
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "PROPFIND"}
    assert sorted(small_lake.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        "caches",
        "caches/main",
        "..",
        "../lake.json",
        "%2e%2e/secret",
        "caches/../../secret",
        "caches/%2e%2e/%2e%2e/secret",
        "caches/main/..%2f..%2f..%2fsecret",
        "caches//main/spec.json",
        "caches/main/spec.json%00",
        "caches/main/.hidden",
        "caches/main/spec.json%231",
        "caches/main/link.json",
        "caches/out/secret",
        "caches/main/spec.json/",
        "secret",
        "jobs/run.toml",
    ],
)
def test_what_is_no_object_of_the_lake_is_not_there(address: str, small_lake: Path, name: str) -> None:
    """Folders, names that lead out, links, files of writers that were stopped, and what is no reader's business."""
    for outside in (small_lake.parent / "secret", small_lake / "secret", small_lake / "caches" / "main" / ".hidden"):
        outside.write_text("secret")
    (small_lake / "jobs").mkdir()
    (small_lake / "jobs" / "run.toml").write_text("secret")
    (small_lake / "caches" / "main" / "spec.json#1").write_text("secret")
    (small_lake / "caches" / "main" / "link.json").symlink_to(small_lake.parent / "secret")
    (small_lake / "caches" / "out").symlink_to(small_lake.parent)
    raw = httpx.URL(address).copy_with(raw_path=f"{UNDER}/{name}".encode())
    for method in ("GET", "HEAD"):
        answer = httpx.request(method, raw)
        assert answer.status_code == 404
        assert "secret" not in answer.text
    listed = httpx.request("PROPFIND", f"{address}/caches").text
    assert "hidden" not in listed
    assert "%231" not in listed


def test_what_may_not_be_read_is_neither_served_nor_listed(small_lake: Path) -> None:
    """A caller of one cache sees a lake of one cache; the catalog, which tells of all, is not there for it."""
    publish_catalog(Lake.open(small_lake))
    with served(app(open_store(small_lake), lambda _, name: layout.cache_of(name) in (None, "main"))) as url:
        lake = Lake.open(f"{url}{UNDER}")
        assert lake.cache_names() == ["main"]
        for depth in ("1", "infinity"):
            listed = httpx.request("PROPFIND", f"{url}{UNDER}/caches", headers={"depth": depth}).text
            assert "caches/main" in listed
            assert "pairs" not in listed
        assert not any(name.startswith("caches/pairs") for name in lake.store.names("caches"))
        assert lake.store.get(layout.spec_path("pairs")) is None
        with pytest.raises(LakeError):
            lake.cache("pairs")


@pytest.fixture(params=["folder", "s3"])
def large(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an object of `BYTES`, served from a folder and from an object store."""
    name = "caches/main/shards/000001-large.parquet"
    bucket = request.param == "s3" and request.getfixturevalue("s3_bucket")
    store = open_store(f"s3://{bucket}/lake" if bucket else tmp_path / "lake")
    store.put_new(name, BYTES)
    with served(app(store)) as url:
        yield f"{url}{UNDER}/{name}"


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        (None, 0, len(BYTES)),
        ("bytes=0-0", 0, 1),
        ("bytes=5-99", 5, 100),
        ("bytes=2000-", 2000, len(BYTES)),
        ("bytes=-10", len(BYTES) - 10, len(BYTES)),
        ("bytes=2300-999999", 2300, len(BYTES)),
        ("bytes=0-", 0, len(BYTES)),
        (f"bytes=0-{len(BYTES) - 1}", 0, len(BYTES)),
        ("bytes=-999999", 0, len(BYTES)),
    ],
)
def test_a_part_is_what_was_asked_for(large: str, asked: str | None, start: int, stop: int) -> None:
    headers = {} if asked is None else {"range": asked}
    answer, told = httpx.get(large, headers=headers), httpx.head(large, headers=headers)
    assert answer.content == BYTES[start:stop]
    assert answer.status_code == told.status_code == (200 if asked is None else 206)
    for one in (answer, told):
        assert int(one.headers["content-length"]) == stop - start
        assert one.headers["accept-ranges"] == "bytes"
        if asked is not None:
            assert one.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(BYTES)}"


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-0,5-9", "bytes=9-5", "bytes=-", "bytes=a-b", "items=0-1", "bytes 0-1", f"bytes={'9' * 5000}-"],
)
def test_what_is_no_part_is_the_whole(large: str, asked: str) -> None:
    """RFC 9110, 14.2: a range that is not understood is as none; so are several at once, which nobody needs."""
    for answer in (httpx.get(large, headers={"range": asked}), httpx.head(large, headers={"range": asked})):
        assert (answer.status_code, int(answer.headers["content-length"])) == (200, len(BYTES))
        assert "content-range" not in answer.headers
    assert httpx.get(large, headers={"range": asked}).content == BYTES


def test_a_part_of_what_was_something_else_before_is_the_whole(large: str) -> None:
    """RFC 9110, 13.1.5: also where the part is beyond the end of what it is now."""
    for asked in ("bytes=5-9", "bytes=999999-"):
        answer = httpx.get(large, headers={"range": asked, "if-range": '"another"'})
        assert (answer.status_code, answer.content) == (200, BYTES)


@pytest.mark.parametrize("asked", ["bytes=999999-", "bytes=-0", f"bytes={'9' * 50}-"])
def test_a_part_beyond_the_end_is_refused(large: str, asked: str) -> None:
    answer = httpx.get(large, headers={"range": asked})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(BYTES)}"


def test_a_folder_is_the_same_with_a_slash_behind_it(address: str) -> None:
    """As other clients of WebDAV ask for it: every name in the list leads to what it names."""
    for depth in ("1", "infinity"):
        plain, slash = (
            httpx.request("PROPFIND", f"{address}/caches/main{end}", headers={"depth": depth}).text for end in ("", "/")
        )
        assert plain == slash


def test_a_token_is_sent_but_never_in_clear_over_a_network(small_lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LOGITLAKE_TOKEN` opens the door; without TLS it only goes to this machine."""
    seen: list[str | None] = []

    def may_read(scope: dict[str, list[tuple[bytes, bytes]]], name: str) -> bool:
        seen.append(dict(scope["headers"]).get(b"authorization", b"").decode())
        return seen[-1] == "Bearer canary"

    with served(app(open_store(small_lake), may_read)) as url:
        with pytest.raises(LakeError):
            Lake.open(f"{url}{UNDER}")
        monkeypatch.setenv(TOKEN_VARIABLE, "canary")
        assert Lake.open(f"{url}{UNDER}").cache_names() == ["main", "pairs"]
    with pytest.raises(LakeError, match="unencrypted") as refused:
        open_store("http://lake.example/v1/files")
    assert "canary" not in str(refused.value)
    assert "canary" not in json.dumps(open_store("https://lake.example/v1/files").uri)
