"""Runs over HTTP: trained as from the command line, stopped and resumed bit for bit, seen by those who may."""

import json
import os
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


STARTED = {"identity": {"stage": {"steps": 4}}}
DEEP = "[" * 100_000


def a_stage(runs: Path, run: str = "demo") -> Path:
    """The folder of a stage that was begun."""
    stage = runs / run / "d2d"
    stage.mkdir(parents=True)
    (stage / "started.json").write_text(json.dumps(STARTED))
    (stage / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    return stage


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("d2d/started.json", ""),
        ("d2d/started.json", "[]"),
        ("d2d/started.json", DEEP),
        ("d2d/started.json", '{"identity": {"stage": {"steps": "four"}}}'),
        ("d2d/started.json", '{"identity": null}'),
        ("d2d/done.json", "nonsense"),
        ("d2d/done.json", '{"figures": [1]}'),
        ("d2d/done.json", '{"figures": {"seconds": "\\ud800"}}'),
        ("d2d/metrics.jsonl", '{"step": 1, "lo\n{"step": 2}\n'),
        ("d2d/metrics.jsonl", '\n{"step": 2}\n'),
        ("d2d/metrics.jsonl", "[1]\n"),
        ("d2d/metrics.jsonl", '{"loss": 1}\n'),
        ("d2d/metrics.jsonl", '{"step": NaN}\n'),
        ("d2d/metrics.jsonl", f'{{"step": {"9" * 5000}}}\n'),
        ("d2d/metrics.jsonl", f'{{"step": {2**64}}}\n'),
        ("d2d/metrics.jsonl", f'{{"step": 1, "x": {DEEP}}}\n'),
        ("d2d/metrics.jsonl", '{"step": 1, "\\udc00": 1}\n'),
        ("d2d/metrics.jsonl", '{"step": 1, "experts": [{"load": []}]}\n'),
        ("d2d/metrics.jsonl", '{"step": 1, "experts": {"load": 1}}\n'),
        ("snapshots.json", '{"main": "newest"}'),
        ("snapshots.json", "[]"),
    ],
)
def test_a_damaged_run_is_its_own_trouble(student_api: StudentApi, tmp_path: Path, name: str, written: str) -> None:
    """In lists it is there with what is wrong, and hides no other; asked for, it says which file, and not where."""
    a_stage(tmp_path / "runs", "whole")
    a_stage(tmp_path / "runs")
    (tmp_path / "runs" / "demo" / name).write_text(written)
    client = student_api()
    damaged, whole = client.get("/v1/runs").raise_for_status().json()["data"]
    assert f"demo/{name}" in damaged["problem"]
    assert (damaged["stages"], whole["problem"], whole["stages"][0]["step"]) == ([], None, 1)
    page = client.get("/").raise_for_status().text
    assert f"demo/{name}" in page
    assert "/runs/whole" in page
    for path in ("/v1/runs/demo", "/runs/demo"):
        answer = client.get(path)
        assert answer.status_code == 500
        assert f"demo/{name}" in answer.text
        assert str(tmp_path) not in answer.text
    assert client.get("/v1/runs/demo").json()["code"] == "run_corrupt"


def test_a_damaged_run_is_no_trouble_for_whom_it_is_not_there(student_api: StudentApi, tmp_path: Path) -> None:
    """Nor is it told."""
    a_stage(tmp_path / "runs", "ours")
    (a_stage(tmp_path / "runs", "theirs") / "started.json").write_text("nonsense")
    token = TokenStore(tmp_path / "tokens.sqlite").create("ada", "read", ("ours",))[0]
    client = student_api(service={"tokens": tmp_path / "tokens.sqlite"})
    client.headers["Authorization"] = f"Bearer {token}"
    for path in ("/v1/runs", "/"):
        assert "theirs" not in client.get(path).raise_for_status().text
    assert client.get("/v1/runs/theirs").status_code == 404


@pytest.mark.parametrize("name", ["started.json", "done.json", "metrics.jsonl", "cached-mass.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("../../theirs/d2d/secret")])
def test_only_a_plain_file_is_read(
    student_api: StudentApi, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    """Nobody waits for a pipe, and no link shows what is another's."""
    secret = {"identity": {"stage": {"steps": 4711}}, "figures": {"x": 4711}, "samples_by_mass": [4711], "step": 4711}
    (a_stage(tmp_path / "runs", "theirs") / "secret").write_text(json.dumps(secret) + "\n")
    path = a_stage(tmp_path / "runs") / name
    path.unlink(missing_ok=True)
    make(path)
    client = student_api()
    assert "4711" not in client.get("/v1/runs").raise_for_status().text
    for asked in ("/v1/runs/demo", "/runs/demo", "/v1/runs/demo/metrics", "/v1/runs/demo/checkpoints"):
        assert "4711" not in client.get(asked).text
    answer = client.get("/runs/demo")
    assert answer.status_code == 500
    assert f"demo/d2d/{name}" in answer.text


def test_a_stage_that_is_a_link_is_none(student_api: StudentApi, tmp_path: Path) -> None:
    """It may lead into a run that is not for whoever asks."""
    a_stage(tmp_path / "runs", "theirs")
    a_stage(tmp_path / "runs")
    (tmp_path / "runs" / "demo" / "d2s").symlink_to("../theirs/d2d")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "d2d").symlink_to("../theirs/d2d")
    client = student_api()
    assert [stage["name"] for stage in client.get("/v1/runs/demo").json()["stages"]] == ["d2d"]
    assert client.get("/v1/runs/other").status_code == 404


def test_figures_that_are_no_numbers_are_null(student_api: StudentApi, tmp_path: Path) -> None:
    """Those at the end of a stage too; and a page draws what can be drawn."""
    stage = a_stage(tmp_path / "runs")
    (stage / "done.json").write_text('{"figures": {"seconds": NaN, "steps": 4}}')
    lines = [{"step": 1, "ce": "much"}, {"step": 2, "ce": 10**400}, {"step": 3, "ce": 0.5}, {"step": 4, "ce": [1]}]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    client = student_api()
    (shown,) = client.get("/v1/runs/demo").raise_for_status().json()["stages"]
    assert shown["figures"] == {"seconds": None, "steps": 4}
    assert client.get("/runs/demo").status_code == 200


def test_a_checkpoint_that_leads_elsewhere_has_no_size(student_api: StudentApi, tmp_path: Path) -> None:
    """Of what is there, nothing is told."""
    stage = a_stage(tmp_path / "runs")
    (stage / "checkpoint-3").mkdir()
    (stage / "checkpoint-3" / "weights").write_bytes(bytes(5))
    (stage / "checkpoint-4").symlink_to("/etc")
    saved = student_api().get("/v1/runs/demo/checkpoints").json()
    assert [(one["step"], one["bytes"]) for one in saved] == [(3, 5), (4, 0)]
