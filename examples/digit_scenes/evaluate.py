"""The test figures of a digit-scenes model, taken with stock transformers: greedy answers, exact tests.

    python -m examples.digit_scenes.evaluate examples/digit_scenes/models/teacher

Answers are compared as texts, per task. Existence is scored as POPE scores it: precision, recall and F1 of
"yes", and the share of "yes". A caption hallucinates when it names at least one "<colour> <digit>" that is
not in the scene.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from examples.digit_scenes.make import Settings, records_of_split
from examples.digit_scenes.questions import TASKS, mentions

__all__ = ["evaluate_model", "figures_of"]

_BATCH = 64
_MAX_NEW_TOKENS = 48


def figures_of(records: list[dict[str, Any]], answers: list[str]) -> dict[str, Any]:
    """Figures of answers to LLaVA records that carry their `objects`; shares are rounded to four digits."""
    exact: dict[str, list[bool]] = defaultdict(list)
    claims: list[tuple[bool, bool]] = []
    hallucinates = []
    for record, answer in zip(records, answers, strict=True):
        expected = record["conversations"][1]["value"]
        exact[record["task"]].append(answer == expected)
        if record["task"] == "existence":
            claims.append((answer == "yes", expected == "yes"))
        if record["task"] == "caption":
            hallucinates.append(not set(mentions(answer)) <= set(record["objects"]))
    figures: dict[str, Any] = {"num_samples": len(records), "exact": {task: _mean(exact[task]) for task in TASKS}}
    if claims:
        hits = sum(said and true for said, true in claims)
        said_yes, truly_yes = sum(said for said, _ in claims), sum(true for _, true in claims)
        figures["existence"] = {
            "precision": round(hits / max(said_yes, 1), 4),
            "recall": round(hits / max(truly_yes, 1), 4),
            "f1": round(2 * hits / max(said_yes + truly_yes, 1), 4),
            "yes_ratio": round(said_yes / len(claims), 4),
        }
    figures["caption_hallucination_rate"] = _mean(hallucinates)
    return figures


def evaluate_model(model_dir: Path, device: str = "cpu", settings: Settings | None = None) -> dict[str, Any]:
    """Figures of a LLaVA checkpoint on the test split, drawn in memory with the default settings."""
    import torch
    from PIL import Image
    from rich.progress import track
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model_dir)
    model = AutoModelForImageTextToText.from_pretrained(model_dir).to(device).eval()
    pictures, records = [], []
    for _, scene, scene_records in records_of_split("test", settings or Settings(), rates=None):
        pictures.extend([Image.fromarray(scene.pixels_HWC)] * len(scene_records))
        records.extend(scene_records)
    answers: list[str] = []
    for start in track(range(0, len(records), _BATCH), description="answering"):
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _question(record)}]}],
                add_generation_prompt=True,
            )
            for record in records[start : start + _BATCH]
        ]
        inputs = processor(images=pictures[start : start + _BATCH], text=prompts, padding=True, return_tensors="pt").to(
            device
        )
        with torch.inference_mode():
            output_ids_BS = model.generate(**inputs, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS)
        answers += processor.batch_decode(output_ids_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return figures_of(records, answers)


def _question(record: dict[str, Any]) -> str:
    text: str = record["conversations"][0]["value"]
    return text.removeprefix("<image>\n")


def _mean(outcomes: list[bool]) -> float | None:
    return round(sum(outcomes) / len(outcomes), 4) if outcomes else None


@click.command(help=__doc__)
@click.argument("model_dir", type=click.Path(exists=True, path_type=Path))
@click.option("--device", default="cpu", show_default=True)
def main(model_dir: Path, device: str) -> None:
    click.echo(json.dumps(evaluate_model(model_dir, device), indent=2))


if __name__ == "__main__":
    main()
