"""What Prometheus reads of a teacher service: what its jobs did, each sample once, however often they were killed."""

from collections.abc import Callable
from typing import Any

import httpx
from tests.teacher_service.api.conftest import Api
from tests.teacher_service.api.test_jobs import ENDED, until
from tests.teacher_service.conftest import NUM_SAMPLES

OUTCOMES = ("succeeded", "failed", "quarantined", "skipped_cached")


def read(client: httpx.Client) -> dict[str, float]:
    """The values of `/metrics` by name and labels, as they stand there."""
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def samples(found: dict[str, float]) -> dict[str, float]:
    """The samples by their outcome."""
    return {outcome: found[f'logitlake_samples_total{{outcome="{outcome}"}}'] for outcome in OUTCOMES}


def test_samples_tokens_and_bytes_are_those_of_the_jobs(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """One commit a unit; a job that finds everything done adds what it skipped, and nothing else."""
    client = api()
    assert set(samples(read(client)).values()) == {0}
    job = until(client, client.post("/v1/jobs", json=capture()).json()["id"], *ENDED)
    assert job["state"] == "succeeded", job
    first = read(client)
    assert samples(first) == {outcome: job["counts"][outcome] for outcome in OUTCOMES}
    assert samples(first)["succeeded"] == NUM_SAMPLES
    assert first["logitlake_teacher_tokens_total"] == job["result"]["tokens"]
    assert first["logitlake_shard_bytes_total"] == job["result"]["bytes"]
    assert first["logitlake_shard_commit_seconds_count"] == job["result"]["units"] > 1
    assert 0 < first["logitlake_shard_commit_seconds_sum"] < 60

    again = until(client, client.post("/v1/jobs", json=capture()).json()["id"], *ENDED)
    assert again["counts"]["skipped_cached"] == NUM_SAMPLES
    second = read(client)
    assert samples(second) == samples(first) | {"skipped_cached": NUM_SAMPLES}
    for name in ("teacher_tokens_total", "shard_bytes_total", "shard_commit_seconds_count"):
        assert second[f"logitlake_{name}"] == first[f"logitlake_{name}"]
    moved = {name: count for name, count in second.items() if name.startswith("logitlake_job_transitions_total")}
    assert moved['logitlake_job_transitions_total{from="none",to="queued"}'] == 2
    assert moved['logitlake_job_transitions_total{from="queued",to="validating"}'] == 2


def test_attempts_that_are_killed_count_no_sample_twice(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """Each commits two units and is killed at the third, until two are left."""
    client = api(retry_s=0.001, max_attempts=100)
    dies = {"type": "fake", "die_after_calls": 2}
    job = until(client, client.post("/v1/jobs", json=capture(engine=dies)).json()["id"], *ENDED)
    assert job["state"] == "succeeded", job
    assert len(job["attempts"]) > 2
    found = read(client)
    assert samples(found) == {outcome: job["counts"][outcome] for outcome in OUTCOMES}
    assert samples(found)["succeeded"] == NUM_SAMPLES
    assert 0 < found["logitlake_teacher_tokens_total"] <= job["result"]["tokens"]
    assert found['logitlake_job_transitions_total{from="running",to="interrupted"}'] == len(job["attempts"]) - 1
