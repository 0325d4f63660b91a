"""Makes what the services read: the teacher's checkpoint, the student's, and the text.

    python -m examples.smollm2.prepare --out runs/smollm2

    <out>/teacher/      SmolLM2-135M-Instruct, float32 safetensors, 540 MB
    <out>/student/      a random Qwen3 with the same tokenizer
    <out>/data/         train.json, held_out.json, and settings.json

Each folder is there whole or not at all, and a second run finds its work done. The text is that of the packages
installed when it was made; it stays as it is until the folder is removed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from examples.smollm2.checkpoints import find_gguf, save_student, save_teacher
from examples.smollm2.text import HELD_OUT, TRAIN, installed_markdown, passages, records

__all__ = ["main", "write_data"]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/smollm2"), show_default=True)
@click.option("--train", "num_train", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--held-out", "num_held_out", type=click.IntRange(min=1), default=40, show_default=True)
def main(out: Path, num_train: int, num_held_out: int) -> None:
    """Make the checkpoints and the text of the example."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    gguf = find_gguf()
    out.mkdir(parents=True, exist_ok=True)
    _once(out / "data", lambda folder: write_data(folder, num_train, num_held_out))
    _check_settings(out / "data", num_train, num_held_out)
    _once(out / "teacher", lambda folder: save_teacher(gguf, folder))
    _once(out / "student", lambda folder: save_student(out / "teacher", folder))


def write_data(folder: Path, num_train: int, num_held_out: int) -> None:
    """Writes both splits and the settings. Raises `click.ClickException` when there is less text than asked for."""
    by_split = passages(installed_markdown())
    folder.mkdir(parents=True)
    for split, wanted, option in ((TRAIN, num_train, "--train"), (HELD_OUT, num_held_out, "--held-out")):
        there = by_split[split]
        if len(there) < wanted:
            raise click.ClickException(
                f"the packages of this environment give {len(there)} passages for the split {split!r}, expected at "
                f"least {wanted}; give a lower {option}, or install more packages"
            )
        _write_json(folder / f"{split}.json", records(there[:wanted], split))
    _write_json(folder / "settings.json", _settings(num_train, num_held_out))


def _settings(num_train: int, num_held_out: int) -> dict[str, int]:
    return {TRAIN: num_train, HELD_OUT: num_held_out}


def _check_settings(folder: Path, num_train: int, num_held_out: int) -> None:
    made = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    wanted = _settings(num_train, num_held_out)
    if made != wanted:
        raise click.ClickException(
            f"{folder}: was made with {made}, asked for {wanted}; choose another --out, or remove the folder"
        )


def _once(folder: Path, make: Callable[[Path], Any]) -> None:
    """Makes a folder under a hidden name and renames it when it is whole."""
    if folder.is_dir():
        click.echo(f"{folder}: made already")
        return
    building = folder.with_name(f".{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    make(building)
    building.rename(folder)
    click.echo(f"{folder}: made")


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
