"""Prometheus' figures of a service's jobs: how many are in which state, which moves they made, what attempts measured.

An attempt is a process of its own, which may outlive this one, so nobody asks it: what it tells of itself comes by its
log (`jobs.measured`), and what it told since the time before is added here. A service that is started anew begins at
zero, as counters do, and adds what nobody has added before. Labels are of a fixed set: never a job, a cache, a run or
a person.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from logitlake_shared.jobs.measured import BOUNDS_S, TIMES_SIZE, Measured
from logitlake_shared.jobs.observer import Observer
from logitlake_shared.jobs.records import Counts, JobState
from logitlake_shared.jobs.states import NEXT
from logitlake_shared.jobs.store import JobStore

__all__ = ["OUTCOMES", "STUDENT_FIGURES", "TEACHER_FIGURES", "Figure", "JobMetrics"]

OUTCOMES = ("succeeded", "failed", "quarantined", "skipped_cached")
"""of items, as `Counts` has them"""


@dataclass(frozen=True)
class Figure:
    """A figure that attempts tell, or with `outcomes` the counts of their jobs."""

    name: str
    """as attempts say it, and behind `logitlake_` as Prometheus has it"""
    kind: Literal["sum", "newest", "times", "outcomes"]
    help: str

    @property
    def size(self) -> int:
        """Its numbers."""
        return {"times": TIMES_SIZE, "outcomes": len(OUTCOMES)}.get(self.kind, 1)


TEACHER_FIGURES = (
    Figure("samples", "outcomes", "Samples and pairs of jobs, by what became of them."),
    Figure("teacher_tokens", "sum", "Response tokens that were scored and committed."),
    Figure("shard_bytes", "sum", "Bytes of committed shards, those of images included."),
    Figure("shard_commit_seconds", "times", "Time to write the shards of a unit and its commit record."),
)
STUDENT_FIGURES = (
    Figure("train_step_seconds", "times", "Time of an optimiser step, its wait for data included."),
    Figure("train_tokens", "sum", "Tokens that training steps went through, prompts and images included."),
    Figure("data_wait_seconds", "sum", "Time that training steps waited for their samples."),
    Figure("expert_load_max_ratio", "newest", "Load of the busiest expert of any layer; 1 is even."),
)


class JobMetrics(Observer, Collector):
    """Those of the jobs in a store, whose attempts tell these figures."""

    def __init__(self, store: JobStore, figures: Sequence[Figure]) -> None:
        self._store, self._figures = store, figures
        self._lock = threading.Lock()
        # All that may be, from the beginning on: what first appears at 1 has never risen, for Prometheus.
        self._moves = Counter[tuple[str, str]]({(before, after): 0 for before, to in NEXT.items() for after in to})
        self._totals = {figure.name: [0.0] * figure.size for figure in figures if figure.kind != "newest"}
        self._newest: dict[str, float] = {}

    def moved(self, before: JobState | None, after: JobState) -> None:
        """See `Observer.moved`."""
        with self._lock:
            self._moves[before or "none", after] += 1

    def counted(self, before: Counts, after: Counts) -> None:
        """See `Observer.counted`."""
        for figure in self._figures:
            if figure.kind == "outcomes":
                old, new = ([float(getattr(counts, outcome)) for outcome in OUTCOMES] for counts in (before, after))
                self._add(figure, old, new)

    def measured(self, before: Measured, after: Measured) -> None:
        """See `Observer.measured`. What is none of the figures, or not of its form, is left out."""
        for figure in self._figures:
            new = after.get(figure.name, [])
            if figure.kind == "outcomes" or len(new) != figure.size:
                continue
            if figure.kind == "newest":
                self._newest[figure.name] = new[0]
            else:
                self._add(figure, before.get(figure.name, [0.0] * figure.size), new)

    def _add(self, figure: Figure, before: Sequence[float], after: Sequence[float]) -> None:
        if len(before) == figure.size:
            with self._lock:
                totals = self._totals[figure.name]
                for place, (old, new) in enumerate(zip(before, after, strict=True)):
                    totals[place] += max(0.0, new - old)

    def collect(self) -> Iterator[Metric]:
        """Those of now."""
        jobs = GaugeMetricFamily("logitlake_jobs", "Jobs in each state.", labels=["state"])
        for state, count in self._store.counted().items():
            jobs.add_metric([state], count)
        yield jobs
        moves = CounterMetricFamily("logitlake_job_transitions", "Moves of jobs between states.", labels=["from", "to"])
        with self._lock:
            for (before, after), count in self._moves.items():
                moves.add_metric([before, after], count)
            totals = {name: list(numbers) for name, numbers in self._totals.items()}
        yield moves
        for figure in self._figures:
            yield self._family(figure, totals.get(figure.name, []))

    def _family(self, figure: Figure, totals: list[float]) -> Metric:
        name = f"logitlake_{figure.name}"
        if figure.kind == "newest":
            return GaugeMetricFamily(name, figure.help, self._newest.get(figure.name))
        if figure.kind == "sum":
            return CounterMetricFamily(name, figure.help, totals[0])
        if figure.kind == "outcomes":
            outcomes = CounterMetricFamily(name, figure.help, labels=["outcome"])
            for outcome, count in zip(OUTCOMES, totals, strict=True):
                outcomes.add_metric([outcome], count)
            return outcomes
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        buckets = list(zip(bounds, accumulate(totals[1:]), strict=True))
        return HistogramMetricFamily(name, figure.help, buckets, totals[0])
