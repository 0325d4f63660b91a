"""Attempts as jobs of a Ray cluster, for a service that takes jobs and has no GPU of its own.

What is to be done lies in the lake, as `jobs submit` leaves it there; the attempt's name at the cluster is that of the
job and its number, so a restarted service finds its attempts again, and starting one twice is starting it once.
"""

import time

from logitlake_shared.jobs.progress import VARIABLE
from logitlake_shared.jobs.records import Job
from logitlake_shared.jobs.runner import Look
from logitlake_teacher.config import CONFIGS
from logitlake_teacher.ray_jobs import RayJobs, store_run

__all__ = ["RayRunner"]

_LOOK_BYTES = 2**20
# The Jobs API gives a log as a whole or not at all.
_LOG_EVERY_S = 5.0


class RayRunner:
    """Implements `Runner`, for captures and pairs."""

    def __init__(self, address: str) -> None:
        """Raises `ConfigError` for what is no address, or one that needs a token and has none."""
        self._cluster = RayJobs(address)
        self._read: dict[str, float] = {}
        """when the log of an attempt was read"""

    def start(self, job: Job, number: int) -> None:
        """See `Runner.start`."""
        run = store_run(job.kind, CONFIGS[job.kind].model_validate(job.config))
        self._cluster.submit(run, number, _name(job, number), job.arguments, {VARIABLE: "1"})

    def look(self, job: Job, number: int, log_offset: int) -> Look:
        """See `Runner.look`. While an attempt lives its log is read every few seconds."""
        name = _name(job, number)
        attempt = next((one for one in self._cluster.attempts() if one.submission_id == name), None)
        if attempt is None:
            return Look(is_alive=False, exit_code=None, log=b"")
        is_due = time.monotonic() - self._read.get(name, 0.0) >= _LOG_EVERY_S
        log = b""
        if attempt.ended or is_due:
            self._read[name] = time.monotonic()
            log = self._cluster.logs(name).encode()[log_offset : log_offset + _LOOK_BYTES]
        return Look(not attempt.ended, attempt.code, log)

    def stop(self, job: Job, number: int, *, now: bool) -> None:
        """See `Runner.stop`. Also with `now` it is asked first, and killed when its grace is over.

        That is all that the Jobs API knows: how long Ray waits before it kills is settled when a job is submitted, a
        second call changes nothing, and no other route ends a job.
        """
        del now
        self._cluster.stop(_name(job, number))

    def log_tail(self, job: Job, number: int, num_bytes: int) -> bytes:
        """See `Runner.log_tail`."""
        return self._cluster.logs(_name(job, number)).encode()[-num_bytes:]


def _name(job: Job, number: int) -> str:
    return f"{job.id}-a{number}"
