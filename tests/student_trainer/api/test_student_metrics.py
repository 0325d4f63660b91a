"""What Prometheus reads of a student service: steps and tokens, each once, and where the time goes."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.student_trainer.api.conftest import StudentApi
from tests.student_trainer.api.test_student_api import LONG, Training, has_ended, until


def read(client: httpx.Client) -> dict[str, float]:
    """The values of `/metrics` by name and labels, as they stand there."""
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def done(client: httpx.Client, job: str) -> dict[str, Any]:
    """The job once it succeeded."""
    ended = until(client, job, has_ended)
    assert ended["state"] == "succeeded", client.get(f"/v1/jobs/{job}/logs").text
    return ended


def test_steps_are_timed_once_over_a_pause_and_experts_are_those_of_the_metrics(
    student_api: StudentApi, training: Training, tmp_path: Path
) -> None:
    """The wait for data is part of a step. What a service does not know it does not say."""
    client = student_api()
    before = read(client)
    assert before["logitlake_train_step_seconds_count"] == before["logitlake_train_tokens_total"] == 0
    assert not any("expert_load_max_ratio" in name for name in before)
    stages = ({"type": "d2d", "steps": LONG, "save_every": 1000}, {"type": "d2s", "steps": 3, "log_every": 1})
    job = client.post("/v1/jobs", json=training("demo", *stages)).json()["id"]
    until(client, job, lambda now: now["figures"].get("step", 0) > 0)
    client.post(f"/v1/jobs/{job}/pause")
    until(client, job, lambda now: now["state"] == "paused")
    (saved,) = client.get("/v1/runs/demo/checkpoints").json()
    assert read(client)["logitlake_train_step_seconds_count"] == saved["step"]
    client.post(f"/v1/jobs/{job}/resume")
    done(client, job)
    found = read(client)
    assert found["logitlake_train_step_seconds_count"] == LONG + 3
    assert found['logitlake_train_step_seconds_bucket{le="+Inf"}'] == LONG + 3
    assert 0 < found["logitlake_data_wait_seconds_total"] < found["logitlake_train_step_seconds_sum"]
    last = json.loads((tmp_path / "runs/demo/d2s/metrics.jsonl").read_text().splitlines()[-1])
    ratios = [len(layer["load"]) * max(layer["load"]) for layer in last["experts"]]
    names = [f'logitlake_expert_load_max_ratio{{layer="{layer}"}}' for layer in range(len(ratios))]
    assert [found[name] for name in names] == pytest.approx(ratios)
    assert "logitlake_samples_total" not in found
