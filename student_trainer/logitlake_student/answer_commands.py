"""`logitlake-student chat`, `predict`, `pope`: the commands that use a model. What is heavy is imported inside them."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

__all__ = ["chat", "pope", "predict"]

_DTYPES = ("float32", "bfloat16", "float16")
_PATH = click.Path(path_type=Path)
_THERE = click.Path(path_type=Path, exists=True)
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("model", type=_PATH)
@click.option("--prompt", help="Ask this, print the answer, and end.")
@click.option("--image", "images", type=_FILE, multiple=True, help="A picture to show; several are shown in order.")
@click.option("--system", help="A system message to begin with.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what a temperature draws.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True)
def chat(
    model: Path,
    prompt: str | None,
    images: tuple[Path, ...],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
) -> None:
    """Talk to a model, with pictures.

    MODEL is the folder of a checkpoint, of a stage, or of a training run (its last stage is meant). Without --prompt,
    type, or pipe questions in, one a line. Answers appear while they are written.
    """
    from logitlake_student.chat import Chat, checkpoint_folder, talk, tell

    if prompt is not None and not prompt.strip():
        raise click.BadParameter("there is nothing to answer; leave it out to type", param_hint="'--prompt'")
    folder = checkpoint_folder(model)
    click.secho(f"loading {folder} …", err=True, dim=True)
    started = time.monotonic()

    import torch

    from logitlake_student.answers import load_examinee

    examinee = load_examinee(folder, device, getattr(torch, dtype))
    kind = examinee.model.config.get_text_config().model_type
    size = examinee.model.num_parameters()
    click.secho(
        f"{type(examinee.model).__name__} ({kind}), {size:,} parameters, {dtype} on {device}, "
        f"{time.monotonic() - started:.1f} s",
        err=True,
        dim=True,
    )
    conversation = Chat(examinee, max_new_tokens, temperature, seed, system)
    if prompt is not None:
        tell(conversation, prompt, images)
    else:
        talk(conversation, images)


@click.command()
@click.argument("model", type=_PATH)
@click.option("--data", type=_THERE, required=True, help="LLaVA JSON or JSONL; a last answer is kept as `gold`.")
@click.option("--image-root", type=_FOLDER, help="Folder that image names are relative to.  [default: that of --data]")
@click.option("--out", type=_PATH, required=True, help="JSON lines to write; an interrupted file is gone on with.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True)
def predict(
    model: Path,
    data: Path,
    image_root: Path | None,
    out: Path,
    max_new_tokens: int,
    batch_size: int,
    device: str,
    dtype: str,
) -> None:
    """Answer a whole file of questions.

    MODEL is the folder of a checkpoint, of a stage, or of a training run (its last stage is meant). Answers are greedy,
    a line of JSON each, in the order of the data. Run again, it goes on where it was stopped, or says that all is
    answered.
    """
    from logitlake_student.chat import checkpoint_folder
    from logitlake_student.predictions import Prediction, write_predictions

    wanted = Prediction(
        model=checkpoint_folder(model),
        data=data,
        image_root=data.parent if image_root is None else image_root,
        out=out,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    total, added = write_predictions(wanted)
    click.echo(f"{out}: {total:,} answers" + (f", {added:,} of them new" if added else ", all there already"))


@click.command()
@click.argument("model", type=_PATH, required=False)
@click.option("--questions", type=_FILE, multiple=True, required=True, help="A question file of POPE; may be repeated.")
@click.option("--images", type=_FOLDER, help="Folder of the images that the questions are about.")
@click.option("--answers", type=_FILE, multiple=True, help="Count these answer files, in the order of the questions.")
@click.option("--out", type=_PATH, help="Folder for answer files and pope.json.")
@click.option("--unclear-is-yes", is_flag=True, help="Count as POPE's own script does: what is not no is yes.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def pope(
    model: Path | None,
    questions: tuple[Path, ...],
    images: Path | None,
    answers: tuple[Path, ...],
    out: Path | None,
    unclear_is_yes: bool,
    max_new_tokens: int,
    batch_size: int,
    device: str,
) -> None:
    """Does a model see what is not there? POPE's questions, file by file.

    MODEL is the folder of a checkpoint, of a stage, or of a training run; with --answers no model is asked.
    """
    from rich.console import Console
    from rich.table import Table

    from logitlake_student.chat import checkpoint_folder
    from logitlake_student.pope import answer_questions, read_answers, read_questions, score

    if (model is None) != bool(answers) or (answers and len(answers) != len(questions)):
        raise click.UsageError("give MODEL to ask it, or --answers once for each --questions to count them")
    if model is not None and (images is None or out is None):
        raise click.UsageError("to ask MODEL, --images and --out are needed, too")
    asked = [read_questions(path, images if model is not None else None) for path in questions]
    figures = {}
    for place, path in enumerate(questions):
        if model is None:
            said = read_answers(answers[place], asked[place])
        else:
            assert out is not None
            written = out / f"{path.stem}.answers.jsonl"
            options: dict[str, Any] = {"device": device, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
            said = answer_questions(checkpoint_folder(model), asked[place], written, **options)
        figures[path.stem] = score(asked[place], said, unclear_is_yes=unclear_is_yes)
    table = Table("questions", "number", "accuracy", "precision", "recall", "F1", "yes", "unclear", box=None)
    for name, found in figures.items():
        shares = (found.accuracy, found.precision, found.recall, found.hallucination_f1, found.yes_ratio)
        cells = ["unknown" if share is None else f"{share:.4f}" for share in shares]
        table.add_row(name, str(found.num_questions), *cells, str(found.num_unclear))
    known = [found.hallucination_f1 for found in figures.values() if found.hallucination_f1 is not None]
    if len(figures) > 1 and len(known) == len(figures):
        table.add_row("mean F1", "", "", "", "", f"{sum(known) / len(known):.4f}", "", "")
    Console().print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        document = {name: asdict(found) for name, found in figures.items()}
        (out / "pope.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
