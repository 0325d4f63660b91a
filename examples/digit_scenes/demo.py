"""The walk-through: both services' own command lines on the digit scenes, one after the other.

    python -m examples.digit_scenes.demo [--engine vllm] [--out runs/demo]

Nothing here is private to the demo: each step is a command that is printed before it runs and can be run by hand.
Each command resumes or says that it is done, so the walk-through does too; the seconds of a step are kept the first
time that it completes.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

CONFIGS = Path("examples/digit_scenes/configs")
QUESTIONS = (
    "SELECT task, count(*) AS samples, sum(len(response_ids)) AS tokens, "
    'round(100 * avg(len(image_sha256)), 1) AS "% with image" FROM samples GROUP BY task ORDER BY task',
    'SELECT task, round(avg(entropy), 3) AS "entropy (nats)", round(100 * avg(CAST(label_rank > 1 AS INT)), 1) '
    'AS "% where the teacher disagrees with the label", round(avg(k), 1) AS "entries kept" '
    "FROM tokens GROUP BY task ORDER BY task",
    "SELECT task, count(*) AS pairs, round(100 * avg(CAST(chosen_score > rejected_score AS INT)), 1) "
    'AS "% where the teacher prefers the chosen answer" FROM pairs GROUP BY task ORDER BY task',
)


@dataclass(frozen=True)
class Step:
    """One command of the walk-through."""

    name: str
    title: str
    command: Sequence[str]


def steps(out: Path, engine: str) -> list[Step]:
    """The commands, in order. `out` replaces `runs/demo` of the configuration files."""
    lake = str(out / "lake")

    def teacher(verb: str) -> list[str]:
        files = {"capture": "train.json", "pairs": "preference.parquet"}
        data = [f"data.0.path={out / 'data' / files[verb]}"]
        if verb == "capture":
            data += [
                f"data.0.image_root={out / 'data'}",
                f"data.1.path={out / 'data' / 'test.json'}",
                f"data.1.image_root={out / 'data'}",
            ]
        overrides = [f"engine.type={engine}", f"lake.uri={lake}", *data]
        return ["logitlake-teacher", verb, str(CONFIGS / f"{verb}.toml"), *overrides]

    def student(verb: str) -> list[str]:
        return ["logitlake-student", verb, str(CONFIGS / f"{verb}.toml")]

    return [
        Step("data", "Draw the world", ["python", "-m", "examples.digit_scenes.make", "--out", str(out / "data")]),
        Step("capture", "The teacher says what it knows, once", teacher("capture")),
        Step("pairs", "The teacher scores preference pairs", teacher("pairs")),
        *(
            Step(f"sql{number}", "The lake answers", ["logitlake", "sql", lake, question])
            for number, question in enumerate(QUESTIONS, start=1)
        ),
        Step("train", "The student learns from the lake, in four stages", student("train")),
        Step("eval", "The teacher and every stage are examined", student("eval")),
        Step("export", "The student is exported, reloaded and compared", student("export")),
        Step("report", "The report", student("report")),
    ]


@click.command()
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
def main(engine: str, out: Path) -> None:
    """Run the whole road on the digit scenes."""
    out.mkdir(parents=True, exist_ok=True)
    seconds_file = out / "seconds.json"
    for step in steps(out, engine):
        click.secho(f"\n{step.title}", bold=True)
        click.secho(f"$ {shlex.join(step.command)}", fg="cyan")
        started = time.monotonic()
        done = subprocess.run([str(Path(sys.executable).parent / step.command[0]), *step.command[1:]])
        if done.returncode:
            click.secho(
                f"{step.command[0]} ended with exit code {done.returncode}; mend what it says and run again", fg="red"
            )
            sys.exit(done.returncode)
        seconds = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
        seconds.setdefault(step.name, round(time.monotonic() - started, 1))
        seconds_file.write_text(json.dumps(seconds, indent=2) + "\n")


if __name__ == "__main__":
    main()
