"""What Prometheus is told of jobs, declared once: names, labels, and where each figure comes from.

An attempt measures, and tells it under these names (`jobs.measured`); what became of a job's items is in its counts,
which a service that is killed writes down with them. A label is one of a fixed set: never a job, a cache, a run or a
person, and of a log, which anybody may have written, only what is on the list.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from logitlake_schemas import ERROR_CODES, SET_ASIDE_CODES
from logitlake_shared.jobs.measured import TIMES_SIZE, labelled
from logitlake_shared.jobs.records import Counts

__all__ = ["OUTCOMES", "STUDENT_FIGURES", "TEACHER_FIGURES", "CountsFigure", "Figure", "Labels"]

Labels = tuple[str, ...]
"""values of a figure's labels"""

OUTCOMES: Mapping[str, Labels] = {
    "succeeded": ("",),
    "failed": (*(code for code in ERROR_CODES if code not in SET_ASIDE_CODES), "other"),
    "quarantined": (*SET_ASIDE_CODES, "other"),
    "skipped_cached": ("",),
}
"""of items, as `Counts` has them, and the codes of each: the last is of all that have none of the others"""


@dataclass(frozen=True)
class Figure:
    """A figure that attempts tell."""

    name: str
    """as attempts say it, and behind `logitlake_` as Prometheus has it"""
    kind: Literal["sum", "newest", "times"]
    help: str
    label: str | None = None
    values: tuple[str, ...] = ()
    """what the label may be; attempts tell each by itself, as `measured.labelled` names it"""

    @property
    def size(self) -> int:
        """Its numbers, of each label."""
        return TIMES_SIZE if self.kind == "times" else 1

    @property
    def labels(self) -> Labels:
        """Their names."""
        return () if self.label is None else (self.label,)

    @property
    def told_as(self) -> Mapping[Labels, str]:
        """What attempts call each of its series."""
        if self.label is None:
            return {(): self.name}
        return {(value,): labelled(self.name, value) for value in self.values}


@dataclass(frozen=True)
class CountsFigure:
    """A counter that is made of the counts of jobs: of each job once, however many attempts it takes."""

    name: str
    help: str
    labels: Labels
    of: Callable[[Counts], Mapping[Labels, int]]
    """all series that there may be, those of no items with 0"""


def _samples(counts: Counts) -> Mapping[Labels, int]:
    found: dict[Labels, int] = {}
    for outcome, (*codes, rest) in OUTCOMES.items():
        named = {(outcome, code): counts.errors.get(code, 0) for code in codes}
        unnamed = getattr(counts, outcome) - sum(named.values())
        found |= named | {(outcome, rest): max(0, unnamed)}
    return found


def _cache_lookups(counts: Counts) -> Mapping[Labels, int]:
    return {("hit",): counts.skipped_cached, ("miss",): counts.total - counts.skipped_cached}


# A student with more sparse layers tells of the first ones.
_LAYERS = tuple(map(str, range(128)))

TEACHER_FIGURES = (
    CountsFigure("samples", "Samples and pairs of jobs, by what became of them.", ("outcome", "code"), _samples),
    CountsFigure("cache_lookups", "Samples and pairs that jobs asked their cache for.", ("result",), _cache_lookups),
    Figure(
        "teacher_tokens",
        "sum",
        "Tokens that teachers read or wrote for committed units.",
        "kind",
        ("prompt", "image", "response"),
    ),
    Figure("teacher_batch_seconds", "times", "Time of a call of the teacher, for a unit that was committed."),
    Figure("shard_bytes", "sum", "Bytes of committed shards, those of images included."),
    Figure("shard_commit_seconds", "times", "Time to write the shards of a unit and its commit record."),
)
STUDENT_FIGURES = (
    Figure("train_step_seconds", "times", "Time of an optimiser step, its wait for data included."),
    Figure("train_tokens", "sum", "Tokens that training steps went through, prompts and images included."),
    Figure("tokens_dropped", "sum", "Tokens that a full expert turned away, for each expert that did."),
    Figure("data_wait_seconds", "sum", "Time that training steps waited for their samples."),
    Figure("expert_load_max_ratio", "newest", "Load of a layer's busiest expert; 1 is even.", "layer", _LAYERS),
)
