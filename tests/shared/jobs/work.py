"""A command for jobs of tests: does items one after the other, each once, whatever ends it; waits where it is told."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from logitlake_shared.config import StrictModel, load_config
from logitlake_shared.errors import DataError
from logitlake_shared.jobs.measured import Meter, labelled
from logitlake_shared.jobs.progress import say

__all__ = ["WorkConfig", "cli"]


class WorkConfig(StrictModel):
    """What the work is."""

    folder: Path
    """where it is done: a line of `done` for each item"""
    items: int = 4
    wait_in: str = ""
    """a phase in which it waits for a byte in the pipe `gate`, item after item where that is `running`"""
    bad: int = 0
    """items that fail, as images that are missing"""
    dies_at: int | None = None
    """the item before which it is killed, once"""
    refuses: str = ""
    """fails with this error before it begins"""
    writes: str = ""
    """into its log, before it begins"""
    heeds: bool = True
    """whether it ends by itself when it is asked to"""


@click.command()
@click.argument("path", type=Path)
def cli(path: Path) -> None:
    """Does the work."""
    config = load_config(WorkConfig, path)
    signal.signal(signal.SIGTERM, _stop if config.heeds else signal.SIG_IGN)
    say(phase="validating")
    click.echo(config.writes, err=True)
    _wait(config, "validating")
    if config.refuses:
        raise DataError(config.refuses)
    done = config.folder / "done"
    say(phase="running", counts=_counts(config, done))
    meter = Meter()
    while (place := _done(done)) < config.items:
        _wait(config, "running")
        if config.dies_at == place and not (config.folder / "died").exists():
            (config.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with done.open("a") as file:
            file.write(f"{place}\n")
        meter.add("work_items", 1)
        meter.time("work_seconds", 0.3)
        meter.renew(labelled("work_place", place % 2), place)
        say(counts=_counts(config, done), figures={"last": place}, measured=meter.told())
    say(phase="finalizing")
    _wait(config, "finalizing")
    say(result={"items": _done(done)})


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)


def _wait(config: WorkConfig, phase: str) -> None:
    if config.wait_in == phase:
        say(figures={"waits": phase, "pid": os.getpid()})
        gate = os.open(config.folder / "gate", os.O_RDWR)  # opened so, a pipe never comes to its end
        os.read(gate, 1)
        os.close(gate)


def _done(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _counts(config: WorkConfig, done: Path) -> dict[str, Any]:
    committed = _done(done)
    failed = min(config.bad, committed)
    counts = {"total": config.items, "committed": committed, "failed": failed, "quarantined": 0}
    return counts | {"errors": {"image_missing": failed}}
