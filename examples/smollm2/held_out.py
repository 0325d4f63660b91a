"""KL(teacher‖student) on text that the student never saw, from the lake: the teacher is not loaded.

    python -m examples.smollm2.held_out runs/smollm2/lake hf runs/smollm2/student runs/smollm2/run/d2d/model

Per response token, in nats, over the stored entries and the tail as one class (a lower bound of the KL over the
whole vocabulary), with the trainer's own batches and loss. Beside it stand the cross-entropies of student and teacher
on the text itself.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from examples.smollm2.text import HELD_OUT
from logitlake_shared.errors import LogitLakeError

__all__ = ["Figures", "held_out_figures"]

_BATCH_SAMPLES = 8
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Figures:
    """Means over the response tokens of the split, in nats."""

    samples: int
    tokens: int
    kl: float
    """forward_kl = KL(teacher‖student)"""
    ce: float
    """the student's cross-entropy on the text"""
    teacher_ce: float
    """the teacher's"""


def held_out_figures(lake: str | Path, cache: str, model_dir: Path, split: str = HELD_OUT) -> Figures:
    """Examines the text-only student in `model_dir`. Raises `LogitLakeError` when it does not belong to the lake."""
    import torch

    from logitlake_shared.reader import LakeDataset
    from logitlake_shared.rendering import Renderer
    from logitlake_student.data import SampleCollator, StudentInputs, check_student_fits
    from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
    from logitlake_student.model_inputs import ModelInputs
    from logitlake_student.models.forward import hidden_response_rows
    from logitlake_student.models.load import load_student

    model = load_student(model_dir, dtype=torch.float32).eval()
    renderer, dataset = Renderer(model_dir), LakeDataset(lake, cache, split=split)
    check_student_fits(dataset.spec, dataset, renderer)
    collate = SampleCollator(
        StudentInputs(ModelInputs(image_token_id=None, loader=None), pad_id=renderer.pad_id),
        dataset.spec.codec,
    )
    tokens, kl, ce, teacher_ce = 0, 0.0, 0.0, 0.0
    for start in range(0, len(dataset), _BATCH_SAMPLES):
        samples = [dataset[place] for place in range(start, min(start + _BATCH_SAMPLES, len(dataset)))]
        batch = collate(samples)
        teacher = TeacherBatch(
            batch["topk_ids_RK"], batch["topk_logprobs_RK"], batch["log_tail_mass_R"], batch["label_ids_R"]
        )
        with torch.inference_mode():
            _, sums = distillation_loss(
                hidden_response_rows(model, batch),
                model.lm_head.weight[: renderer.vocab_size],
                teacher,
                divergence_weight=1.0,
                ce_weight=0.0,
                chunk_rows=_CHUNK_ROWS,
            )
        tokens += len(batch["label_ids_R"])
        kl += float(sums.divergence_sum)
        ce += float(sums.ce_sum)
        teacher_ce -= sum(float(sample.rows.label_logprob_T.sum()) for sample in samples)
    return Figures(len(dataset), tokens, kl / tokens, ce / tokens, teacher_ce / tokens)


@click.command()
@click.argument("lake")
@click.argument("cache")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Also write the figures here, by model.")
def main(lake: str, cache: str, models: tuple[Path, ...], as_json: Path | None) -> None:
    """Examine students against the held-out rows of CACHE in LAKE."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    figures = {}
    for model_dir in models:
        try:
            found = figures[str(model_dir)] = held_out_figures(lake, cache, model_dir)
        except LogitLakeError as error:
            raise click.ClickException(str(error)) from error
        click.echo(
            f"{model_dir}: KL to teacher {found.kl:.3f} nats/token, cross-entropy {found.ce:.3f} "
            f"(teacher {found.teacher_ce:.3f}), {found.samples} held-out samples, {found.tokens} tokens"
        )
    if as_json is not None:
        document = {name: asdict(found) for name, found in figures.items()}
        as_json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
