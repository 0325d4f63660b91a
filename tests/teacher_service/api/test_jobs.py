"""Captures over HTTP: submitted once, seen by those who may, done as from the command line."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from tests.teacher_service.api.conftest import Api
from tests.teacher_service.conftest import NUM_SAMPLES

from logitlake_shared.web.job_pages import job_pages
from logitlake_shared.web.jobs import job_routes
from logitlake_shared.web.tokens import TokenStore

PARALLEL = 50
ENDED = ("succeeded", "failed", "cancelled", "expired")


def until(client: httpx.Client, job: str, *states: str) -> dict[str, Any]:
    """The job once it is in one of these states."""
    after = 0
    while True:
        found: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        if found["state"] in states:
            return found
        assert found["state"] not in ENDED, (found, client.get(f"/v1/jobs/{job}/logs").text)
        answer = client.get(f"/v1/jobs/{job}/events", params={"after": after, "wait": 30}).json()
        after = answer["next_after"]


def test_a_capture_over_http_is_the_one_of_the_command_line(
    api: Api, capture: Callable[..., dict[str, Any]], teacher_world: Any, teacher_command: Any
) -> None:
    """Byte for byte; its counts add up, its result says what the cache holds; the same again is skipped."""
    client = api()
    answer = client.post("/v1/jobs", json=capture("main") | {"name": "first", "labels": {"team": "a"}})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    job = until(client, answer.json()["id"], *ENDED)
    assert job["state"] == "succeeded", job
    items = job["counts"].pop("total")
    assert job["errors"] == {}
    assert sum(job["counts"].values()) == items == job["counts"]["succeeded"] == NUM_SAMPLES
    assert job["result"]["rows"] == items
    assert f"{NUM_SAMPLES} samples" in client.get(f"/v1/jobs/{job['id']}/logs").text

    other = teacher_world.folder / "other"
    done = teacher_command("capture", teacher_world.config(lake={"uri": str(other), "cache": "main"}))
    assert done.code == 0, done.err
    assert teacher_world.contents("main") == teacher_world.contents("main", other)

    again = until(client, client.post("/v1/jobs", json=capture("main")).json()["id"], *ENDED)
    assert again["counts"]["skipped_cached"] == items
    assert again["counts"]["succeeded"] == 0
    assert again["digest"] == job["digest"]
    assert [one["name"] for one in client.get("/v1/jobs", params={"label": "team:a"}).json()["data"]] == ["first"]


def test_one_key_is_one_job(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """However many send it at once; another body with that key is refused."""
    client = api()
    barrier = threading.Barrier(PARALLEL)

    def send(_: int) -> tuple[int, str, str]:
        barrier.wait()
        answer = httpx.post(f"{client.base_url}/v1/jobs", json=capture(), headers={"Idempotency-Key": "k"}, timeout=60)
        return answer.status_code, answer.json()["id"], answer.headers.get("idempotency-replayed", "false")

    with ThreadPoolExecutor(PARALLEL) as pool:
        answers = list(pool.map(send, range(PARALLEL)))
    assert {status for status, _, _ in answers} == {201}
    assert len({job for _, job, _ in answers}) == 1
    assert Counter(replayed for _, _, replayed in answers) == {"false": 1, "true": PARALLEL - 1}
    assert len(client.get("/v1/jobs").json()["data"]) == 1
    other = client.post("/v1/jobs", json=capture("other"), headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["code"]) == (422, "key_reused")


def test_events_come_once_and_in_order_by_both_roads(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """Server-Sent Events, resumed after each event with a new connection, and the twin that polls, say the same."""
    client = api()
    job = client.post("/v1/jobs", json=capture()).json()["id"]
    streamed: list[tuple[int, str, dict[str, Any]]] = []
    while True:
        last = str(streamed[-1][0]) if streamed else "0"
        headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
        with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer:
            if answer.status_code == 204:
                break
            assert answer.headers["content-type"].startswith("text/event-stream")
            event: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                event[name] = value
                if not line and "data" in event:
                    streamed.append((int(event["id"]), event["event"], json.loads(event["data"])))
                    break  # the connection is cut
    polled = client.get(f"/v1/jobs/{job}/events").json()
    assert polled["ended"]
    for number in ("9223372036854775808", "9" * 20, "-1", "x"):  # no event has it
        for accept in ("text/event-stream", "application/json"):
            answer = client.get(f"/v1/jobs/{job}/events", headers={"Accept": accept, "Last-Event-ID": number})
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert [(event["id"], event["event"]) for event in polled["data"]] == [event[:2] for event in streamed]
    assert streamed[-1][2]["to"] == "succeeded"


def test_a_job_is_cancelled_and_paused_over_http(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """202, then 200; after the end 409. What was committed stays, and counts add up."""
    client = api()
    slow = capture(engine={"type": "fake", "hang_on": ["s007"]}, executor={"type": "inline", "grace_s": 0.1})
    job = client.post("/v1/jobs", json=slow).json()["id"]
    until(client, job, "running")
    assert client.post(f"/v1/jobs/{job}/pause").status_code == 202
    until(client, job, "paused")
    assert client.post(f"/v1/jobs/{job}/pause").status_code == 200
    assert client.post(f"/v1/jobs/{job}/resume").json()["state"] == "queued"
    until(client, job, "running")
    assert client.post(f"/v1/jobs/{job}/cancel", json={"mode": "now"}).status_code == 202
    assert client.post(f"/v1/jobs/{job}/cancel", json={"mode": "now"}).status_code in (200, 409)
    ended = until(client, job, "cancelled")
    assert sum(ended["counts"].values()) == 2 * ended["counts"]["total"]
    for order in ("cancel", "pause", "resume"):
        problem = client.post(f"/v1/jobs/{job}/{order}")
        assert (problem.status_code, problem.json()["code"]) == (409, "conflict")


def test_a_plan_says_what_a_job_would_do_and_its_digest_binds_it(
    api: Api, capture: Callable[..., dict[str, Any]], teacher_world: Any
) -> None:
    """Nothing is captured; a job with the digest of other data fails."""
    client = api()
    plan = client.post("/v1/plans", params={"wait": 60}, json=capture())
    assert plan.status_code == 200, plan.text
    result = plan.json()["result"]
    assert result["figures"]["items"] == NUM_SAMPLES
    assert client.get("/v1/caches").json()["data"] == []
    good = client.post("/v1/jobs", json=capture() | {"plan_digest": result["plan_digest"][:12]}).json()
    assert until(client, good["id"], *ENDED)["state"] == "succeeded"
    records = json.loads((teacher_world.folder / "train.json").read_text())
    teacher_world.write_records(records[1:])
    bad = client.post("/v1/jobs", json=capture("other") | {"plan_digest": result["plan_digest"]}).json()
    fault = until(client, bad["id"], *ENDED)["fault"]
    assert fault["error"] == "DataError"
    assert "plan" in fault["message"]


def test_a_job_that_fails_says_why_without_a_path(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """The error's class and words, in the job and its events."""
    client = api()
    config = capture()
    config["config"]["data"][0]["path"] = config["config"]["data"][0]["path"].replace("train", "absent")
    job = until(client, client.post("/v1/jobs", json=config).json()["id"], *ENDED)
    assert job["state"] == "failed"
    assert job["fault"]["error"] == "DataError"
    assert "absent.json" in job["fault"]["message"]
    assert "/tmp" not in json.dumps([job["fault"], client.get(f"/v1/jobs/{job['id']}/events").json()])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"teacher": {"model_dir": "/etc"}}, "`teacher.model_dir`"),
        ({"data": [{"type": "llava", "path": "/etc/passwd", "image_root": "/etc"}]}, "`data.0.image_root`"),
        ({"data": [{"type": "llava", "path": "{folder}/../x.json", "image_root": "{folder}"}]}, "`data.0.path`"),
        ({"data": [{"type": "llava", "path": "{folder}/link/passwd", "image_root": "{folder}"}]}, "`data.0.path`"),
        ({"data": [{"type": "llava", "path": "{folder}/train.json", "image_root": "s3://other/x"}]}, "allow_stores"),
        ({"plan": {"folder": "/etc"}}, "folder"),
        ({"images": {"allow_hosts": ["images.example.org"]}}, "allow_hosts"),
        ({"images": {"allow_stores": ["s3://photos-of-others/"]}}, "allow_stores"),
        ({"lake": {"cache": "main", "uri": "/somewhere/else"}}, "lake.uri"),
        ({"lake": {}}, "lake.cache"),
        ({"lake": {"cache": "../x"}}, "lake.cache"),
        ({"engine": {"type": "fake", "trust_remote_code": True}}, "trust_remote_code"),
        ({"codecs": {}}, "codecs"),
        ({"teacher": {"model_dir": "~nobody-of-this-name/model"}}, "~nobody-of-this-name"),
        ({"lake": {"cache": "main", "uri": "~nobody-of-this-name/lake"}}, "~nobody-of-this-name"),
    ],
)
def test_a_job_out_of_bounds_is_refused_before_it_is_one(
    api: Api, capture: Callable[..., dict[str, Any]], teacher_world: Any, sections: dict[str, Any], said: str
) -> None:
    """With the key that is at fault."""
    (teacher_world.folder / "link").symlink_to("/etc")
    client = api(data_roots=[teacher_world.folder, teacher_world.model_dir], allow_stores=["s3://photos"])
    wanted = json.loads(json.dumps(sections).replace("{folder}", str(teacher_world.folder)))
    answer = client.post("/v1/jobs", json=capture(**wanted))
    assert (answer.status_code, answer.json()["code"]) == (422, "config_invalid")
    assert said in answer.json()["detail"]
    assert client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "é\udfff"])
@pytest.mark.parametrize(
    "place",
    [
        lambda text: {"teacher": {"model_dir": text}},
        lambda text: {"lake": {"cache": "main", "uri": text}},
        lambda text: {"plan": {"folder": text}},
        lambda text: {"data": [{"type": "llava", "path": text, "image_root": "/"}]},
        lambda text: {"data": [{"type": "llava", "path": "/", "image_root": text}]},
        lambda text: {"engine": {"type": "fake", text: 1}},
    ],
)
def test_text_that_no_file_holds_is_refused(
    api: Api, capture: Callable[..., dict[str, Any]], text: str, place: Callable[[str], dict[str, Any]]
) -> None:
    """Wherever in a configuration: NUL, and half of a character."""
    client = api()
    body, headers = json.dumps(capture(**place(text))), {"Content-Type": "application/json"}
    for path in ("/v1/jobs", "/v1/plans"):
        answer = client.post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), answer.text
        assert answer.json()["errors"][0]["pointer"] == "/body/config"


def test_a_job_is_found_by_each_label_that_it_may_have(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """In lists of the API and on the page; colons are where they may be."""
    client = api()
    labels = {
        "team": "a:b",
        "note": "two\nlines",
        "empty": "",
        "\n": "\x1b[31m",
        "é": "ü",
        "a:b": "c:d",
        "": "",
        ":": "::",
    }
    job = client.post("/v1/jobs", json=capture() | {"labels": labels}).json()["id"]
    client.post("/v1/jobs", json=capture())
    for name, value in labels.items():
        params = {"label": f"{name}:{value}"}
        assert [found["id"] for found in client.get("/v1/jobs", params=params).json()["data"]] == [job], name
        assert f"/jobs/{job}" in client.get("/jobs", params=params).text
    for other in ("team:b", ":" * 264):
        assert client.get("/v1/jobs", params={"label": other}).json()["data"] == []
    assert client.get("/v1/jobs", params={"label": "team"}).json()["code"] == "invalid_request"


def test_a_store_that_the_operator_allows_may_be_named(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """It, and what is below it."""
    client = api(allow_stores=["s3://photos/shared"], allow_hosts=["images.example.org"])
    allowed = {"allow_stores": ["s3://photos/shared/a/"], "allow_hosts": ["images.example.org"]}
    assert client.post("/v1/jobs", json=capture(images=allowed)).status_code == 201
    refused = {"allow_stores": ["s3://photos/shared-not"]}
    assert client.post("/v1/jobs", json=capture(images=refused)).status_code == 422


def test_who_does_not_see_the_cache_does_not_see_its_jobs(
    api: Api, capture: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Reading shows them to those whose token covers the cache; submitting and ordering need `submit`."""
    tokens = TokenStore(tmp_path / "tokens.sqlite")

    def header(name: str, scope: Any, cache: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {tokens.create(name, scope, (cache,))[0]}"}

    ada, bob, eve = header("ada", "submit", "main"), header("bob", "read", "ma*"), header("eve", "admin", "other")
    client = api(service={"tokens": tmp_path / "tokens.sqlite"})
    assert client.post("/v1/jobs", json=capture("main"), headers=eve).json()["code"] == "not_found"
    assert client.post("/v1/jobs", json=capture("main"), headers=bob).json()["code"] == "forbidden"
    job = client.post("/v1/jobs", json=capture("main"), headers=ada).json()["id"]
    for way in ("", "/events", "/logs"):
        assert client.get(f"/v1/jobs/{job}{way}", headers=eve).status_code == 404
    assert client.get("/v1/jobs", headers=eve).json()["data"] == []
    assert client.get(f"/v1/jobs/{job}", headers=bob).status_code == 200
    assert client.get(f"/v1/jobs/{job}/logs", headers=bob).json()["code"] == "forbidden"
    for order in ("cancel", "pause", "resume"):
        assert client.post(f"/v1/jobs/{job}/{order}", headers=eve).status_code == 404
        assert client.post(f"/v1/jobs/{job}/{order}", headers=bob).status_code == 403
    key = {"Idempotency-Key": "same"}
    one = client.post("/v1/jobs", json=capture("main"), headers=ada | key).json()["id"]
    carl = header("carl", "submit", "*")
    assert client.post("/v1/jobs", json=capture("main"), headers=carl | key).json()["id"] != one


def test_events_end_with_the_token_that_opened_them(
    api: Api, capture: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A token that is revoked while a stream goes on, or while somebody waits, hears of nothing that happens then."""
    tokens = TokenStore(tmp_path / "tokens.sqlite")
    client = api(service={"tokens": tmp_path / "tokens.sqlite"})
    (left, gone), (stays, _) = (tokens.create(who, "submit", ("main",)) for who in ("leaves", "stays"))
    mine, other = ({"Authorization": f"Bearer {text}"} for text in (left, stays))
    job = client.post("/v1/jobs", json=capture("main") | {"expires_in_s": 1e6}, headers=other).json()["id"]
    last = until_quiet(client, job, other)
    params, sse = {"after": last, "wait": 60}, {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
    with (
        ThreadPoolExecutor(1) as pool,
        client.stream("GET", f"/v1/jobs/{job}/events", headers=mine | sse) as streamed,
    ):
        lines = streamed.iter_lines()
        assert next(lines).startswith("retry")
        polled = pool.submit(client.get, f"/v1/jobs/{job}/events", params=params, headers=mine)
        tokens.revoke(gone.id)
        assert client.patch(f"/v1/jobs/{job}", json={"name": "secret"}, headers=other).status_code == 200
        assert "secret" not in "".join(lines)
        assert polled.result().status_code == 401


def until_quiet(client: httpx.Client, job: str, headers: dict[str, str]) -> int:
    """Pauses a job; the id of its last event then."""
    client.post(f"/v1/jobs/{job}/pause", headers=headers)
    while (now := client.get(f"/v1/jobs/{job}", headers=headers).json())["state"] != "paused":
        client.get(f"/v1/jobs/{job}/events", params={"after": now["last_event"], "wait": 30}, headers=headers)
    last: int = now["last_event"]
    return last


def test_every_route_of_a_job_is_behind_the_door(
    api: Api, capture: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The matrix, from the routes themselves: nobody, a foreign token, one that may look, one that may order."""
    tokens = TokenStore(tmp_path / "tokens.sqlite")
    headers = {
        who: {"Authorization": f"Bearer {tokens.create(who, scope, (cache,))[0]}"}
        for who, scope, cache in (
            ("foreign", "admin", "other"),
            ("reader", "read", "main"),
            ("submit", "submit", "main"),
        )
    } | {"nobody": {}}
    client = api(service={"tokens": tmp_path / "tokens.sqlite"})
    job = client.post("/v1/jobs", json=capture("main"), headers=headers["submit"]).json()["id"]
    routes = [route for router in (job_routes(), job_pages("/caches/")) for route in router.routes]
    of_jobs = [route for route in routes if isinstance(route, APIRoute) and "{job_id}" in route.path]
    assert len(of_jobs) > 8
    for route in of_jobs:
        path = route.path.replace("{job_id}", job).replace("{order}", "pause")
        (method,) = route.methods
        needs_submit = method in ("POST", "PATCH") or path.endswith("/logs")
        body = {} if method == "PATCH" else None

        def ask(who: str, method: str = method, path: str = path, body: Any = body) -> int:
            return client.request(method, path, headers=headers[who], json=body, follow_redirects=False).status_code

        assert (ask("nobody"), ask("foreign")) == (401, 404), route.path
        assert (ask("reader") == 403) == needs_submit, route.path
        assert ask("submit") in (200, 202, 204, 303, 409), route.path


def test_name_and_labels_are_edited_and_nobody_overwrites_another(
    api: Api, capture: Callable[..., dict[str, Any]]
) -> None:
    """Labels as a whole, in an ended job too; the tag is of these two alone, so progress does not change it."""
    client = api()
    made = client.post("/v1/jobs", json=capture() | {"name": "first", "labels": {"team": "a", "tier": "1"}}).json()
    path = f"/v1/jobs/{made['id']}"
    until(client, made["id"], *ENDED)
    tag = client.get(path).headers["etag"]
    assert tag == f'"{made["tag"]}"'
    edited = client.patch(path, json={"labels": {"team": "b"}}, headers={"If-Match": f'"other", {tag}'})
    assert (edited.status_code, edited.json()["name"], edited.json()["labels"]) == (200, "first", {"team": "b"})
    assert edited.headers["etag"] not in (tag, None)
    assert edited.headers["etag"] == client.get(path).headers["etag"]
    for stale in (tag, "other", "W/" + edited.headers["etag"], ""):
        late = client.patch(path, json={"name": "late"}, headers={"If-Match": stale})
        assert (late.status_code, late.json()["code"]) == (412, "precondition_failed"), stale
        assert late.headers["etag"] == edited.headers["etag"]
    assert client.patch(path, json={"name": "last"}, headers={"If-Match": "*"}).json()["labels"] == {"team": "b"}
    assert client.patch(path, json={}).json()["name"] == "last"
    for label, found in (("team:b", ["last"]), ("team:a", []), ("tier:1", [])):
        assert [job["name"] for job in client.get("/v1/jobs", params={"label": label}).json()["data"]] == found
    for wrong in ({"name": "x" * 101}, {"labels": {"a": 1}}, {"state": "queued"}, {"labels": {"a" * 64: ""}}):
        assert client.patch(path, json=wrong).json()["code"] == "invalid_request"
    assert client.patch("/v1/jobs/job_none", json={}).status_code == 404


def test_an_edit_after_the_end_is_the_last_event_by_both_roads(
    api: Api, capture: Callable[..., dict[str, Any]]
) -> None:
    """Neither road ends before it, nor waits for more behind it."""
    client = api()
    job = until(client, client.post("/v1/jobs", json=capture()).json()["id"], *ENDED)
    path = f"/v1/jobs/{job['id']}"
    client.patch(path, json={"name": "found later"})
    polled = client.get(f"{path}/events", params={"wait": 30}).json()
    assert polled["ended"]
    assert [event["event"] for event in polled["data"][-2:]] == ["state", "edited"]
    assert polled["data"][-1]["data"] == {"name": "found later"}
    for last in (0, job["last_event"]):
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
        with client.stream("GET", f"{path}/events", headers=headers) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("event: ")]
        assert lines[-1] == "event: edited"
    headers["Last-Event-ID"] = str(polled["next_after"])
    assert client.get(f"{path}/events", headers=headers).status_code == 204


def test_a_service_without_jobs_says_nothing_of_them(teacher: Any) -> None:
    """No route, and none in its document."""
    _, url = teacher()
    assert httpx.get(f"{url}/v1/jobs").status_code == 404
    assert "/v1/jobs" not in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_no_secret_of_the_environment_is_in_what_a_job_leaves(
    api: Api, capture: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canary in the environment: not in the job's files, events, log or lake."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-secret")
    client = api()
    job = until(client, client.post("/v1/jobs", json=capture()).json()["id"], *ENDED)
    assert job["state"] == "succeeded"
    seen = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    seen += [client.get(f"/v1/jobs/{job['id']}{way}").content for way in ("", "/events", "/logs")]
    assert not any(b"canary-of-a-secret" in data for data in seen)


def test_metrics_count_jobs_by_state(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """And a service that looks after its jobs is ready."""
    client = api()
    until(client, client.post("/v1/jobs", json=capture()).json()["id"], *ENDED)
    assert 'logitlake_jobs{state="succeeded"} 1.0' in client.get("/metrics").text
    assert client.get("/readyz").status_code == 200
