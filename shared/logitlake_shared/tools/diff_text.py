"""The comparison of two caches as text and as JSON."""

import re
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from logitlake_shared.cli_output import show_table, to_json
from logitlake_shared.tools.diff import CacheDiff, WorstToken

__all__ = ["diff_json", "print_diff"]

# Heading of each figure, and by what it is multiplied to be read.
_HEADINGS = {
    "task": ("task", 1),
    "samples": ("samples", 1),
    "tokens": ("tokens", 1),
    "kl_mean": ("KL(A‖B)", 1),
    "kl_max": ("largest", 1),
    "kl_above_0.1": ("> 0.1, %", 100),
    "kl_infinite": ("infinite", 1),
    "top1_agreement": ("same top-1, %", 100),
    "label_logprob_a_less_b": ("label A - B", 1),
    "label_logprob_distance": ("|A - B|", 1),
    "mass_on_shared_ids": ("shared, %", 100),
}
_DIGEST = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{24,}\b")


def diff_json(diff: CacheDiff) -> str:
    """One document."""
    return to_json(
        {
            "spec_differences": diff.spec,
            "coverage": {"in_both": diff.in_both, "only_in_a": diff.only_in_a, "only_in_b": diff.only_in_b},
            "other_responses": diff.other_responses,
            "not_comparable": diff.not_comparable,
            "tasks": [task.figures() for task in diff.tasks.values()],
            "total": diff.total().figures() if diff.tasks else None,
            "pairs": diff.pairs.figures() if diff.pairs else None,
            "worst_tokens": [asdict(token) for token in diff.worst],
        },
        indent=2,
    )


def print_diff(diff: CacheDiff, name_a: str, name_b: str, console: Console | None = None) -> None:
    """Prints it."""
    console = console or Console()
    console.print(Text(f"A  {name_a}\nB  {name_b}"))
    console.print(Text("\nspec", "bold"))
    for sentence in diff.spec or ["no field differs"]:
        console.print(Text("  " + _DIGEST.sub(r"\1…", sentence)))
    console.print(Text("\ncoverage", "bold"))
    console.print(Text(f"  {diff.in_both:,} in both, {diff.only_in_a:,} only in A, {diff.only_in_b:,} only in B"))
    if diff.other_responses:
        console.print(
            Text(f"  {diff.other_responses:,} of those in both have other response ids, and are not compared")
        )
    if diff.not_comparable:
        console.print(Text(f"\n{diff.not_comparable}", "yellow"))
    if diff.pairs:
        console.print(Text("\npairs", "bold"))
        figures = diff.pairs.figures()
        console.print(
            Text(
                f"  {figures['pairs']:,} compared: same preference in {figures['same_preference']:.1%}, margins "
                f"{figures['margin_distance']:.4g} nats apart"
            )
        )
    if diff.tasks:
        console.print(Text("\nper token in nats, on the ids that both store and one class for the rest\n", "bold"))
        tasks = [*(diff.tasks[name] for name in sorted(diff.tasks)), *([diff.total()] if len(diff.tasks) > 1 else [])]
        show_table(pa.Table.from_pylist([_shown(task.figures()) for task in tasks]), console, on_its_side=True)
    if diff.worst:
        console.print(Text("\nthe tokens where they differ most; `logitlake inspect` shows a sample\n", "bold"))
        show_table(pa.Table.from_pylist([_worst(token) for token in diff.worst]), console)


def _shown(figures: dict[str, Any]) -> dict[str, Any]:
    shown = {}
    for name, value in figures.items():
        heading, factor = _HEADINGS[name]
        shown[heading] = float(f"{value * factor:.4g}") if isinstance(value, float) else value
    return shown


def _worst(token: WorstToken) -> dict[str, Any]:
    return {
        "KL(A‖B)": float(f"{token.kl:.3g}"),
        "sample": token.sample_id,
        "at": token.position,
        "label": token.token_id,
        "top-1 A": token.top1_a,
        "top-1 B": token.top1_b,
        "logprob A": float(f"{token.label_logprob_a:.4g}"),
        "logprob B": float(f"{token.label_logprob_b:.4g}"),
    }
