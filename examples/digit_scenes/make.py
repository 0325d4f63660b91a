"""Writes a digit-scenes data set: pictures, LLaVA conversations for training and test, preference pairs.

    python -m examples.digit_scenes.make --out runs/digits

`train.json` has training faults, `test.json` has none and uses other handwriting; `preference.parquet` has
the columns of RLAIF-V, its chosen answers faithful and its rejected ones not, on pictures of their own. Same
options, same bytes. The folder appears whole or not at all; a second run with the same options sees that and
leaves it, and one with other options refuses to mix.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
import numpy as np

from examples.digit_scenes.questions import (
    FaultRates,
    Question,
    answer_with_faults,
    ask,
    ask_existence_pair,
    caption_of,
    has_habit,
    true_answer,
)
from examples.digit_scenes.world import Placed, Scene, Split, draw_layout, draw_scene

__all__ = ["Settings", "make_dataset", "preference_rows", "records_of_split"]

_FORMAT = 1
_MANIFEST = "world.json"
_DETAIL_TASKS = ("reading", "counting", "colour", "position")
_STREAMS = {"train": 10, "test": 11, "preference": 12}

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The sizes of a data set. Each number of scenes fixes the number of samples."""

    train_scenes: int = 2000
    """Four samples each: always the caption; then in turn an existence pair and a detail, or three details."""
    test_scenes: int = 160
    """Six samples each: the caption, an existence pair, three of the four details."""
    preference_scenes: int = 750
    """Two pairs each: a caption and an existence question."""
    preference_habit_share: float = 0.5
    """Of the preference scenes, those that have the habit: pairs are gathered where models err, as RLAIF-V's are."""
    seed: int = 0


def _silent(steps: Iterator[T], total: int, description: str) -> Iterator[T]:
    """A progress bar for those who want none; the command passes a real one of the same shape."""
    del total, description
    return steps


def records_of_split(
    split: Split, settings: Settings, rates: FaultRates | None
) -> Iterator[tuple[str, Scene, list[dict[str, Any]]]]:
    """For each scene its name, the scene, and its LLaVA records; `rates` None means exact answers.

    A record's `objects` and `places` say what is truly there, in the same order. A scene does not depend on
    how many come after it.
    """
    num_scenes = settings.train_scenes if split == "train" else settings.test_scenes
    for number in range(num_scenes):
        rng = np.random.default_rng([settings.seed, _STREAMS[split], number])
        scene = draw_scene(split, rng)
        name = f"{split}-{number:05d}"
        records = []
        for turn, question in enumerate(_questions(split, number, scene, rng)):
            answer = (
                true_answer(question, scene.objects)
                if rates is None
                else answer_with_faults(question, scene.objects, rates, rng)
            )
            records.append(
                {
                    "id": f"{name}-{turn}-{question.task}",
                    "image": f"images/{name}.png",
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{question.text}"},
                        {"from": "gpt", "value": answer},
                    ],
                    "task": question.task,
                    "split": split,
                    "source": "digit_scenes",
                    "objects": [placed.phrase for placed in scene.objects],
                    "places": [placed.place for placed in scene.objects],
                }
            )
        yield name, scene, records


def preference_rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """RLAIF-V rows on scenes of training digits: chosen answers are true, rejected ones are not.

    `origin_split` is a JSON text, as it is in RLAIF-V; here it holds the task and the objects that are truly
    there.
    """
    for number in range(settings.preference_scenes):
        rng = np.random.default_rng([settings.seed, _STREAMS["preference"], number])
        scene = draw_scene("train", rng, _layout(rng, with_habit=rng.random() < settings.preference_habit_share))
        image = png_bytes(scene)
        caption = ask("caption", scene.objects, rng)
        existence = ask_existence_pair(scene.objects, rng)[number % 2]
        answers = {
            caption: (caption_of(scene.objects), _rejected_caption(scene, rng)),
            existence: ("yes", "no") if number % 2 == 0 else ("no", "yes"),
        }
        for question, (chosen, rejected) in answers.items():
            name = f"preference-{number:05d}-{question.task}"
            yield {
                "ds_name": "digit_scenes",
                "image": {"bytes": image, "path": f"{name}.png"},
                "question": question.text,
                "chosen": chosen,
                "rejected": rejected,
                "origin_dataset": "digit_scenes",
                "origin_split": json.dumps(
                    {"type": question.task, "objects": [placed.phrase for placed in scene.objects]}
                ),
                "idx": 2 * number + (question.task == "existence"),
                "image_path": f"{name}.png",
            }


def png_bytes(scene: Scene) -> bytes:
    """The scene as an RGB PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(scene.pixels_HWC).save(buffer, format="PNG")
    return buffer.getvalue()


def make_dataset(
    out: Path, settings: Settings, progress: Callable[..., Any] = _silent
) -> Literal["made", "already there"]:
    """Write the data set to `out`, whole or not at all.

    Raises click.ClickException when `out` holds something else, or a data set of other settings.
    """
    if _is_there(out, settings):
        return "already there"
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        manifest = _write(building, settings, progress)
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        building.chmod(0o755)  # mkdtemp makes it private
        building.replace(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return "made"


def _write(folder: Path, settings: Settings, progress: Callable[..., Any]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "images").mkdir()
    counts: dict[str, int] = {}
    rates: dict[Split, FaultRates | None] = {"train": FaultRates(), "test": None}
    for split, split_rates in rates.items():
        written = []
        num_scenes = settings.train_scenes if split == "train" else settings.test_scenes
        scenes = records_of_split(split, settings, split_rates)
        for name, scene, records in progress(scenes, num_scenes, f"{split} scenes"):
            (folder / "images" / f"{name}.png").write_bytes(png_bytes(scene))
            written.extend(records)
        (folder / f"{split}.json").write_text(json.dumps(written, indent=1) + "\n")
        counts[split] = len(written)
    rows = list(progress(preference_rows(settings), 2 * settings.preference_scenes, "preference pairs"))
    counts["preference"] = len(rows)
    text = {name: pa.string() for name in ("question", "chosen", "rejected", "origin_dataset", "origin_split")}
    schema = pa.schema(
        {
            "ds_name": pa.string(),
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            **text,
            "idx": pa.int64(),
            "image_path": pa.string(),
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "preference.parquet", compression="zstd")
    return {"format": _FORMAT, "settings": asdict(settings), "fault_rates": asdict(FaultRates()), "samples": counts}


def _questions(split: Split, number: int, scene: Scene, rng: np.random.Generator) -> list[Question]:
    questions = [ask("caption", scene.objects, rng)]
    rotated = [_DETAIL_TASKS[(number // 2 + i) % 4] for i in range(3)]
    if split == "test":
        rotated = [_DETAIL_TASKS[(number + i) % 4] for i in range(3)]
        return [
            *questions,
            *ask_existence_pair(scene.objects, rng),
            *(ask(task, scene.objects, rng) for task in rotated),
        ]
    if number % 2 == 0:
        return [*questions, *ask_existence_pair(scene.objects, rng), ask(rotated[0], scene.objects, rng)]
    return [*questions, *(ask(task, scene.objects, rng) for task in rotated)]


def _layout(rng: np.random.Generator, *, with_habit: bool) -> tuple[Placed, ...]:
    """Any layout, or the first that has the habit."""
    while True:
        objects = draw_layout(rng)
        if not with_habit or has_habit(objects) is not None:
            return objects


def _rejected_caption(scene: Scene, rng: np.random.Generator) -> str:
    """As a training caption would err: by habit where the scene has the habit, else at random."""
    always = replace(FaultRates(), habit=1.0, caption=1.0)
    question = Question("caption", "")
    return answer_with_faults(question, scene.objects, always, rng)


def _is_there(out: Path, settings: Settings) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    manifest = out / _MANIFEST
    if not manifest.is_file():
        raise click.ClickException(f"{out} is not empty and holds no {_MANIFEST}: name another --out")
    found = json.loads(manifest.read_text())
    expected = {"format": _FORMAT, "settings": asdict(settings), "fault_rates": asdict(FaultRates())}
    for key, value in expected.items():
        if found.get(key) != value:
            raise click.ClickException(
                f"{out} holds digit scenes with {key} {found.get(key)}, asked for {value}: "
                "name another --out or delete it"
            )
    return True


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option(
    "--train-scenes", type=click.IntRange(1), default=Settings.train_scenes, show_default=True, help="4 samples each."
)
@click.option(
    "--test-scenes", type=click.IntRange(1), default=Settings.test_scenes, show_default=True, help="6 samples each."
)
@click.option(
    "--preference-scenes",
    type=click.IntRange(1),
    default=Settings.preference_scenes,
    show_default=True,
    help="2 pairs each.",
)
@click.option("--seed", default=Settings.seed, show_default=True)
def main(out: Path, train_scenes: int, test_scenes: int, preference_scenes: int, seed: int) -> None:
    from rich.progress import track

    settings = Settings(train_scenes, test_scenes, preference_scenes, seed=seed)
    outcome = make_dataset(
        out, settings, lambda steps, total, description: track(steps, description=description, total=total)
    )
    samples = json.loads((out / _MANIFEST).read_text())["samples"]
    click.echo(f"{out}: {outcome}; " + ", ".join(f"{count} {name}" for name, count in samples.items()))


if __name__ == "__main__":
    main()
