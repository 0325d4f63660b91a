"""Which state of a job may follow which.

    queued ──> validating ──> running ──> finalizing ──> succeeded
      │            │             │            │
      └────────────┴──────┬──────┴────────────┘
                          ├──> paused ──> queued
                          ├──> interrupted ──> validating     its attempt ended before its time: another follows
                          ├──> cancelling ──> cancelled
                          └──> failed | expired

A state in which a job ends is never left: whoever read it may act on it. What is committed by then stays, so the same
work submitted again does only the rest.
"""

from logitlake_shared.jobs.records import JobState as S

__all__ = ["ACTIVE", "ENDED", "NEXT"]

ENDED = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED, S.EXPIRED})
ACTIVE = frozenset({S.VALIDATING, S.RUNNING, S.FINALIZING, S.CANCELLING})
"""an attempt works on it"""

_STOPS = {S.PAUSED, S.INTERRUPTED, S.CANCELLING, S.CANCELLED, S.FAILED, S.EXPIRED}

NEXT: dict[S, frozenset[S]] = {
    S.QUEUED: frozenset({S.VALIDATING, S.PAUSED, S.CANCELLED, S.FAILED, S.EXPIRED}),
    # Short work may be over before anybody looked at it.
    S.VALIDATING: frozenset({S.RUNNING, S.FINALIZING, S.SUCCEEDED} | _STOPS),
    S.RUNNING: frozenset({S.FINALIZING, S.SUCCEEDED} | _STOPS),
    S.FINALIZING: frozenset({S.SUCCEEDED} | _STOPS),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLED, S.EXPIRED}),
    S.INTERRUPTED: frozenset({S.VALIDATING, S.PAUSED, S.CANCELLED, S.FAILED, S.EXPIRED}),
    # Done before it heard of the cancelling: then it is done.
    S.CANCELLING: frozenset({S.CANCELLED, S.SUCCEEDED, S.FAILED, S.EXPIRED}),
    **{ended: frozenset() for ended in ENDED},
}
