"""`logitlake doctor`: whether this machine can do the work."""

from pathlib import Path

import click

__all__ = ["doctor"]

_COLOURS = {"ok": "green", "warn": "yellow", "blocked": "red"}
_BLOCKED = 3


@click.command(short_help="Say whether this machine can do the work.")
@click.argument("lake", metavar="[LAKE]", required=False)
@click.option(
    "--tokens",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file of tokens that a service is to have: its mode, and what it is.",
)
@click.option("--json", "as_object", is_flag=True, help="One object.")
def doctor(lake: str | None, tokens: Path | None, as_object: bool) -> None:
    """Say whether this machine can do the work; exit code 3 when something blocks it.

    One line a check, with what to do: versions, GPUs, the storage of LAKE (probe objects are written there and removed
    again), the clock, open ports, Ray's authentication, the sandbox of SQL workers, open files. Without LAKE nothing is
    written anywhere but in a temporary folder.

    \b
    logitlake doctor runs/demo/lake
    logitlake doctor s3://bucket/lake --tokens tokens.sqlite --json
    """
    from logitlake_shared.doctor.examine import as_json, as_line, examine, worst

    found = []
    for check in examine(lake, tokens):
        found.append(check)
        if not as_object:
            line = as_line(check)
            status = click.style(check.status, fg=_COLOURS[check.status])
            click.echo(status + line.removeprefix(check.status))
    if as_object:
        click.echo(as_json(found, lake))
    elif lake is None:
        click.echo("no storage was looked at; name a LAKE", err=True)
    if worst(found) == "blocked":
        click.get_current_context().exit(_BLOCKED)
