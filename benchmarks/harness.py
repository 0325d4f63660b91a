"""What every benchmark shares: figures with what they have to reach, printed as a table or as one JSON object."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

__all__ = ["Figure", "publish"]

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
