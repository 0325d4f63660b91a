"""A service's jobs on a real Ray cluster, through its Jobs API."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.teacher_service.api.conftest import Api
from tests.teacher_service.api.test_jobs import ENDED, until
from tests.teacher_service.conftest import NUM_SAMPLES
from tests.teacher_service.test_jobs_cli import cluster, head

from logitlake_teacher.ray_jobs import STOP_MARGIN_S

__all__ = ["cluster", "head"]

GRACE_S = 1.0
RAY = {"type": "ray", "num_actors": 1, "backoff_s": 0.1, "grace_s": GRACE_S}
# Until a busy machine has seen it.
LATE_S = 15.0

Capture = Callable[..., dict[str, Any]]


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_runs_on_the_cluster_is_paused_resumed_and_planned(
    cluster: dict[str, str], api: Api, capture: Capture, teacher_world: Any
) -> None:
    """The same states, counts and logs as on the service's own machine; the plan's digest binds it there, too. What is
    to end `now` ends as it would be asked to: Ray knows no other way, and bounds it."""
    client = api(ray_address=cluster["RAY_ADDRESS"], stop_s=300.0)
    hanging = capture(engine={"type": "fake", "hang_on": ["s007"]}, executor=RAY)
    job = client.post("/v1/jobs", json=hanging).json()["id"]
    until(client, job, "running")
    assert client.post(f"/v1/jobs/{job}/pause").status_code == 202
    until(client, job, "paused")
    client.post(f"/v1/jobs/{job}/resume")
    until(client, job, "running")
    asked = time.monotonic()
    client.post(f"/v1/jobs/{job}/cancel", json={"mode": "now"})
    until(client, job, "cancelled")
    assert time.monotonic() - asked < GRACE_S + STOP_MARGIN_S + LATE_S

    plan = client.post("/v1/plans", params={"wait": 60}, json=capture(executor=RAY)).json()
    digest = plan["result"]["plan_digest"]
    good = client.post("/v1/jobs", json=capture(executor=RAY) | {"plan_digest": digest}).json()["id"]
    done = until(client, good, *ENDED)
    assert done["state"] == "succeeded", client.get(f"/v1/jobs/{good}/logs").text
    counts = done["counts"]
    assert counts["succeeded"] + counts["skipped_cached"] == counts["total"] == NUM_SAMPLES
    assert f"{NUM_SAMPLES} samples" in client.get(f"/v1/jobs/{good}/logs").text

    bad = client.post("/v1/jobs", json=capture("other", executor=RAY) | {"plan_digest": "0" * 64}).json()["id"]
    failed = until(client, bad, *ENDED)
    assert failed["fault"]["error"] == "DataError"
