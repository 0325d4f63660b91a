"""What the three command lines share: one way to fail, one way to show progress, common options.

A `LogitLakeError` ends a command with one message on stderr and exit code 2; anything else is our fault and keeps
its traceback. Progress is a live bar on a terminal and one line for each tenth of the work elsewhere, so that the
log of a batch job shows life too.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from logitlake_shared.errors import LogitLakeError
from logitlake_shared.jobs.progress import faults_told

__all__ = ["config_command", "progress", "run_cli"]

Advance = Callable[..., None]

# One line of a log for so many, where nobody knows how many there are.
_COUNTED = 100_000


def run_cli(command: click.Command) -> None:
    """Runs a click command as a process: exit code 0, 1 (ours), the error's own (the user's), 130 (interrupted)."""
    try:
        with faults_told():
            command(standalone_mode=True)
    except LogitLakeError as error:
        click.secho("error: ", fg="red", bold=True, err=True, nl=False)
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)


def config_command(
    config_class: str,
    flags: Mapping[str, tuple[str, str]] | None = None,
    other_classes: Mapping[str, str] | None = None,
    foresee: str | None = None,
) -> Callable[..., Any]:
    """Makes `function(config, **own options)` the body of a click command with a TOML file, overrides and `--dry-run`.

    `config_class` is `module:name`, imported when the command runs: `--help` needs no configuration tree. `flags` are
    options that say the same as an override: `{"--limit": ("plan.limit", "help")}`; `other_classes` are options that
    say that the file is of another tree: `{"--pairs": "module:PairsConfig"}`. `foresee` names a function of the
    configuration whose words a dry run says on stderr: what is known of the work before it begins.
    """
    own_flags, others = flags or {}, other_classes or {}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @click.argument("config", type=Path, metavar="CONFIG.toml")
        @click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
        @click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop.")
        @wraps(function)
        def command(config: Path, overrides: tuple[str, ...], dry_run: bool, **options: Any) -> None:
            from logitlake_shared.config import load_config, to_toml

            given = {key: options.pop(_option_name(flag)) for flag, (key, _) in own_flags.items()}
            said = [f"{key}={value}" for key, value in given.items() if value is not None]
            chosen = [name for flag, name in others.items() if options.pop(_option_name(flag))]
            module, _, name = (chosen[0] if chosen else config_class).partition(":")
            resolved = load_config(getattr(import_module(module), name), config, [*overrides, *said])
            if dry_run:
                click.echo(to_toml(resolved), nl=False)
                if foresee is not None:
                    module, _, name = foresee.partition(":")
                    click.echo(getattr(import_module(module), name)(resolved), err=True)
            else:
                function(resolved, **options)

        for flag, (key, text) in own_flags.items():
            metavar = key.rpartition(".")[2].upper()
            command = click.option(flag, metavar=metavar, help=f"{text} As {key}=…")(command)
        for flag in others:
            command = click.option(flag, is_flag=True, help=f"CONFIG.toml is one of `{flag.lstrip('-')}`.")(command)
        return command

    return decorate


def _option_name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


@contextmanager
def progress(description: str, total: int | None, unit: str, *, after_s: float = 0.0) -> Iterator[Advance]:
    """Yields `advance(n, **figures)`; the figures (e.g. `errors=2`) are shown beside count, rate and time left.

    Without a `total` nobody knows how much there is: it counts.

    With `after_s` it says no more than it must: the bar goes when the work is done, and a log begins after so many
    seconds, since a check that is over by then needs none.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        yield from _bar(console, description, total, unit, transient=after_s > 0)
    else:
        yield from _lines(description, total, unit, after_s)


def _bar(console: Any, description: str, total: int | None, unit: str, *, transient: bool) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + " {task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=transient) as bar:
        task = bar.add_task(description, total=total, figures="")
        meter = _Meter()

        def advance(n: int = 1, **figures: object) -> None:
            bar.update(task, advance=n, figures=meter.text(n, figures))

        yield advance


def _lines(description: str, total: int | None, unit: str, after_s: float) -> Iterator[Advance]:
    meter, start = _Meter(), time.monotonic()
    step = _COUNTED if total is None else max(total // 10, 1)
    of_total = "" if total is None else f"/{total}"
    done = shown = 0

    def advance(n: int = 1, **figures: object) -> None:
        nonlocal done, shown
        done += n
        text = meter.text(n, figures)
        if (done - shown >= step or done == total) and time.monotonic() - start >= after_s:
            shown = done
            click.echo(f"{description}: {done}{of_total} {unit} {text}", err=True)

    yield advance


class _Meter:
    def __init__(self) -> None:
        self._start, self._done = time.monotonic(), 0

    def text(self, n: int, figures: dict[str, object]) -> str:
        self._done += n
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        shown = "".join(f" {key}={value}" for key, value in figures.items())
        return f"{rate:.3g}/s{shown}"
