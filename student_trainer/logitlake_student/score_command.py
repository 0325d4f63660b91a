"""`logitlake-student score`: a student beside its teacher, token by token. What is heavy is imported inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from logitlake_shared.errors import ConfigError

if TYPE_CHECKING:
    from logitlake_schemas import ScoresRecord
    from logitlake_student.score_figures import Summary, TaskFigures

__all__ = ["score", "stage_of"]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("lake")
@click.option("--cache", metavar="NAME", required=True, help="The cache of samples to score.")
@click.option("--split", help="Only samples of this split.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Parquet file to write.  [default: scores/CACHE[@SPLIT].parquet in the stage's folder]",
)
@click.option("--top", type=click.IntRange(1, 1000), default=8, show_default=True, help="Choices kept of each token.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def score(
    model: Path,
    lake: str,
    cache: str,
    split: str | None,
    out: Path | None,
    top: int,
    batch_size: int,
    device: str,
    dtype: str,
    output: Literal["table", "json"],
) -> None:
    """Where does a student differ from its teacher, and by how much?

    MODEL is the folder of a checkpoint, of a stage, or of a training run (its last stage is meant). Each response token
    of the cache gets the student's logprob, rank, entropy and first choices, and the KL from the teacher. The teacher
    service shows them beside the teacher's (`runs` in its configuration), and so does `logitlake inspect --scores`.
    """
    from logitlake_schemas import ScoresRecord
    from logitlake_shared.lake import Lake
    from logitlake_shared.student_scores import Scores, scores_path
    from logitlake_student.chat import checkpoint_folder
    from logitlake_student.evaluate import checkpoint_sha256
    from logitlake_student.score_figures import is_scored, summarised

    folder = checkpoint_folder(model)
    stage = stage_of(folder.resolve())
    if out is None and stage is None:
        raise ConfigError(f"{model}: no stage of a run, in whose folder scores would go; name a file with --out")
    there = Lake.open(lake).cache(cache)
    record = ScoresRecord(
        student=stage or folder.resolve().name,
        model_sha256=checkpoint_sha256(folder),
        dtype=dtype,
        cache=cache,
        spec_fingerprint=there.fingerprint,
        snapshot=there.open_snapshot().number,
        split=split,
        top=min(top, there.spec.tokenizer.vocab_size),
    )
    path = scores_path(folder.parent, cache, split) if out is None else out
    if not is_scored(path, record):
        _score(folder, lake, path, record, batch_size, device)
    _show(path, summarised(Scores(path)), output)


def stage_of(checkpoint: Path) -> str | None:
    """`<run>/<stage>`, if the folder is where a stage has its checkpoint."""
    *_, run, stage, name = "", "", *checkpoint.parts[1:]
    return f"{run}/{stage}" if name == "model" and run else None


def _score(folder: Path, lake: str, out: Path, record: "ScoresRecord", batch_size: int, device: str) -> None:
    import torch

    from logitlake_shared.cli_support import progress
    from logitlake_shared.reader import LakeDataset
    from logitlake_student.answers import load_examinee
    from logitlake_student.explained import writing_explained
    from logitlake_student.scores import score_samples

    dataset = LakeDataset(lake, record.cache, split=record.split, snapshot=record.snapshot)
    examinee = load_examinee(folder, device, getattr(torch, record.dtype))
    with progress(f"score {record.student}", len(dataset), "samples") as advance, writing_explained(out):
        score_samples(examinee, dataset, out, record, batch_size=batch_size, advance=advance)


def _show(path: Path, summary: "Summary", output: Literal["table", "json"]) -> None:
    from rich.console import Console

    from logitlake_shared.cli_output import compact_table, to_json

    worst = [{"sample_id": sample_id, "forward_kl": kl} for kl, sample_id in summary.worst]
    if output == "json":
        by_task = {task: figures.means() for task, figures in sorted(summary.by_task.items())}
        click.echo(to_json({"scores": str(path), "total": summary.total.means(), "tasks": by_task, "worst": worst}))
        return
    table = compact_table()
    for name in ("task", "samples", "tokens", "KL to teacher", "perplexity", "first choice"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, figures in (*sorted(summary.by_task.items()), ("all", summary.total)):
        table.add_row(task, *_cells(figures))
    Console().print(table)
    click.echo(f"it differs most in {', '.join(sample_id for _, sample_id in summary.worst)}")
    click.echo(f"token by token: {path}")


def _cells(figures: "TaskFigures") -> list[str]:
    means = figures.means()
    return [
        f"{figures.num_samples:,}",
        f"{figures.num_tokens:,}",
        f"{means['forward_kl']:.4f}",
        f"{means['perplexity']:.3f}",
        f"{means['first_choice']:.1%}",
    ]
