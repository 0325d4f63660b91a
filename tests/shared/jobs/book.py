"""The figures of a service that is killed: in a file, as they were when it died."""

import json
from pathlib import Path

from prometheus_client.registry import Collector

from logitlake_shared.jobs.measured import Measured
from logitlake_shared.jobs.store import JobStore
from logitlake_shared.web.job_figures import TEACHER_FIGURES, CountsFigure, Figure
from logitlake_shared.web.job_metrics import JobMetrics

__all__ = ["FIGURES", "Book", "values"]

FIGURES = (
    *(figure for figure in TEACHER_FIGURES if isinstance(figure, CountsFigure)),
    Figure("work_items", "sum", "Items that were done."),
    Figure("work_seconds", "times", "Time of an item."),
    Figure("work_place", "newest", "The last item.", "parity", ("0", "1")),
)
"""of the jobs of these tests"""


class Book(JobMetrics):
    """Writes its values down each time that an attempt told what it measured."""

    def __init__(self, store: JobStore, path: Path) -> None:
        super().__init__(store, FIGURES)
        self._path = path

    def measured(self, before: Measured, after: Measured) -> None:
        """See `JobMetrics.measured`."""
        super().measured(before, after)
        written = self._path.with_suffix(".new")
        written.write_text(json.dumps(values(self)))
        written.replace(self._path)  # a reader finds all of it or nothing


def values(collector: Collector) -> dict[str, float]:
    """What Prometheus would read, by name and labels."""
    return {
        f"{sample.name}{''.join(f' {name}={value}' for name, value in sorted(sample.labels.items()))}": sample.value
        for family in collector.collect()
        for sample in family.samples
    }
