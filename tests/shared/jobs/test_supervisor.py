"""Jobs go from their submission to their end, through whatever kills the service or the work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.shared.jobs.conftest import PATIENCE_S, Workshop

from logitlake_shared.errors import ConfigError
from logitlake_shared.jobs.orders import cancel, pause, resume
from logitlake_shared.jobs.records import Counts, Job, JobState
from logitlake_shared.jobs.states import ACTIVE, ENDED

S = JobState
PHASES = ("validating", "running", "finalizing")


def is_whole(job: Job) -> bool:
    """Whether the counts add up."""
    parts = job.counts.model_dump(exclude={"total"})
    return sum(parts.values()) == job.counts.total


def test_a_job_goes_through_its_phases_and_says_what_it_came_to(workshop: Workshop) -> None:
    """Counts, figures and the result are the work's own words."""
    job = workshop.until_state(workshop.submit(items=3), *ENDED)
    assert job.state is S.SUCCEEDED, workshop.log(job)
    assert workshop.states(job) == ["queued", "validating", "running", "finalizing", "succeeded"]
    assert job.counts == Counts(total=3, succeeded=3)
    assert (job.outcome, job.result, job.fault) == ("complete", {"items": 3}, None)
    assert [attempt.exit_code for attempt in job.attempts] == [0]


def test_items_that_failed_make_a_success_partial_and_done_before_is_skipped(workshop: Workshop) -> None:
    """What was there before the job began is not counted as its own."""
    (workshop.folder / "done").write_text("0\n1\n")
    job = workshop.until_state(workshop.submit(items=5, bad=3), *ENDED)
    assert job.counts == Counts(total=5, succeeded=2, failed=1, errors={"image_missing": 1}, skipped_cached=2)
    assert job.outcome == "partial"


def test_an_error_is_the_jobs_fault_and_is_not_tried_again(workshop: Workshop) -> None:
    """Its class and its words."""
    job = workshop.until_state(workshop.submit(refuses="record 7: no conversations"), *ENDED)
    assert job.state is S.FAILED
    assert job.fault is not None
    assert (job.fault.error, job.fault.message) == ("DataError", "record 7: no conversations")
    assert len(job.attempts) == 1


def test_work_that_is_killed_goes_on_in_another_attempt(workshop: Workshop) -> None:
    """Each item once."""
    job = workshop.until_state(workshop.submit(items=4, dies_at=2), *ENDED)
    assert job.state is S.SUCCEEDED
    assert workshop.done() == ["0", "1", "2", "3"]
    assert [attempt.exit_code for attempt in job.attempts] == [None, 0]
    assert job.counts == Counts(total=4, succeeded=4)
    assert "interrupted" in workshop.states(job)


def test_work_that_is_killed_again_and_again_fails(workshop: Workshop) -> None:
    """After as many attempts as it may have, and the counts say what was given up."""
    job = workshop.submit(items=4, wait_in="running", max_attempts=2)
    for number in (1, 2):
        workshop.until(job, lambda now, number=number: len(now.attempts) == number)  # type: ignore[misc]
        workshop.until_it_waits(job)
        os.kill(workshop.pid(job), signal.SIGKILL)
    job = workshop.until_state(job, *ENDED)
    assert job.state is S.FAILED
    assert job.fault is not None
    assert "2 attempts" in job.fault.message
    assert is_whole(job)
    assert job.counts.cancelled == 4


@pytest.mark.parametrize("phase", PHASES)
def test_cancel_ends_the_work_and_keeps_what_is_done(workshop: Workshop, phase: str) -> None:
    """In every phase; twice is the same; nothing brings the job back."""
    job = workshop.until_it_waits(workshop.submit(items=3, wait_in=phase))
    asked = cancel(workshop.store, job)
    assert asked.state is S.CANCELLING
    assert cancel(workshop.store, asked) == asked
    job = workshop.until_state(job, *ENDED)
    assert job.state is S.CANCELLED
    assert is_whole(job)
    assert len(workshop.done()) == {"validating": 0, "running": 0, "finalizing": 3}[phase]


def test_work_that_does_not_heed_is_killed(tmp_path: Path) -> None:
    """When its time is over; and at once where that is asked for."""
    for now in (False, True):
        (tmp_path / str(now)).mkdir()
        workshop = Workshop(tmp_path / str(now), stop_s=0.05 if not now else 1e6)
        job = workshop.until_it_waits(workshop.submit(wait_in="running", heeds=False))
        cancel(workshop.store, job, now=now)
        assert workshop.until_state(job, *ENDED).state is S.CANCELLED
        os.close(workshop.gate)


def test_a_paused_job_waits_until_it_is_resumed(workshop: Workshop) -> None:
    """And others of the same subject go before it meanwhile."""
    job = workshop.until_it_waits(workshop.submit(items=2, wait_in="running"))
    pause(workshop.store, job)
    job = workshop.until_state(job, S.PAUSED)
    assert workshop.until_state(workshop.submit(items=2), *ENDED).state is S.SUCCEEDED
    assert workshop.job(job).state is S.PAUSED
    resume(workshop.store, job)
    workshop.open_gate()
    workshop.open_gate()
    job = workshop.until_state(job, *ENDED)
    assert (job.state, len(job.attempts)) == (S.SUCCEEDED, 2)


def test_a_job_whose_time_is_over_expires(workshop: Workshop) -> None:
    """Whether somebody works on it or not."""
    working = workshop.until_it_waits(workshop.submit(wait_in="running", expires_in_s=3600))
    waiting = workshop.submit(expires_in_s=0.001)
    assert workshop.until_state(waiting, *ENDED).state is S.EXPIRED
    workshop.store._connection().execute("UPDATE jobs SET expires = 1 WHERE id = ?", (working.id,))
    assert workshop.until_state(working, *ENDED).state is S.EXPIRED
    assert is_whole(workshop.job(working))


def test_a_light_job_waits_for_no_other(workshop: Workshop) -> None:
    """A plan is answered while a capture of the same cache runs."""
    job = workshop.until_it_waits(workshop.submit(items=9, wait_in="running"))
    light = workshop.until_state(workshop.submit(items=0, lane=None), *ENDED)
    assert light.state is S.SUCCEEDED
    assert workshop.job(job).state is S.RUNNING


def test_jobs_of_a_lane_run_one_after_the_other_and_no_more_at_once_than_may(tmp_path: Path) -> None:
    """The oldest first."""
    workshop = Workshop(tmp_path, max_running=2)
    jobs = [workshop.submit(subject=subject, wait_in="validating") for subject in ("one", "one", "two", "three")]
    workshop.until_it_waits(jobs[0])
    workshop.until_it_waits(jobs[2])
    workshop.supervisor.step()
    assert [workshop.job(job).state for job in jobs] == [S.VALIDATING, S.QUEUED, S.VALIDATING, S.QUEUED]
    for job in jobs:
        if workshop.job(job).state not in ENDED:
            cancel(workshop.store, workshop.job(job))
    for job in jobs:
        workshop.until_state(job, *ENDED)
    os.close(workshop.gate)


def test_an_attempt_that_ended_leaves_nothing_behind(workshop: Workshop) -> None:
    """No zombie, whether or not anybody looks after the jobs any more."""
    process = workshop.pid(workshop.until_it_waits(workshop.submit(wait_in="running")))
    os.killpg(process, signal.SIGKILL)
    end = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)  # the kernel has to take it down


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("work_dies", [False, True], ids=["work lives", "work dies"])
def test_a_new_service_goes_on_where_the_old_one_was(workshop: Workshop, phase: str, work_dies: bool) -> None:
    """Work that went on alone is found again; work that died with the service goes on in another attempt."""
    job = workshop.until_it_waits(workshop.submit(items=2, wait_in=phase))
    if work_dies:
        os.killpg(workshop.pid(job), signal.SIGKILL)
    workshop.restart()
    for _ in range(3):  # one may go to the work that dies
        workshop.open_gate()
    job = workshop.until_state(job, *ENDED)
    assert job.state is S.SUCCEEDED
    assert len(job.attempts) == 1 + work_dies
    assert workshop.done() == ["0", "1"]
    assert is_whole(job)


def test_a_new_service_goes_on_with_what_waits_and_leaves_what_ended(workshop: Workshop) -> None:
    """Queued, paused, cancelling, interrupted, ended."""
    ended = workshop.until_state(workshop.submit(subject="a"), *ENDED)
    queued, paused = workshop.submit(subject="b"), pause(workshop.store, workshop.submit(subject="c"))
    begun = workshop.store.begin_attempt(workshop.submit(subject="d").id)  # and the service died before it started it
    workshop.restart()
    assert workshop.until_state(queued, *ENDED).state is S.SUCCEEDED
    begun = workshop.until_state(begun, *ENDED)
    assert (begun.state, len(begun.attempts)) == (S.SUCCEEDED, 2)
    assert workshop.job(paused).state is S.PAUSED
    assert workshop.job(ended) == ended
    cancelling = workshop.until_it_waits(workshop.submit(subject="e", items=9, wait_in="running"))
    cancel(workshop.store, cancelling)
    workshop.restart()
    assert workshop.until_state(cancelling, *ENDED).state is S.CANCELLED


def test_what_was_heard_before_a_restart_is_not_heard_again(workshop: Workshop) -> None:
    """Every event once."""
    job = workshop.until_it_waits(workshop.submit(items=3, wait_in="finalizing"))
    workshop.restart()
    workshop.open_gate()
    workshop.until_state(job, *ENDED)
    events = workshop.store.events(job.id, 0, 1000)
    heard = [event.data["figures"].get("last") for event in events if "figures" in event.data]
    assert len(heard) == len(set(heard))
    assert workshop.states(job).count("running") == 1


def test_work_can_be_ended_though_its_service_was_killed_before_it_wrote_down_its_process(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who it is, the work says itself."""
    job = workshop.submit(items=1, wait_in="running")
    with monkeypatch.context() as killed:
        killed.setattr(os, "pwrite", lambda *_: 0)
        workshop.supervisor.step()
    workshop.until_it_waits(job)
    cancel(workshop.store, workshop.job(job))
    assert workshop.until_state(job, *ENDED).state is S.CANCELLED


def test_a_second_supervisor_of_a_folder_is_refused(workshop: Workshop) -> None:
    """Two would start everything twice."""
    other = Workshop(workshop.folder)
    with workshop.supervisor, pytest.raises(ConfigError, match="another service"), other.supervisor:
        pass
    os.close(other.gate)


# What is submitted, what is asked of it, and where a service that goes on brings it.
KILLED_IN: dict[S, tuple[dict[str, Any], Any, S]] = {
    S.QUEUED: ({"lane": "busy"}, None, S.SUCCEEDED),
    S.VALIDATING: ({"wait_in": "validating"}, None, S.SUCCEEDED),
    S.RUNNING: ({"wait_in": "running"}, None, S.SUCCEEDED),
    S.FINALIZING: ({"wait_in": "finalizing"}, None, S.SUCCEEDED),
    S.PAUSED: ({"wait_in": "running"}, pause, S.PAUSED),
    S.CANCELLING: ({"wait_in": "running", "heeds": False}, cancel, S.CANCELLED),
    S.INTERRUPTED: ({"dies_at": 0}, None, S.SUCCEEDED),
    S.SUCCEEDED: ({}, None, S.SUCCEEDED),
    S.FAILED: ({"refuses": "no"}, None, S.FAILED),
    S.CANCELLED: ({"wait_in": "running"}, cancel, S.CANCELLED),
    S.EXPIRED: ({"lane": "busy", "expires_in_s": 0.1}, None, S.EXPIRED),
}
SERVICE = (
    "import sys, time; from pathlib import Path; from tests.shared.jobs.conftest import Workshop\n"
    "workshop = Workshop(Path(sys.argv[1]), max_running=3, retry_s=float(sys.argv[2]), stop_s=1e6)\n"
    "workshop.supervisor.__enter__(); time.sleep(600)"
)


@pytest.mark.parametrize("state", JobState)
def test_a_service_that_is_killed_in_any_state_of_a_job_is_followed_by_one_that_goes_on(
    tmp_path: Path, state: S
) -> None:
    """A real one, in a process of its own, by SIGKILL; its work lives on. No item is done twice, no end is left."""
    workshop = Workshop(tmp_path, max_running=3, stop_s=0.1)
    work, order, end = KILLED_IN[state]
    other = workshop.submit(lane="busy", items=9, wait_in="running") if work.get("lane") == "busy" else None
    job = workshop.submit(**({"items": 1} | work))
    retry_s = "1e6" if state is S.INTERRUPTED else "0.001"
    service = subprocess.Popen([sys.executable, "-c", SERVICE, str(tmp_path), retry_s])
    step, workshop.supervisor.step = workshop.supervisor.step, lambda: None  # type: ignore[method-assign]
    try:
        if order is not None:
            order(workshop.store, workshop.until_it_waits(job))
        workshop.until_state(job, state)
        if work.get("wait_in") == state:
            workshop.until_it_waits(job)
    finally:
        service.kill()
        service.wait()
    workshop.store._connection().execute("UPDATE jobs SET retry_at = 0 WHERE state = 'interrupted'")
    workshop.supervisor.step = step  # type: ignore[method-assign]
    workshop.restart()
    if other is not None:
        cancel(workshop.store, workshop.job(other))
    if state is not S.CANCELLING:
        for _ in range(3):
            workshop.open_gate()
    ended = workshop.until_state(job, end)
    assert workshop.done() == (["0"] if end is S.SUCCEEDED else [])
    assert len(ended.attempts) == {S.INTERRUPTED: 2, S.EXPIRED: 0}.get(state, 1)
    assert end is S.PAUSED or is_whole(ended)
    for left in workshop.store.unfinished(*ACTIVE):
        workshop.runner.stop(left, len(left.attempts), now=True)
    os.close(workshop.gate)
