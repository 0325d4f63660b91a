"""Brings jobs from one state to the next: starts attempts, listens to them, passes on what they are asked, ends them.

One thread, which decides from what the store and the runner say and keeps nothing of its own: killed at any point and
started again it goes on where it was. Only one supervisor works on a folder of jobs; a second one is refused.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from logitlake_shared.errors import ConfigError, JobStateError, LogitLakeError
from logitlake_shared.file_locks import try_lock
from logitlake_shared.jobs.orders import given_up
from logitlake_shared.jobs.progress import parse_lines
from logitlake_shared.jobs.records import Attempt, Counts, Job, JobFault, JobState, Outcome, Wish
from logitlake_shared.jobs.runner import RunnerOf
from logitlake_shared.jobs.settings import JobsSettings
from logitlake_shared.jobs.states import ACTIVE, NEXT
from logitlake_shared.jobs.store import JobStore

__all__ = ["Supervisor"]

_log = logging.getLogger("logitlake.jobs")

_ENDS: dict[Wish, JobState] = {
    "cancel": JobState.CANCELLED,
    "cancel_now": JobState.CANCELLED,
    "pause": JobState.PAUSED,
    "expire": JobState.EXPIRED,
}
# Of a command that heard SIGTERM or SIGINT and kept what it had, as shells report it.
_STOPPED = frozenset({128 + 15, 128 + 2})
# Without a look for so long nobody should count on the jobs any more.
_LATE_S = 60.0


class Supervisor:
    """Looks after the jobs of a store until it is closed; a context manager."""

    def __init__(self, store: JobStore, runner_of: RunnerOf, settings: JobsSettings) -> None:
        self._store, self._runner_of, self._settings = store, runner_of, settings
        self._wake = threading.Event()
        self._closing = False
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._lock: int | None = None

    def claim(self) -> None:
        """Makes the folder's jobs its own, before it begins. Raises `ConfigError` where they are another's."""
        if self._lock is not None:
            return
        lock = os.open(self._settings.folder / "supervisor.lock", os.O_CREAT | os.O_RDWR, 0o600)
        if not try_lock(lock):
            os.close(lock)
            raise ConfigError(
                f"{self._settings.folder}: another service looks after the jobs of this folder; give each a folder of "
                "its own (jobs.folder)"
            )
        self._lock = lock

    def __enter__(self) -> "Supervisor":
        self.claim()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def wake(self) -> None:
        """Has it look at once."""
        self._wake.set()

    def problem(self) -> str | None:
        """What is wrong with it, if anything is."""
        late = time.monotonic() - self._looked
        return None if late < _LATE_S else f"nobody looked after the jobs for {late:.0f} s"

    def step(self) -> None:
        """Looks at every job that is not done, once."""
        for job in self._store.unfinished(*ACTIVE):
            self._guarded(self._look, job)
        now = time.time()
        for job in self._store.overdue(now):
            self._guarded(self._move, job, JobState.EXPIRED)
        self._begin_what_may(now)

    def _begin_what_may(self, now: float) -> None:
        active = self._store.unfinished(*ACTIVE)
        again = [job for job in self._store.unfinished(JobState.INTERRUPTED) if (job.retry_at or 0) <= now]
        busy = {job.lane for job in active if job.lane is not None}
        room = self._settings.max_running - len(busy)
        for job in [job for job in again if job.lane] + self._store.next_queued(busy, self._settings.max_running):
            if room > 0 and job.lane not in busy:
                busy.add(str(job.lane))
                room -= 1
                self._guarded(self._begin, job)
        room = self._settings.max_light - sum(job.lane is None for job in active)
        for job in ([job for job in again if job.lane is None] + self._store.next_light(max(room, 0)))[: max(room, 0)]:
            self._guarded(self._begin, job)

    def _work(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                self.step()
            except Exception:
                _log.exception("looking after the jobs failed; the next look tries again")
            else:
                self._looked = time.monotonic()
            self._wake.wait(self._settings.look_s)
        self._store.close()

    def _guarded(self, act: Any, job: Job, *arguments: Any) -> None:
        """One job's trouble is not the others'."""
        try:
            act(job, *arguments)
        except JobStateError:
            pass  # somebody moved it in the meantime: the next look sees where it is
        except LogitLakeError as error:  # a cluster that does not answer, say
            _log.warning("looking after a job failed; the next look tries again: %s", error, extra={"job_id": job.id})
        except Exception:
            _log.exception("looking after a job failed; the next look tries again", extra={"job_id": job.id})

    def _begin(self, job: Job) -> None:
        job = self._store.begin_attempt(job.id)
        attempt = job.attempts[-1]
        _log.info("attempt %d begins", attempt.number, extra={"job_id": job.id})
        try:
            self._runner_of(job).start(job, attempt.number)
        except (LogitLakeError, OSError) as error:
            self._end_early(job, attempt, None, f"it could not be started: {error}")

    def _look(self, job: Job) -> None:
        attempt = job.attempts[-1]
        while True:
            look = self._runner_of(job).look(job, attempt.number, attempt.log_offset)
            offset = self._hear(job, attempt, look.log)
            read_all = offset == attempt.log_offset
            attempt = attempt.model_copy(update={"log_offset": offset})
            if look.is_alive or read_all:
                break
        heard = self._store.find(job.id)
        assert heard is not None  # jobs are never deleted
        if look.is_alive:
            self._steer(heard, attempt)
        else:
            self._end(heard, attempt, look.exit_code)

    def _hear(self, job: Job, attempt: Attempt, data: bytes) -> int:
        """Takes in what an attempt said; returns up to where its log was read."""
        said, num_bytes = parse_lines(data)
        if not num_bytes:
            return attempt.log_offset
        facts: dict[str, Any] = {}
        phases = []
        for line in said:
            phases += [line["phase"]] if "phase" in line else []
            facts |= {name: value for name, value in line.items() if name != "phase"}
        for phase in phases:
            now = self._store.find(job.id)
            if now is not None and (state := JobState(phase)) in NEXT[now.state] and now.state in ACTIVE:
                self._store.move(job.id, state, only_from=frozenset({now.state}))
        if "counts" in facts:
            baseline = job.baseline or next(line["counts"] for line in said if "counts" in line)
            facts |= {"baseline": baseline, "counts": _counts(facts["counts"], baseline)}
        if "fault" in facts:
            facts["fault"] = JobFault.model_validate(facts["fault"])
        offset = attempt.log_offset + num_bytes
        self._store.heard(job.id, attempt.number, offset, **facts)
        return offset

    def _steer(self, job: Job, attempt: Attempt) -> None:
        """Passes on what a living attempt is to do."""
        now = time.time()
        if job.expires is not None and job.expires <= now and job.wish in ("go_on", "pause"):
            job = self._store.ask(job.id, "expire", ACTIVE)
        if job.wish == "go_on":
            return
        is_late = attempt.asked_to_end is not None and now - attempt.asked_to_end > self._settings.stop_s
        if job.wish == "cancel_now" or is_late:
            self._runner_of(job).stop(job, attempt.number, now=True)
        elif attempt.asked_to_end is None:
            self._runner_of(job).stop(job, attempt.number, now=False)
            self._store.change_attempt(job.id, attempt.number, asked_to_end=now)

    def _end(self, job: Job, attempt: Attempt, exit_code: int | None) -> None:
        """What an attempt that is over makes of its job."""
        if exit_code == 0:
            self._store.change_attempt(job.id, attempt.number, ended=time.time(), exit_code=exit_code)
            outcome: Outcome = "partial" if job.counts.failed + job.counts.quarantined else "complete"
            _log.info("succeeded", extra={"job_id": job.id})
            self._store.move(job.id, JobState.SUCCEEDED, outcome=outcome)
        elif job.wish in _ENDS:
            self._store.change_attempt(job.id, attempt.number, ended=time.time(), exit_code=exit_code)
            self._move(job, _ENDS[job.wish])
        elif exit_code is None or exit_code in _STOPPED:
            self._end_early(job, attempt, exit_code, "its process ended before its time")
        else:
            self._store.change_attempt(job.id, attempt.number, ended=time.time(), exit_code=exit_code)
            fault = job.fault or JobFault(error="Crashed", message=f"exit code {exit_code}; the log says more")
            self._move(job, JobState.FAILED, fault=fault)

    def _end_early(self, job: Job, attempt: Attempt, exit_code: int | None, reason: str) -> None:
        self._store.change_attempt(job.id, attempt.number, ended=time.time(), exit_code=exit_code)
        tries = sum(one.asked_to_end is None for one in job.attempts)
        if tries >= job.max_attempts:
            message = f"{reason}, in the last of {tries} attempts; the logs of the attempts say more"
            self._move(job, JobState.FAILED, fault=JobFault(error="Crashed", message=message))
            return
        _log.warning("interrupted: %s", reason, extra={"job_id": job.id})
        retry_at = time.time() + self._settings.retry_s * 2 ** (tries - 1)
        self._store.move(job.id, JobState.INTERRUPTED, reason, retry_at=retry_at)

    def _move(self, job: Job, to: JobState, fault: JobFault | None = None) -> None:
        _log.info("%s", to, extra={"job_id": job.id})
        self._store.move(job.id, to, fault=fault, counts=None if to is JobState.PAUSED else given_up(job.counts))


def _counts(raw: Mapping[str, Any], baseline: Mapping[str, Any]) -> Counts:
    """The job's own share of what an attempt found: `committed` items, of which some `failed` or are `quarantined`."""
    failed, quarantined = (raw[name] - baseline[name] for name in ("failed", "quarantined"))
    return Counts(
        total=raw["total"],
        pending=raw["total"] - raw["committed"],
        succeeded=raw["committed"] - baseline["committed"] - failed - quarantined,
        failed=failed,
        quarantined=quarantined,
        errors=dict(Counter(raw.get("errors", {})) - Counter(baseline.get("errors", {}))),
        skipped_cached=baseline["committed"],
    )
