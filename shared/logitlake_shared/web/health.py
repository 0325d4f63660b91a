"""The page `/health`: what the service asks itself before it says that it is ready, and its figures since it started.

The figures are those of `/metrics`, read from the same registry, for people who have no Prometheus at hand; like there,
they are for a token that covers everything. The checks are for everybody who may read.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Metric
from starlette.responses import HTMLResponse

from logitlake_shared.web.doors import Asking
from logitlake_shared.web.html import render

__all__ = ["Figure", "figures", "health_page"]

# What Prometheus' client adds of its own, and what bounds of a histogram are for machines.
_LEFT_OUT = ("_created", "_bucket")


@dataclass(frozen=True)
class Figure:
    """A family of Prometheus' metrics for people."""

    name: str
    says: str
    value: float | None
    """of a counter all together; of a histogram how many there were; of a gauge its one value, None where it has
    labels"""
    mean: float | None
    """of a histogram that saw anything"""
    rows: tuple[tuple[str, float], ...]
    """labels and value, of a histogram its counts; without what is 0"""


def health_page(
    checks: Collection[str], problems: Callable[[], dict[str, str]], registry: CollectorRegistry
) -> APIRouter:
    """`/health`: `problems()` says of some of the `checks` by name what is wrong."""
    router = APIRouter(include_in_schema=False)
    started = time.time()

    def health(request: Request, asking: Asking, live: bool = False) -> HTMLResponse:
        asking.require("read")
        return render(
            request,
            "health_live" if live else "health",
            checks=dict.fromkeys(checks) | problems(),
            started=started,
            up_s=time.time() - started,
            version=request.app.version,
            figures=list(figures(registry)) if asking.sees_all and not live else None,
        )

    router.add_api_route("/health", health, response_class=HTMLResponse)
    return router


def figures(registry: CollectorRegistry) -> Iterator[Figure]:
    """The figures of a registry, by name; what says nothing yet is left out."""
    for family in sorted(registry.collect(), key=lambda family: family.name):
        if family.type != "info" and (figure := _figure(family)).rows:
            yield figure


def _figure(family: Metric) -> Figure:
    is_histogram = family.type == "histogram"
    counted = [sample for sample in family.samples if not sample.name.endswith((*_LEFT_OUT, "_sum"))]
    rows = tuple(
        (", ".join(f"{name} {value}" for name, value in one.labels.items()), one.value) for one in counted if one.value
    )
    total = sum(value for _, value in rows)
    has_one = len(rows) == 1 and not rows[0][0]
    sums = sum(sample.value for sample in family.samples if sample.name.endswith("_sum")) if is_histogram else 0.0
    return Figure(
        name=family.name,
        says=family.documentation,
        value=total if is_histogram or family.type == "counter" or has_one else None,
        mean=sums / total if is_histogram and total else None,
        rows=rows,
    )
