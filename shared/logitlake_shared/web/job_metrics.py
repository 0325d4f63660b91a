"""Prometheus' figures of a service's jobs: how many are in which state, which moves they made, what attempts measured.

An attempt is a process of its own, which may outlive this one, so nobody asks it: what it tells of itself comes by its
log (`jobs.measured`), and what it told since the time before is added here. A service that is started anew begins at
zero, as counters do, and adds what nobody has added before. `job_figures` declares what there is.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from logitlake_shared.jobs.measured import BOUNDS_S, Measured
from logitlake_shared.jobs.observer import Observer
from logitlake_shared.jobs.records import Counts, JobState
from logitlake_shared.jobs.states import NEXT
from logitlake_shared.jobs.store import JobStore
from logitlake_shared.web.job_figures import CountsFigure, Figure, Labels

__all__ = ["JobMetrics"]


class JobMetrics(Observer, Collector):
    """Those of the jobs in a store, whose attempts tell these figures."""

    def __init__(self, store: JobStore, figures: Sequence[Figure | CountsFigure]) -> None:
        self._store = store
        self._measured = [figure for figure in figures if isinstance(figure, Figure)]
        self._counted = [figure for figure in figures if isinstance(figure, CountsFigure)]
        self._lock = threading.Lock()
        # All that may be, from the beginning on: what first appears at 1 has never risen, for Prometheus.
        self._moves = Counter[Labels]({(before, after): 0 for before, to in NEXT.items() for after in to})
        self._counts = {figure.name: Counter(figure.of(Counts())) for figure in self._counted}
        self._sums: dict[str, dict[Labels, list[float]]] = {
            figure.name: {labels: [0.0] * figure.size for labels in figure.told_as}
            for figure in self._measured
            if figure.kind != "newest"
        }
        self._newest: dict[str, dict[Labels, float]] = {}

    def moved(self, before: JobState | None, after: JobState) -> None:
        """See `Observer.moved`."""
        with self._lock:
            self._moves[before or "none", after] += 1

    def counted(self, before: Counts, after: Counts) -> None:
        """See `Observer.counted`."""
        with self._lock:
            for figure in self._counted:
                # The difference of two counters has what rose, and nothing of what fell.
                risen = Counter(figure.of(after)) - Counter(figure.of(before))
                self._counts[figure.name].update(risen)

    def measured(self, before: Measured, after: Measured) -> None:
        """See `Observer.measured`. What is none of the figures, or not of its form, is left out."""
        with self._lock:
            for figure in self._measured:
                told = {labels: after.get(name, []) for labels, name in figure.told_as.items()}
                told = {labels: numbers for labels, numbers in told.items() if len(numbers) == figure.size}
                if figure.kind == "newest":
                    # All of it at once: layers of an earlier student are none of this one's.
                    self._newest |= {figure.name: {labels: new for labels, (new,) in told.items()}} if told else {}
                    continue
                for labels, numbers in told.items():
                    old = before.get(figure.told_as[labels], [0.0] * figure.size)
                    _add_risen(self._sums[figure.name][labels], old, numbers)

    def collect(self) -> Iterator[Metric]:
        """Those of now."""
        jobs = GaugeMetricFamily("logitlake_jobs", "Jobs in each state.", labels=["state"])
        for state, count in self._store.counted().items():
            jobs.add_metric([state], count)
        yield jobs
        with self._lock:
            moves = _counter("job_transitions", "Moves of jobs between states.", ("from", "to"), self._moves)
            counted = [
                _counter(figure.name, figure.help, figure.labels, self._counts[figure.name]) for figure in self._counted
            ]
            measured = [self._family(figure) for figure in self._measured]
        yield moves
        yield from counted
        yield from measured

    def _family(self, figure: Figure) -> Metric:
        name = f"logitlake_{figure.name}"
        if figure.kind == "newest":
            gauge = GaugeMetricFamily(name, figure.help, labels=figure.labels)
            for labels, value in self._newest.get(figure.name, {}).items():
                gauge.add_metric(labels, value)
            return gauge
        sums = self._sums[figure.name]
        if figure.kind == "sum":
            totals = {labels: total for labels, (total,) in sums.items()}
            return _counter(figure.name, figure.help, figure.labels, totals)
        times = HistogramMetricFamily(name, figure.help, labels=figure.labels)
        for labels, (seconds, *counts) in sums.items():
            buckets = list(zip([*map(str, BOUNDS_S), "+Inf"], accumulate(counts), strict=True))
            times.add_metric(labels, buckets, seconds)
        return times


def _counter(name: str, help_: str, labels: Sequence[str], series: Mapping[Labels, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"logitlake_{name}", help_, labels=labels)
    for values, total in series.items():
        family.add_metric(values, total)
    return family


def _add_risen(totals: list[float], before: Sequence[float], after: Sequence[float]) -> None:
    if len(before) == len(after):
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            totals[place] += max(0.0, new - old)
