"""Charts of how stages trained: losses, preference, experts; of finished stages, and of ones that go on."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from markupsafe import Markup

from logitlake_student.report_charts import Band, Series, bar_chart, heat_map, legend, line_chart

__all__ = ["Chart", "StageCurves", "as_number", "expert_charts", "last_experts", "training_charts"]

_STEPS = "optimiser steps"


@dataclass(frozen=True)
class StageCurves:
    """What the charts show of a stage."""

    name: str
    steps: int
    """that it has, or has done until now"""
    metrics: list[dict[str, Any]]
    """the lines of its `metrics.jsonl`"""
    samples_by_mass: tuple[int, ...] = ()
    """samples by how much of the teacher's probability the lake holds of them; empty where the stage does not distil"""
    experts_by_task: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    """from its evaluation: of each task, each sparse layer's loads"""


@dataclass(frozen=True)
class Chart:
    """A chart with what stands around it."""

    title: str
    note: str
    svg: Markup
    legend: Markup | None = None


_DIVERGENCES = {
    "forward KL": "forward_kl",
    "reverse KL": "reverse_kl",
    "JSD": "jsd",
    "skew KL": "skew_kl",
    "skew reverse KL": "skew_reverse_kl",
    "total variation": "tvd",
    "truncated KL": "truncated_kl",
    "renormalised KL": "renormalised_kl",
}
"""What a distillation stage may have compared by: in words, and in its metrics."""


def training_charts(stages: Sequence[StageCurves]) -> Iterator[Chart]:
    """Losses, balance, preference, over the stages end to end; and what the lake holds of the teacher."""
    yield _over_steps(
        "Distillation losses",
        "Logarithmic. init learns from labels, d2d and d2s from the teacher",
        stages,
        {**_DIVERGENCES, "cross-entropy": "ce"},
        y_label="nats a token",
        log_y=True,
    )
    yield _over_steps(
        "Load balance",
        "Evenly loaded experts score as many as a token is sent to",
        stages,
        {"balance loss": "balance"},
        y_label="",
    )
    yield _over_steps(
        "Preference margin",
        "How much more the student gained on chosen than on rejected answers",
        stages,
        {"margin": "margin", "chosen": "chosen_reward", "rejected": "rejected_reward"},
        y_label="reward",
    )
    yield _over_steps(
        "Preferred share",
        "Pairs whose chosen answer gained more",
        stages,
        {"preferred": "preferred"},
        y_label="share of pairs",
        y_range=(0.0, 1.0),
        percent=True,
    )
    yield from _cached_mass(stages)


def _cached_mass(stages: Sequence[StageCurves]) -> Iterator[Chart]:
    """Of the last stage that distils; parts that hold no sample, from zero on, are left out."""
    counts = next((stage.samples_by_mass for stage in reversed(stages) if stage.samples_by_mass), ())
    first = next((place for place, count in enumerate(counts) if count), 0)
    if counts:
        width = 100 / len(counts)
        names = [f"{place * width:.0f}–{(place + 1) * width:.0f}\u00a0%" for place in range(len(counts))]
        bars = [(name, float(count)) for name, count in zip(names[first:], counts[first:], strict=True)]
        yield Chart(
            "What the lake holds of the teacher",
            "Its probability on the cached entries, on average over a sample's tokens",
            bar_chart("What the lake holds of the teacher", bars, label="samples"),
        )


def expert_charts(stages: Sequence[StageCurves]) -> list[Chart]:
    """Each sparse layer's experts: their load at the end, by task, over time; and the routers' entropy."""
    last = last_experts(stages)
    if not last:
        return []
    layers = [f"sparse layer {number}" for number in range(1, len(last) + 1)]
    experts = [f"expert {number}" for number in range(1, len(last[0]["load"]) + 1)]
    title = "Load at the end"
    charts = [
        Chart(
            title,
            "Full colour is twice an equal share or more",
            heat_map(title, layers, experts, [layer["load"] for layer in last]),
        )
    ]
    # Which experts serve which task, on held-out rows, as the last sparse stage left them.
    by_task = next((stage.experts_by_task for stage in reversed(stages) if stage.experts_by_task), {})
    if by_task:
        charts += [
            Chart(
                f"Experts by task, {layer}",
                "Held-out samples, image tokens included. Rows that differ are experts that specialise",
                heat_map(
                    f"Experts by task, {layer}", list(by_task), experts, [loads[place] for loads in by_task.values()]
                ),
            )
            for place, layer in enumerate(layers)
        ]
    even = math.log(len(experts))
    charts.append(
        _over_steps(
            "Router entropy",
            "Dashed: a router that cannot tell its experts apart",
            stages,
            {layer: partial(_entropy, place) for place, layer in enumerate(layers)},
            y_label="nats",
            level=even,
        )
    )
    for place, layer in enumerate(layers):
        charts.append(
            _over_steps(
                f"Load over time, {layer}",
                "Dashed: an equal share",
                stages,
                {expert: partial(_load, place, number) for number, expert in enumerate(experts)},
                y_label="share of routed tokens",
                percent=True,
                level=1 / len(experts),
            )
        )
    return charts


Reading = str | Callable[[dict[str, Any]], Any]


def _over_steps(
    title: str,
    note: str,
    stages: Sequence[StageCurves],
    readings: dict[str, Reading],
    *,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
    percent: bool = False,
    level: float | None = None,
) -> Chart:
    """Readings of the metrics over the stages that have them, end to end. `level` is a dashed reference."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in readings}
    bands: list[Band] = []
    for stage in stages:
        start = bands[-1].end if bands else 0.0
        has_any = False
        for name, reading in readings.items():
            found = [(start + line["step"], _read(line, reading)) for line in stage.metrics]
            if any(math.isfinite(value) for _, value in found):
                has_any = True
                # The gap keeps the line from crossing into the next stage.
                points[name] += [*found, (math.nan, math.nan)]
        if has_any:
            bands.append(Band(stage.name, start, start + stage.steps))
    series = [Series(name, points[name], colour) for colour, name in enumerate(readings)]
    shown = list(series)
    if level is not None and bands:
        shown.insert(0, Series("", [(bands[0].start, level), (bands[-1].end, level)], None, dashed=True))
    svg = line_chart(
        title,
        shown,
        x_label=_STEPS,
        y_label=y_label,
        bands=bands,
        y_range=y_range,
        log_y=log_y,
        percent=percent,
    )
    named = [one for one in series if one.points]
    return Chart(title, note, svg, legend(named) if len(named) > 1 else None)


def last_experts(stages: Sequence[StageCurves]) -> list[dict[str, Any]]:
    """What the last line about experts says, a document for each sparse layer."""
    lines = (line for stage in reversed(stages) for line in reversed(stage.metrics))
    return next((line["experts"] for line in lines if line.get("experts")), [])


def _entropy(layer: int, line: dict[str, Any]) -> Any:
    return line["experts"][layer]["entropy"]


def _load(layer: int, expert: int, line: dict[str, Any]) -> Any:
    return line["experts"][layer]["load"][expert]


def _read(line: dict[str, Any], reading: Reading) -> float:
    """One reading of a line of metrics; NaN where the stage does not take it."""
    try:
        return as_number(line[reading] if isinstance(reading, str) else reading(line))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return math.nan


def as_number(value: Any) -> float:
    """A figure as charts take it; NaN for one that is not known."""
    return math.nan if value is None else float(value)
