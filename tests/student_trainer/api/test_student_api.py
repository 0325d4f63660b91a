"""Runs over HTTP: trained as from the command line, stopped and resumed bit for bit, seen by those who may."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tests.student_trainer.api.conftest import StudentApi

from logitlake_shared.web.tokens import TokenStore
from logitlake_student.api.pages import page_routes
from logitlake_student.api.runs import run_routes
from logitlake_student.run_files import thinned

ENDED = ("succeeded", "failed", "cancelled", "expired")
# Steps of a stage that is paused in its middle, of some 20 ms each: seven times what goes by between the first that is
# told and the order to pause.
LONG = 300
STAGES = ({"type": "d2d", "steps": LONG, "save_every": 1000}, {"type": "d2s", "steps": 2})

Training = Callable[..., dict[str, Any]]


def until(client: httpx.Client, job: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job once it is so."""
    after = 0
    while True:
        found: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        if is_so(found):
            return found
        assert found["state"] not in ENDED, (found, client.get(f"/v1/jobs/{job}/logs").text)
        after = client.get(f"/v1/jobs/{job}/events", params={"after": after, "wait": 30}).json()["next_after"]


def has_ended(job: dict[str, Any]) -> bool:
    """Whether it has."""
    return job["state"] in ENDED


def test_a_run_that_is_paused_and_resumed_is_the_one_of_the_command_line(
    student_api: StudentApi, training: Training, student_world: Any, tmp_path: Path
) -> None:
    """To the last bit, though no checkpoint was due: the pause writes one. Counts are optimiser steps."""
    client = student_api()
    with student_world.start(student_world.file(*STAGES, output=str(tmp_path / "plain"))) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err

    answer = client.post("/v1/jobs", json=training("demo", *STAGES))
    assert answer.status_code == 201, answer.text
    job = answer.json()["id"]
    until(client, job, lambda now: now["figures"].get("step", 0) > 0)
    client.post(f"/v1/jobs/{job}/pause")
    until(client, job, lambda now: now["state"] == "paused")
    (saved,) = client.get("/v1/runs/demo/checkpoints").json()
    assert 0 < saved["step"] < LONG
    client.post(f"/v1/jobs/{job}/resume")
    done = until(client, job, has_ended)
    assert done["state"] == "succeeded", client.get(f"/v1/jobs/{job}/logs").text
    assert done["counts"]["total"] == done["counts"]["succeeded"] == LONG + 2
    assert len(done["attempts"]) == 2
    for stage in ("d2d", "d2s"):
        for name in ("model/model.safetensors", "metrics.jsonl"):
            plain, run = (folder / stage / name for folder in (tmp_path / "plain", tmp_path / "runs" / "demo"))
            assert plain.read_bytes() == run.read_bytes(), (stage, name)

    run = client.get("/v1/runs/demo").json()
    assert [(stage["name"], stage["is_done"], stage["step"]) for stage in run["stages"]] == [
        ("d2d", True, LONG),
        ("d2s", True, 2),
    ]
    assert run["job"] == job
    assert run["snapshots"]["main"] == 1
    metrics = client.get("/v1/runs/demo/metrics", params={"stage": "d2d", "after_step": 2, "points": 3}).json()
    steps = [line["step"] for line in metrics[0]["data"]]
    assert (steps[0], steps[-1], len(steps), metrics[0]["total"]) == (3, LONG, 3, LONG - 2)
    kinds = [(saved["stage"], saved["kind"]) for saved in client.get("/v1/runs/demo/checkpoints").json()]
    assert kinds == [("d2d", "model"), ("d2s", "model")]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"output": "../elsewhere"}, "`output`"),
        ({"output": "/etc/x"}, "`output`"),
        ({"data": {"lake": "/etc", "samples": "main"}}, "data.lake"),
        ({"data": {"lake": "https://lake.example.org/v1/files", "samples": "main"}}, "data.lake"),
        ({"student": {"checkpoint": "/etc"}}, "student.checkpoint"),
        ({"student": {"checkpoint": "somebody/model"}}, "student.checkpoint"),
        ({"stages": []}, "stages"),
        ({"devise": "cpu"}, "did you mean `device`"),
    ],
)
def test_a_job_out_of_bounds_is_refused_before_it_is_one(
    student_api: StudentApi, training: Training, config: dict[str, Any], said: str
) -> None:
    """With the key that is at fault."""
    client = student_api()
    sent = training("demo", {"type": "d2d"})
    sent["config"] |= config
    answer = client.post("/v1/jobs", json=sent)
    assert (answer.status_code, answer.json()["code"]) == (422, "config_invalid")
    assert said in answer.json()["detail"]
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_token_shows_the_runs_that_it_covers(
    student_api: StudentApi, student_world: Any, training: Training, tmp_path: Path
) -> None:
    """And trains no other."""
    for name in ("ours", "theirs"):
        stage = tmp_path / "runs" / name / "d2d"
        stage.mkdir(parents=True)
        (stage / "started.json").write_text(json.dumps({"identity": {"stage": {"steps": 4}}}))
    tokens = TokenStore(tmp_path / "tokens.sqlite")
    token = tokens.create("ada", "submit", ("ours",))[0]
    client = student_api(service={"tokens": tmp_path / "tokens.sqlite"})
    client.headers["Authorization"] = f"Bearer {token}"
    assert [run["name"] for run in client.get("/v1/runs").json()["data"]] == ["ours"]
    routes = [route for router in (run_routes(), page_routes()) for route in router.routes]
    of_runs = [route.path for route in routes if isinstance(route, APIRoute) and "{run}" in route.path]
    assert len(of_runs) > 3
    for path in of_runs:
        assert client.get(path.replace("{run}", "ours")).status_code == 200
        assert client.get(path.replace("{run}", "theirs")).status_code == 404
        assert httpx.get(f"{client.base_url}{path.replace('{run}', 'ours')}").status_code == 401
    assert client.post("/v1/jobs", json=training("theirs", {"type": "d2d"})).json()["code"] == "not_found"


def test_what_is_no_run_is_none(student_api: StudentApi, tmp_path: Path) -> None:
    """Folders without a stage, links, names that lead elsewhere."""
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "link").symlink_to("/etc")
    client = student_api()
    assert client.get("/v1/runs").json()["data"] == []
    for name in ("notes", "link", "%2e%2e", "absent"):
        assert client.get(f"/v1/runs/{name}").status_code == 404


def test_metrics_that_are_no_numbers_or_half_written_are_read(student_api: StudentApi, tmp_path: Path) -> None:
    """NaN is null; a line that a trainer is writing is not there yet."""
    stage = tmp_path / "runs" / "demo" / "d2d"
    stage.mkdir(parents=True)
    (stage / "started.json").write_text(json.dumps({"identity": {"stage": {"steps": 4}}}))
    (stage / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    client = student_api()
    (metrics,) = client.get("/v1/runs/demo/metrics").json()
    assert metrics["data"] == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_thinning_keeps_the_ends() -> None:
    """And as many lines as asked for, in order."""
    lines = [{"step": step} for step in range(1000)]
    thin = thinned(lines, 10)
    assert len(thin) == 10
    assert (thin[0], thin[-1]) == (lines[0], lines[-1])
    assert thin == sorted(thin, key=lambda line: line["step"])
    assert thinned(lines[:5], 10) == lines[:5]


def test_every_answer_is_as_declared(student_api: StudentApi) -> None:
    """schemathesis makes the questions from the OpenAPI document."""
    document = f"{student_api().base_url}/openapi.json"
    for operation in [result.ok() for result in schemathesis.openapi.from_url(document).get_all_operations()]:

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answers_as_declared(case: Any) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        answers_as_declared()
