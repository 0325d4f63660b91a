"""What Prometheus reads of a teacher service: what its jobs did, each sample once, however often they were killed."""

from collections.abc import Callable
from typing import Any

import httpx
from tests.teacher_service.api.conftest import Api
from tests.teacher_service.api.test_jobs import ENDED, until
from tests.teacher_service.conftest import NUM_SAMPLES

from logitlake_teacher.config import FakeEngineConfig

TOKENS = tuple(f'teacher_tokens_total{{kind="{kind}"}}' for kind in ("prompt", "image", "response"))
OUTCOMES = ("succeeded", "failed", "quarantined", "skipped_cached")

TOKENS_PER_IMAGE = FakeEngineConfig().tokens_per_image


def read(client: httpx.Client) -> dict[str, float]:
    """The values of `/metrics` by name and labels, as they stand there."""
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def samples(found: dict[str, float]) -> dict[str, float]:
    """The samples by their outcome, of all codes."""
    of_code = {name: value for name, value in found.items() if name.startswith("logitlake_samples_total{")}
    return {
        outcome: sum(value for name, value in of_code.items() if f'outcome="{outcome}"' in name) for outcome in OUTCOMES
    }


def lookups(found: dict[str, float]) -> tuple[float, float]:
    """Hits and misses of the cache."""
    hits, misses = (found[f'logitlake_cache_lookups_total{{result="{result}"}}'] for result in ("hit", "miss"))
    return hits, misses


def test_samples_tokens_and_bytes_are_those_of_the_jobs(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """One commit a unit; a job that finds everything done adds what it skipped, and nothing else."""
    client = api()
    assert set(samples(read(client)).values()) == {0}
    job = until(client, client.post("/v1/jobs", json=capture()).json()["id"], *ENDED)
    assert job["state"] == "succeeded", job
    first = read(client)
    assert samples(first) == {outcome: job["counts"][outcome] for outcome in OUTCOMES}
    assert samples(first)["succeeded"] == NUM_SAMPLES
    assert lookups(first) == (0, NUM_SAMPLES)
    assert first['logitlake_teacher_tokens_total{kind="response"}'] == job["result"]["tokens"]
    assert first['logitlake_teacher_tokens_total{kind="image"}'] == TOKENS_PER_IMAGE * NUM_SAMPLES
    assert first["logitlake_teacher_batch_seconds_count"] == job["result"]["units"]
    assert first["logitlake_shard_bytes_total"] == job["result"]["bytes"]
    assert first["logitlake_shard_commit_seconds_count"] == job["result"]["units"] > 1
    assert 0 < first["logitlake_shard_commit_seconds_sum"] < 60

    again = until(client, client.post("/v1/jobs", json=capture()).json()["id"], *ENDED)
    assert again["counts"]["skipped_cached"] == NUM_SAMPLES
    second = read(client)
    assert samples(second) == samples(first) | {"skipped_cached": NUM_SAMPLES}
    assert lookups(second) == (NUM_SAMPLES, NUM_SAMPLES)
    counted = (*TOKENS, "teacher_batch_seconds_count", "shard_bytes_total", "shard_commit_seconds_count")
    for name in counted:
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
    assert lookups(found) == (0, NUM_SAMPLES)
    assert 0 < found['logitlake_teacher_tokens_total{kind="response"}'] <= job["result"]["tokens"]
    assert 0 < found["logitlake_teacher_batch_seconds_count"] <= job["result"]["units"]
    assert found['logitlake_job_transitions_total{from="running",to="interrupted"}'] == len(job["attempts"]) - 1


def test_what_failed_is_counted_by_code(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """As the cache's own errors have it, and the job; a job that finds these errors committed adds none of them."""
    client = api()
    engine = {"type": "fake", "wrong": {"s003": "duplicate_id", "s011": "duplicate_id"}}
    for _ in range(2):
        job = until(
            client, client.post("/v1/jobs", json=capture(engine=engine, max_error_rate=1.0)).json()["id"], *ENDED
        )
        assert job["state"] == "succeeded", job
    listed = client.get("/v1/caches/main/errors").json()["data"]
    assert [error["code"] for error in listed] == ["teacher_invalid"] * 2
    found = read(client)
    assert found['logitlake_samples_total{code="teacher_invalid",outcome="failed"}'] == 2
    assert samples(found) == {
        "succeeded": NUM_SAMPLES - 2, "failed": 2, "quarantined": 0, "skipped_cached": NUM_SAMPLES
    }  # fmt: skip
    assert lookups(found) == (NUM_SAMPLES, NUM_SAMPLES)
    assert job["errors"] == {}
    first = client.get("/v1/jobs").json()["data"][-1]
    assert first["errors"] == {"teacher_invalid": 2}
