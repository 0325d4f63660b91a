"""The walk-through: both services' own command lines on the digit scenes, one after the other.

    python -m examples.digit_scenes.demo [--engine vllm] [--out runs/demo]

Nothing here is private to the demo: each step is a command that is printed before it runs and can be run by hand.
Each command resumes or says that it is done, so the walk-through does too; the seconds of a step are kept from the
run that finished it.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

__all__ = ["Step", "run_steps", "steps"]

CONFIGS = Path("examples/digit_scenes/configs")
DEFAULT_OUT = Path("runs/demo")
QUESTIONS = (
    "SELECT task, count(*) AS samples, sum(len(response_ids)) AS tokens, "
    'round(avg(len(response_ids)), 1) AS "tokens a response" FROM samples GROUP BY task ORDER BY task',
    'SELECT task, round(avg(entropy), 3) AS "entropy, nats", round(avg(k), 1) AS "entries kept", '
    'round(100 * avg(CAST(label_rank > 1 AS INT)), 1) AS "teacher against label, %" '
    "FROM tokens GROUP BY task ORDER BY task",
    "SELECT task, count(*) AS pairs, round(100 * avg(CAST(chosen_score > rejected_score AS INT)), 1) "
    'AS "teacher for chosen, %" FROM pairs GROUP BY task ORDER BY task',
)


AND_NOW = f"""
And now
$ logitlake-student score {DEFAULT_OUT}/student {DEFAULT_OUT}/lake --cache main --split test  # where it still differs
$ logitlake-teacher serve teacher_service/logitlake_teacher/configs/serve.toml  # the lake at http://127.0.0.1:8321
$ logitlake-student serve student_trainer/logitlake_student/configs/serve.toml  # the run at http://127.0.0.1:8322"""


@dataclass(frozen=True)
class Step:
    """One command of the walk-through."""

    name: str
    title: str
    command: tuple[str, ...]


def steps(out: Path = DEFAULT_OUT, *, engine: str = "hf", seed: int = 0) -> list[Step]:
    """The commands, in order. The configuration files hold `runs/demo` and seed 0; other values are overrides."""
    data, lake, student = out / "data", out / "lake", out / "student"

    def command(program: str, verb: str, *overrides: str) -> tuple[str, ...]:
        return (program, verb, str(CONFIGS / f"{verb}.toml"), *overrides)

    def moved(**paths: Path) -> list[str]:
        return [] if out == DEFAULT_OUT else [f"{key.replace('__', '.')}={path}" for key, path in paths.items()]

    engines = [] if engine == "hf" else [f"engine.type={engine}"]
    seeds = [] if seed == 0 else [f"stages.{number}.seed={seed}" for number in range(4)]
    train_data = moved(data__0__path=data / "train.json", data__0__image_root=data)
    test_data = moved(data__1__path=data / "test.json", data__1__image_root=data)
    pair_data = moved(data__0__path=data / "preference.parquet")
    models = moved(**{f"models__{place}__path": student / name / "model" for place, name in enumerate(STAGES, start=1)})
    return [
        Step(
            "data",
            "Draw the world",
            (
                "python",
                "-m",
                "examples.digit_scenes.make",
                "--out",
                str(data),
                *(["--seed", str(seed)] if seed else []),
            ),
        ),
        Step(
            "capture",
            "The teacher says what it knows about every response token, once",
            command("logitlake-teacher", "capture", *engines, *moved(lake__uri=lake), *train_data, *test_data),
        ),
        Step(
            "pairs",
            "The teacher scores preference pairs",
            command("logitlake-teacher", "pairs", *engines, *moved(lake__uri=lake), *pair_data),
        ),
        *(
            Step(f"sql_{number}", "The lake answers", ("logitlake", "sql", str(lake), question))
            for number, question in enumerate(QUESTIONS, start=1)
        ),
        Step(
            "train",
            "The student learns from the lake, in four stages; no teacher in memory",
            command("logitlake-student", "train", *moved(data__lake=lake, output=student), *seeds),
        ),
        Step(
            "eval",
            "The teacher and the student after every stage are examined",
            command(
                "logitlake-student",
                "eval",
                *moved(lake=lake, output=out / "eval", test_data=data / "test.json", image_root=data),
                *models,
            ),
        ),
        Step(
            "export",
            "The student becomes a stock checkpoint, reloaded and compared",
            command("logitlake-student", "export", *moved(run=student, output=out / "export", evaluation=out / "eval")),
        ),
        Step(
            "report",
            "The report",
            command(
                "logitlake-student",
                "report",
                f"seconds={out / 'seconds.json'}",
                *moved(
                    run=student,
                    evaluation=out / "eval",
                    lake=lake,
                    html=out / "report.html",
                    summary=out / "summary.json",
                ),
            ),
        ),
    ]


STAGES = ("init", "d2d", "d2s", "preference")


def run_steps(wanted: list[Step], out: Path) -> None:
    """Runs the commands, each printed first; ends the process with the exit code of one that fails."""
    out.mkdir(parents=True, exist_ok=True)
    seconds_file = out / "seconds.json"
    for step in wanted:
        click.secho(f"\n{step.title}", bold=True)
        click.secho(f"$ {shlex.join(step.command)}", fg="cyan")
        started = time.monotonic()
        program = Path(sys.executable).parent / step.command[0]
        done = subprocess.run([str(program), *step.command[1:]])
        if done.returncode:
            click.secho(f"exit code {done.returncode}: mend what the command says, then run this again", fg="red")
            sys.exit(done.returncode)
        seconds = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
        seconds.setdefault(step.name, round(time.monotonic() - started, 1))
        seconds_file.write_text(json.dumps(seconds, indent=1) + "\n")


@click.command()
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/demo, with vllm runs/demo-vllm.")
@click.option("--seed", default=0, show_default=True, help="Of the data and of the order of the samples.")
def main(engine: str, out: Path | None, seed: int) -> None:
    """Run the whole road on the digit scenes."""
    if out is None:
        out = DEFAULT_OUT if engine == "hf" else Path(f"{DEFAULT_OUT}-{engine}")
    run_steps(steps(out, engine=engine, seed=seed), out)
    if out == DEFAULT_OUT:
        click.echo(AND_NOW)


if __name__ == "__main__":
    main()
