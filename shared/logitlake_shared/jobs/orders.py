"""What a user may tell a job to do: cancel, pause, resume. Each is right in every state, or refused with the reason.

A job that nobody works on obeys at once. One whose attempt runs is asked to: the supervisor passes it on, the work
under way is finished and kept.
"""

from logitlake_shared.errors import JobStateError
from logitlake_shared.jobs.records import Counts, Job, JobState, Wish
from logitlake_shared.jobs.states import ACTIVE, ENDED
from logitlake_shared.jobs.store import JobStore

__all__ = ["cancel", "given_up", "pause", "resume"]

_WAITING = frozenset({JobState.QUEUED, JobState.PAUSED, JobState.INTERRUPTED})
_WORKING = ACTIVE - {JobState.CANCELLING}


def cancel(store: JobStore, job: Job, *, now: bool = False) -> Job:
    """Ends a job; `now` without finishing what is under way. Twice is fine. Raises `JobStateError` once it ended."""
    while True:
        if job.state in ENDED:
            raise JobStateError(f"job {job.id} has {_ENDED_HOW[job.state]}: there is nothing to cancel")
        try:
            if job.state in _WAITING:
                return store.move(job.id, JobState.CANCELLED, only_from=_WAITING, counts=given_up(job.counts))
            if job.state is not JobState.CANCELLING:
                wish: Wish = "cancel_now" if now else "cancel"
                return store.move(job.id, JobState.CANCELLING, only_from=_WORKING, wish=wish)
            if now and job.wish != "cancel_now":
                return store.ask(job.id, "cancel_now", frozenset({JobState.CANCELLING}))
        except JobStateError:  # it went on in the meantime
            job = _again(store, job)
        else:
            return job


def pause(store: JobStore, job: Job) -> Job:
    """Has a job wait until it is resumed. Twice is fine. Raises `JobStateError` where it ended, or is about to."""
    while job.state is not JobState.PAUSED:
        if job.state in ENDED or job.state is JobState.CANCELLING:
            raise JobStateError(f"job {job.id} is {job.state}: it cannot be paused")
        try:
            if job.state in _WAITING:
                return store.move(job.id, JobState.PAUSED, only_from=_WAITING)
            return store.ask(job.id, "pause", _WORKING)
        except JobStateError:
            job = _again(store, job)
    return job


def resume(store: JobStore, job: Job) -> Job:
    """Has a paused job go on; one that goes on anyway is left alone. Raises `JobStateError` once it ended."""
    while job.state is JobState.PAUSED:
        try:
            return store.move(job.id, JobState.QUEUED, only_from=frozenset({JobState.PAUSED}))
        except JobStateError:  # somebody else resumed it in the meantime, or ended it
            job = _again(store, job)
    if job.state in ENDED or job.state is JobState.CANCELLING:
        raise JobStateError(f"job {job.id} is {job.state}: submit the same again; what is committed is not done twice")
    if job.wish == "pause":
        raise JobStateError(f"job {job.id} is about to pause: resume it once it has")
    return job


def given_up(counts: Counts) -> Counts:
    """The counts of a job that ends before its work is done."""
    return counts.model_copy(update={"pending": 0, "cancelled": counts.cancelled + counts.pending})


_ENDED_HOW = {
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "been cancelled",
    JobState.EXPIRED: "expired",
}


def _again(store: JobStore, job: Job) -> Job:
    found = store.find(job.id)
    assert found is not None  # jobs are never deleted
    return found
