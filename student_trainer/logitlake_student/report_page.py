"""The report as one HTML page: what each part shows, in the order of the page.

The template escapes everything that is put into it; what comes as markup was made here or in `report_charts`, where
names are escaped too. Pictures are decoded, made small and written anew, so that a page never carries a foreign file.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from logitlake_shared.errors import DataError, ImageError
from logitlake_student.config import ReportConfig
from logitlake_student.metrics import normalise
from logitlake_student.report_charts import Band, Series, bar_chart, heat_map, legend, line_chart
from logitlake_student.report_facts import FIGURES, EvalResult, Figure, RunFacts, StageFacts

__all__ = ["mark_hallucinated", "page"]

_PICTURE_SIDE = 224
"""pixels; twice the size it is shown at"""
_STEPS = "optimiser steps"
_DETAILS = (
    ("existence", "accuracy", "Yes/no questions answered right"),
    ("existence", "precision", "… precision of “yes”"),
    ("existence", "recall", "… recall of “yes”"),
    ("existence", "yes_ratio", "… share of “yes”"),
    ("captions", "hallucination_rate", "Captions that hallucinate"),
    ("captions", "hallucinated_mentions", "Mentions that are hallucinated"),
    ("captions", "object_recall", "Objects that captions mention"),
    ("captions", "exact", "Captions that are exact"),
)


@dataclass(frozen=True)
class _Chart:
    """A chart with what stands around it."""

    title: str
    note: str
    svg: Markup
    legend: Markup | None = None


def page(config: ReportConfig, facts: RunFacts) -> str:
    """The whole page. Raises `DataError` when an evaluation's mention pattern is not a regular expression."""
    last_experts: list[dict[str, Any]] = next(
        (line["experts"] for line in reversed(_lines(facts)) if line.get("experts")), []
    )
    return _template().render(
        title=config.title,
        lead=_lead(facts),
        metrics=[{"title": figure.title, "arrow": figure.arrow, "direction": _direction(figure)} for figure in FIGURES],
        results=_results(facts),
        after_stages=_after_stages(facts),
        tables=_tables(facts),
        training=list(_training(facts.stages)),
        experts=_experts(facts.stages, last_experts),
        equal_share=FIGURES[0].text(1 / len(last_experts[0]["load"])) if last_experts else "",
        examples=_examples(facts),
        lake=_lake(facts),
        student=_student(facts),
        cost=_Chart(
            "Time of each step",
            "Wall clock",
            bar_chart("Time of each step", list(facts.seconds.items()), label="seconds"),
        ),
        run=str(config.run),
        summary=str(config.summary),
    )


def mark_hallucinated(text: str, objects: Sequence[str], pattern: re.Pattern[str]) -> Markup:
    """The text, escaped, with every mention that is not among the objects in `<mark>`."""
    there = {normalise(name) for name in objects}
    parts, end = [], 0
    for match in pattern.finditer(text):
        if match[0] and normalise(match[0]) not in there:
            parts += [escape(text[end : match.start()]), Markup("<mark>{}</mark>").format(match[0])]
            end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


# ---- figures ----


def _lead(facts: RunFacts) -> str:
    student, teacher = (FIGURES[0].text(model.vqa_accuracy) for model in (facts.stages[-1].result, facts.teacher))
    total = f"{facts.params_total:,} parameters"
    if facts.params_active != facts.params_total:
        total += f", {facts.params_active:,} of them active for a token,"
    num_stages = len(facts.stages)
    return (
        f"A student of {total} learned in {num_stages} stage{'s' if num_stages > 1 else ''} from a lake of "
        f"{facts.lake.tokens:,} teacher tokens; it answers {student} of the held-out questions right, its teacher "
        f"{teacher}."
    )


def _direction(figure: Figure) -> str:
    return "higher" if figure.higher_is_better else "lower"


def _results(facts: RunFacts) -> list[dict[str, Any]]:
    """The rows of the main table: teacher, then stages. Best is what reads as best, so equal texts are all best."""
    best = {}
    for figure in FIGURES:
        known = [value for stage in facts.stages if (value := stage.result.figures()[figure.key]) is not None]
        if known:
            best[figure.key] = figure.text(max(known) if figure.higher_is_better else min(known))
    rows = []
    for name, result in zip(_names(facts), facts.models(), strict=True):
        is_stage = result is not facts.teacher and len(facts.stages) > 1
        cells = [(figure, figure.text(result.figures()[figure.key])) for figure in FIGURES]
        rows.append(
            {
                "name": name,
                "cells": [
                    {"text": text, "is_best": is_stage and text == best.get(figure.key)} for figure, text in cells
                ],
            }
        )
    return rows


def _tables(facts: RunFacts) -> list[dict[str, Any]]:
    models = facts.models()
    tasks = sorted({task for model in models for task in model.tasks})
    share = FIGURES[0].text
    return [
        {
            "title": "By task",
            "note": "Share of answers that equal the exact one.",
            "corner": "Task",
            "columns": _names(facts),
            "rows": [(task, [share(model.tasks.get(task)) for model in models]) for task in tasks],
        },
        {
            "title": "Hallucination in detail",
            "note": "Yes/no questions as POPE scores them, captions as CHAIR does.",
            "corner": "Measure",
            "columns": _names(facts),
            "rows": [
                (title, [share(getattr(model, group).get(key)) for model in models]) for group, key, title in _DETAILS
            ],
        },
    ]


def _after_stages(facts: RunFacts) -> list[_Chart]:
    names = [stage.name for stage in facts.stages]
    lines, references = [], []
    for colour, figure in enumerate(FIGURES[:3]):
        values = [stage.result.figures()[figure.key] for stage in facts.stages]
        lines.append(Series(figure.title, [(x, _number(value)) for x, value in enumerate(values)], colour))
        teacher = _number(facts.teacher.figures()[figure.key])
        references.append(Series("", [(-0.5, teacher), (len(names) - 0.5, teacher)], colour, dashed=True))
    title = "Accuracy and hallucination"
    kl = FIGURES[3]
    return [
        _Chart(
            title,
            "Held-out data; dashed, in the same colour: the teacher",
            line_chart(
                title,
                [*references, *lines],
                x_label="after stage",
                y_label="share, F1",
                x_names=names,
                y_range=(0.0, 1.0),
                percent=True,
            ),
            legend(lines),
        ),
        _Chart(
            "KL to the teacher",
            "Held-out tokens; shorter is closer",
            bar_chart(
                "KL to the teacher after each stage",
                [(stage.name, _number(stage.result.figures()[kl.key])) for stage in facts.stages],
                label="nats a token",
            ),
        ),
    ]


# ---- training ----

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


def _training(stages: Sequence[StageFacts]) -> Iterator[_Chart]:
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


def _cached_mass(stages: Sequence[StageFacts]) -> Iterator[_Chart]:
    """Of the last stage that distils; parts that hold no sample, from zero on, are left out."""
    counts = next((stage.cached_mass.samples_by_mass for stage in reversed(stages) if stage.cached_mass), ())
    first = next((place for place, count in enumerate(counts) if count), 0)
    if counts:
        width = 100 / len(counts)
        names = [f"{place * width:.0f}–{(place + 1) * width:.0f}\u00a0%" for place in range(len(counts))]
        bars = [(name, float(count)) for name, count in zip(names[first:], counts[first:], strict=True)]
        yield _Chart(
            "What the lake holds of the teacher",
            "Its probability on the cached entries, on average over a sample's tokens",
            bar_chart("What the lake holds of the teacher", bars, label="samples"),
        )


def _experts(stages: Sequence[StageFacts], last: Sequence[dict[str, Any]]) -> list[_Chart]:
    if not last:
        return []
    layers = [f"sparse layer {number}" for number in range(1, len(last) + 1)]
    experts = [f"expert {number}" for number in range(1, len(last[0]["load"]) + 1)]
    title = "Load at the end"
    charts = [
        _Chart(
            title,
            "Full colour is twice an equal share or more",
            heat_map(title, layers, experts, [layer["load"] for layer in last]),
        )
    ]
    # Which experts serve which task, on held-out rows, as the last sparse stage left them.
    by_task = next((stage.result.experts_by_task for stage in reversed(stages) if stage.result.experts_by_task), {})
    if by_task:
        charts += [
            _Chart(
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
    stages: Sequence[StageFacts],
    readings: dict[str, Reading],
    *,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
    percent: bool = False,
    level: float | None = None,
) -> _Chart:
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
            bands.append(Band(stage.name, start, start + stage.done.figures.steps))
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
    return _Chart(title, note, svg, legend(series) if len(series) > 1 else None)


def _entropy(layer: int, line: dict[str, Any]) -> Any:
    return line["experts"][layer]["entropy"]


def _load(layer: int, expert: int, line: dict[str, Any]) -> Any:
    return line["experts"][layer]["load"][expert]


def _read(line: dict[str, Any], reading: Reading) -> float:
    """One reading of a line of metrics; NaN where the stage does not take it."""
    try:
        return _number(line[reading] if isinstance(reading, str) else reading(line))
    except (KeyError, IndexError, TypeError):
        return math.nan


# ---- examples ----


def _examples(facts: RunFacts) -> list[dict[str, Any]]:
    answers = [{example.id: example for example in model.examples} for model in facts.models()]
    shown = []
    for example in facts.teacher.examples:
        picture, why = _picture(facts.teacher.identity.settings.image_root, example.image)
        said = []
        for name, model, by_id in zip(_names(facts), facts.models(), answers, strict=True):
            other = by_id.get(example.id)
            said.append((name, mark_hallucinated(other.answer, other.objects, _pattern(model)) if other else "–"))
        shown.append(
            {
                "id": example.id,
                "question": example.question,
                "gold": example.gold or "–",
                "answers": said,
                "picture": picture,
                "why": why,
            }
        )
    return shown


def _pattern(model: EvalResult) -> re.Pattern[str]:
    try:
        return re.compile(model.identity.settings.mention_pattern)
    except re.error as error:
        raise DataError(
            f"evaluation of {model.name!r}: its mention pattern is not a regular expression: {error}, got "
            f"{model.identity.settings.mention_pattern!r}; run `logitlake-student eval` again"
        ) from None


@lru_cache(maxsize=64)
def _picture(image_root: Path, name: str | None) -> tuple[str, str]:
    """A small PNG as a data URI, or an empty text and the reason; the page shows either."""
    from PIL import Image

    from logitlake_shared.images import decode_image

    if name is None:
        return "", "the question has none"
    try:
        image = decode_image((image_root / name).read_bytes())
    except OSError:
        return "", f"{image_root / name} cannot be read"
    except ImageError as error:
        return "", str(error)
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", ""


# ---- cards ----


def _lake(facts: RunFacts) -> list[tuple[str, str]]:
    lake = facts.lake
    rows = [
        ("teacher", f"{lake.teacher} ({lake.engine})"),
        ("samples", f"{lake.rows:,}" + (f", {lake.errors:,} failed" if lake.errors else "")),
        ("tokens", f"{lake.tokens:,}"),
        ("bytes a token", _optional(lake.bytes_per_token, ".1f")),
        ("entries kept a token", _optional(lake.mean_k, ".1f")),
        ("KL of storing, nats a token", _optional(lake.stored_kl_mean, ".1e")),
        ("shards", f"{lake.shards:,}"),
    ]
    if facts.pairs is not None:
        rows.append(("preference pairs", f"{facts.pairs.rows:,}"))
    return [*rows, ("cache", f"{lake.cache}, snapshot {lake.snapshot}"), ("fingerprint", lake.fingerprint[:16])]


def _student(facts: RunFacts) -> list[tuple[str, str]]:
    return [
        ("parameters", f"{facts.params_total:,}"),
        ("active for a token", f"{facts.params_active:,}"),
        *(
            (
                stage.name,
                f"{stage.done.figures.steps:,} steps, {stage.done.figures.params_trainable:,} trained",
            )
            for stage in facts.stages
        ),
    ]


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _names(facts: RunFacts) -> list[str]:
    return ["teacher", *(stage.name for stage in facts.stages)]


def _lines(facts: RunFacts) -> list[dict[str, Any]]:
    return [line for stage in facts.stages for line in stage.metrics]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("logitlake_student", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
