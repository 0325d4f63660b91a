"""`logitlake-student chat` and `predict`: the commands that use a model. Everything heavy is imported inside them."""

import time
from pathlib import Path

import click

__all__ = ["chat", "predict"]

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
