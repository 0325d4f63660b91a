"""The report as one HTML page: what each part shows, in the order of the page.

The template escapes everything that is put into it; what comes as markup was made here or in `report_charts`, where
names are escaped too. Pictures are decoded, made small and written anew, so that a page never carries a foreign file.
"""

import base64
import io
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from logitlake_shared.errors import DataError, ImageError
from logitlake_student.config import ReportConfig
from logitlake_student.metrics import normalise
from logitlake_student.report_charts import Series, bar_chart, legend, line_chart
from logitlake_student.report_facts import FIGURES, EvalResult, Figure, RunFacts, StageFacts
from logitlake_student.report_training import (
    Chart,
    StageCurves,
    as_number,
    expert_charts,
    last_experts,
    training_charts,
)

__all__ = ["mark_hallucinated", "page"]

_PICTURE_SIDE = 224
"""pixels; twice the size it is shown at"""
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


def page(config: ReportConfig, facts: RunFacts) -> str:
    """The whole page. Raises `DataError` when an evaluation's mention pattern is not a regular expression."""
    stages = [_curves(stage) for stage in facts.stages]
    last = last_experts(stages)
    return _template().render(
        title=config.title,
        lead=_lead(facts),
        metrics=[{"title": figure.title, "arrow": figure.arrow, "direction": _direction(figure)} for figure in FIGURES],
        results=_results(facts),
        after_stages=_after_stages(facts),
        tables=_tables(facts),
        training=list(training_charts(stages)),
        experts=expert_charts(stages),
        equal_share=FIGURES[0].text(1 / len(last[0]["load"])) if last else "",
        examples=_examples(facts),
        lake=_lake(facts),
        student=_student(facts),
        cost=Chart(
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


def _after_stages(facts: RunFacts) -> list[Chart]:
    names = [stage.name for stage in facts.stages]
    lines, references = [], []
    for colour, figure in enumerate(FIGURES[:3]):
        values = [stage.result.figures()[figure.key] for stage in facts.stages]
        lines.append(Series(figure.title, [(x, as_number(value)) for x, value in enumerate(values)], colour))
        teacher = as_number(facts.teacher.figures()[figure.key])
        references.append(Series("", [(-0.5, teacher), (len(names) - 0.5, teacher)], colour, dashed=True))
    title = "Accuracy and hallucination"
    kl = FIGURES[3]
    return [
        Chart(
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
        Chart(
            "KL to the teacher",
            "Held-out tokens; shorter is closer",
            bar_chart(
                "KL to the teacher after each stage",
                [(stage.name, as_number(stage.result.figures()[kl.key])) for stage in facts.stages],
                label="nats a token",
            ),
        ),
    ]


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


def _curves(stage: StageFacts) -> StageCurves:
    mass = () if stage.cached_mass is None else stage.cached_mass.samples_by_mass
    return StageCurves(stage.name, stage.done.figures.steps, stage.metrics, mass, stage.result.experts_by_task)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("logitlake_student", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
