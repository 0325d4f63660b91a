"""Do the recipe's directions show on the digit scenes? The demo's own commands, one run a seed.

    python -m benchmarks.recipe [--seeds 3] [--json] [--quick]

The seed changes the training data, the test data, the preference pairs and the order of the samples; the teacher is
the committed one. Runs lie in `runs/recipe/seed-N` and resume. `--quick` reads the runs that are finished and makes
none.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import click
from examples.digit_scenes.demo import run_steps, steps

from benchmarks.harness import Figure, publish

RUNS = Path("runs/recipe")
METRICS = ("vqa_accuracy", "hallucination_f1", "caption_hallucination_rate", "kl_to_teacher")


def figures_of(summaries: list[dict[str, Any]]) -> list[Figure]:
    """Means over the seeds, and the four claims, each of which must hold for every seed."""
    figures = []
    for model in ("teacher", *summaries[0]["stages"]):
        for metric in METRICS:
            values = [_model(summary, model)[metric] for summary in summaries]
            figures.append(Figure(f"{model} {metric}", mean(values), "nats/token" if "kl" in metric else "share"))

    def claim(name: str, reach: str, gaps: list[float], unit: str) -> Figure:
        smallest = min(gaps)
        return Figure(
            name, smallest, unit, f"{reach} for every seed", smallest >= 0 if reach == ">= 0" else smallest > 0
        )

    def gaps(metric: str, higher: str, lower: str) -> list[float]:
        return [_model(summary, higher)[metric] - _model(summary, lower)[metric] for summary in summaries]

    figures += [
        claim("teacher - d2s, vqa_accuracy", "> 0", gaps("vqa_accuracy", "teacher", "d2s"), "share"),
        claim("d2s - d2d, vqa_accuracy", ">= 0", gaps("vqa_accuracy", "d2s", "d2d"), "share"),
        claim("init - d2d, KL", "> 0", gaps("kl_to_teacher", "init", "d2d"), "nats/token"),
        claim("d2d - d2s, KL", "> 0", gaps("kl_to_teacher", "d2d", "d2s"), "nats/token"),
        claim(
            "d2s - preference, caption_hallucination_rate",
            "> 0",
            gaps("caption_hallucination_rate", "d2s", "preference"),
            "share",
        ),
    ]
    return figures


def _model(summary: dict[str, Any], name: str) -> dict[str, float]:
    model: dict[str, float] = summary["teacher"] if name == "teacher" else summary["stages"][name]
    return model


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Runs, with seeds 1, 2, …")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.option("--quick", is_flag=True, help="Only read runs that are finished.")
def main(seeds: int, as_json: bool, quick: bool) -> None:
    """Measure the recipe's claims."""
    folders = [RUNS / f"seed-{seed}" for seed in range(1, seeds + 1)]
    for seed, folder in enumerate(folders, start=1):
        if not quick:
            run_steps(steps(folder, seed=seed), folder)
    finished = [folder / "summary.json" for folder in folders if (folder / "summary.json").is_file()]
    if not finished:
        raise click.ClickException(f"no finished run under {RUNS}; run without --quick (about five minutes a seed)")
    publish("recipe", figures_of([json.loads(path.read_text()) for path in finished]), as_json)


if __name__ == "__main__":
    main()
