"""What is known of a job: how it stands, what it has counted, its attempts and events.

A job is work that a service was given to do: a kind (`capture`, `train`, …) and a configuration. Doing it is an
attempt, a process of its own; when one ends before the work does, another goes on where it stopped.
"""

import hashlib
import json
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

__all__ = ["Attempt", "Counts", "Event", "Job", "JobFault", "JobState", "NewJob", "Outcome", "Wish"]

Outcome = Literal["complete", "partial"]
"""of a job that succeeded: whether some of its items could not be done"""
Wish = Literal["go_on", "pause", "cancel", "cancel_now", "expire"]
"""what an attempt that runs is to do"""


class JobState(StrEnum):
    """Where a job stands. `states.NEXT` says what may follow what."""

    QUEUED = "queued"
    VALIDATING = "validating"
    RUNNING = "running"
    FINALIZING = "finalizing"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Counts(_Record):
    """Items of a job (samples, pairs, steps). All but the total add up to it."""

    total: int = Field(default=0, examples=[900])
    pending: int = Field(default=0, examples=[400])
    """not done yet"""
    succeeded: int = Field(default=0, examples=[290])
    failed: int = Field(default=0, examples=[9])
    """that could not be done; `/v1/caches/{cache}/errors` says why"""
    quarantined: int = Field(default=0, examples=[1])
    """set aside because they ended the process that tried them"""
    skipped_cached: int = Field(default=0, examples=[200])
    """done before this job began: nothing is done twice"""
    cancelled: int = Field(default=0, examples=[0])
    """that the job's end left undone"""
    errors: dict[str, int] = Field(default={}, exclude=True)
    """by code, those that failed or are quarantined; a job shows them beside its counts"""


class JobFault(_Record):
    """Why a job failed."""

    error: str = Field(examples=["DataError"])
    """class of the error, one of `logitlake_shared.errors`; `Crashed` for what is none of them"""
    message: str = Field(examples=["train.json: record 7: no `conversations`"])


class NewJob(_Record):
    """What is submitted."""

    kind: str
    config: dict[str, Any]
    """resolved, as JSON"""
    digest: str
    """of kind and configuration: equal work has equal digests"""
    subject: str
    """what a token must cover to see the job: the cache that it fills, the run that it writes"""
    lane: str | None = None
    """jobs of one lane run one after the other; those without are light, and run beside the others"""
    arguments: tuple[str, ...] = ()
    """of its command, beside the configuration"""
    name: str = ""
    labels: dict[str, str] = {}
    max_attempts: int = 3
    """attempts that may end before their time; then the job failed"""
    expires_in_s: float | None = None


class Attempt(_Record):
    """One process that worked on a job. Times are seconds since 1970."""

    number: int = Field(examples=[1])
    started: float = Field(examples=[1_790_000_000.0])
    ended: float | None = Field(default=None, examples=[1_790_000_600.0])
    exit_code: int | None = Field(default=None, examples=[0])
    """of the process; null while it runs, and of one that was killed"""
    log_offset: int = Field(default=0, exclude=True)
    """bytes of its log that were read"""
    asked_to_end: float | None = None
    """when it was"""


class Job(_Record):
    """A job as it is now. Times are seconds since 1970."""

    id: str = Field(examples=["job_01K0000000000000000000000"])
    kind: str = Field(examples=["capture"])
    name: str = Field(examples=["nightly"])
    labels: dict[str, str] = Field(examples=[{"team": "vision"}])
    subject: str = Field(examples=["main"])
    """the cache that it fills, the run that it writes"""
    lane: str | None = Field(default=None, exclude=True)
    arguments: tuple[str, ...] = Field(default=(), exclude=True)
    digest: str = Field(examples=["5f0c…"])
    """of kind and configuration: equal work has equal digests"""
    config: dict[str, Any] = Field(examples=[{"engine": {"type": "vllm"}}])
    principal: str = Field(examples=["tok_01K0000000000000000000000"])
    """who submitted it"""
    state: JobState = Field(examples=["running"])
    wish: Wish = "go_on"
    """what its attempt was asked to do"""
    outcome: Outcome | None = None
    counts: Counts = Counts()
    figures: dict[str, Any] = Field(default={}, examples=[{"tokens": 14_000, "tokens_per_s": 2_300.0}])
    """what the work says of itself; names are the kind's own"""
    result: dict[str, Any] | None = None
    """what it came to, once it succeeded"""
    fault: JobFault | None = None
    entered: dict[JobState, float] = Field(examples=[{"queued": 1_790_000_000.0}])
    """when it last came into each state"""
    max_attempts: int = Field(examples=[3])
    expires: float | None = None
    """when it ends, done or not"""
    retry_at: float | None = None
    """when an interrupted job goes on"""
    baseline: dict[str, Any] | None = Field(default=None, exclude=True)
    """what its first attempt found done already"""
    attempts: tuple[Attempt, ...] = ()
    last_event: int = Field(default=0, examples=[17])
    """id of its newest event"""

    @computed_field(examples=[{"image_missing": 9, "teacher_crashed": 1}])  # type: ignore[prop-decorator]
    @property
    def errors(self) -> dict[str, int]:
        """Items that failed or are quarantined, by code."""
        return self.counts.errors

    @computed_field(examples=["2f1d9c8e4b7a6035"])  # type: ignore[prop-decorator]  # what pydantic asks for
    @property
    def tag(self) -> str:
        """Changes with its name and labels, and with nothing else: `ETag`, and `If-Match` of an edit."""
        edited = json.dumps([self.name, self.labels], sort_keys=True)
        return hashlib.sha256(edited.encode()).hexdigest()[:16]

    @property
    def created(self) -> float:
        """When it was submitted."""
        return self.entered[JobState.QUEUED]


class Event(_Record):
    """Something that happened to a job. Ids rise; between two of a job's there may be others'."""

    id: int = Field(examples=[17])
    time: float = Field(examples=[1_790_000_000.0])
    event: Literal["state", "attempt", "progress", "edited", "gap"] = Field(examples=["state"])
    data: dict[str, Any] = Field(examples=[{"from": "queued", "to": "validating"}])
