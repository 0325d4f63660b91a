"""What every benchmark shares: passes that take turns, memory at its peak, and figures with what they have to reach,
printed as a table or as one JSON object."""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["Figure", "in_own_process", "interleaved", "median", "peak_mib", "publish"]

Result = TypeVar("Result")

_MIN_WIDTH = 110


@dataclass(frozen=True)
class Figure:
    """One measured figure. `reach` says in words what it has to be, `holds` whether it is; None for a plain report."""

    name: str
    value: float
    unit: str
    reach: str | None = None
    holds: bool | None = None


def publish(benchmark: str, figures: Sequence[Figure], as_json: bool) -> None:
    """Prints the figures."""
    machine = {"platform": platform.platform(), "num_cpus": os.cpu_count()}
    if as_json:
        document = {"benchmark": benchmark, "machine": machine, "figures": [asdict(figure) for figure in figures]}
        click.echo(json.dumps(document))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", box=box.SIMPLE_HEAD, title=f"{benchmark} ({machine['num_cpus']} CPUs)")
    for name in ("value", "unit", "reach", "holds"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for figure in figures:
        holds = "" if figure.holds is None else "yes" if figure.holds else "NO"
        table.add_row(figure.name, f"{figure.value:.4g}", figure.unit, figure.reach or "", holds)
    console = Console()
    # Names are long; a table that is cut by the terminal reads better than one whose words are.
    console.width = max(console.width, _MIN_WIDTH)
    console.print(table)


def interleaved(passes: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each pass in each round; they take turns, and one round more comes first and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """The middle of a pass's rounds."""
    return statistics.median(seconds)


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The function's result; its process ends with it, and with that whatever libraries it started."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_mib(run: Callable[[], object]) -> float:
    """MiB that `run` adds to this process at their peak. Linux."""
    # From here on the high-water mark is that of the run.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kib) / 1024
