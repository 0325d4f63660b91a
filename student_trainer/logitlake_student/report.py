"""Gathers a run into one page, one JSON file and one table on the terminal.

The three show the same figures from one reading of the files (`report_facts`). The page (`report_page`, with charts
from `report_charts`) is one file that asks nobody for anything; the JSON file is for programs.
"""

import json
import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logitlake_student.config import ReportConfig
from logitlake_student.report_facts import FIGURES, RunFacts, gather
from logitlake_student.report_page import page

__all__ = ["summary", "write_report"]


def write_report(config: ReportConfig) -> None:
    """Writes the page and the summary, each whole or not at all, then prints the table.

    Raises `ConfigError`, `DataError` or `LakeError` before anything is written.
    """
    facts = gather(config)
    html = page(config, facts)
    document = json.dumps(summary(facts), indent=1, allow_nan=False) + "\n"
    _write_atomically(config.html, html)
    _write_atomically(config.summary, document)
    _print(config, facts)


def summary(facts: RunFacts) -> dict[str, Any]:
    """The figures of the table as a document. A figure that is None is unknown: there was nothing to take it from."""
    return {
        "teacher": facts.teacher.figures(),
        "stages": {stage.name: stage.result.figures() for stage in facts.stages},
        "lake": {
            "samples": facts.lake.rows,
            "tokens": facts.lake.tokens,
            "bytes_per_token": facts.lake.bytes_per_token,
            "shards": facts.lake.shards,
        },
        "student": {"params_total": facts.params_total, "params_active": facts.params_active},
        "seconds": facts.seconds,
    }


def _print(config: ReportConfig, facts: RunFacts) -> None:
    table = Table(title=Text(config.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for figure in FIGURES:
        table.add_column(f"{figure.short_title} {figure.arrow}", justify="right")
    for model, values in [("teacher", facts.teacher.figures())] + [
        (stage.name, stage.result.figures()) for stage in facts.stages
    ]:
        # Text is never read as markup, whatever a name holds.
        table.add_row(Text(model), *(Text(figure.text(values[figure.key])) for figure in FIGURES))
        if model == "teacher":
            table.add_section()
    console = Console(highlight=False)
    console.print(table)
    lake = facts.lake
    console.print(
        Text(
            f"lake: {lake.rows:,} samples, {lake.tokens:,} tokens, "
            + (f"{lake.bytes_per_token:.1f} bytes a token, " if lake.bytes_per_token is not None else "")
            + f"{lake.shards} shards"
        )
    )
    console.print(Text(f"student: {facts.params_total:,} parameters, {facts.params_active:,} active for a token"))
    console.print(Text(f"report: {config.html}\nsummary: {config.summary}"), soft_wrap=True)


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{os.getpid()}")
    building.write_text(text, encoding="utf-8")
    building.replace(path)
