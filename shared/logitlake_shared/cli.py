"""The `logitlake` command: look at a lake, ask it questions in SQL, check it. Never changes it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logitlake_shared.cli_support import progress, run_cli
from logitlake_shared.errors import ConfigError, LakeCorruptError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["main"]

_LAKE = click.argument("lake", metavar="LAKE")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitlake")
def cli() -> None:
    """Ask a lake of teacher logprobs. LAKE is a folder or an object-store URL such as s3://bucket/lake."""


@cli.command()
@_LAKE
def ls(lake: str) -> None:
    """The caches of a lake: teacher, rows, tokens, bytes per token, stored error."""
    from logitlake_shared.catalog import open_catalog

    with open_catalog(lake) as catalog:
        answer = catalog.query("SELECT * REPLACE (fingerprint[:16] AS fingerprint) FROM caches ORDER BY cache")
    _show_records(answer)


@cli.command()
@_LAKE
@click.argument("query")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "csv", "parquet"]),
    default="table",
    show_default=True,
    help="json is one object a line; parquet needs --to.",
)
@click.option("--to", type=click.Path(dir_okay=False), help="Write to this file instead of the terminal.")
def sql(lake: str, query: str, output: str, to: str | None) -> None:
    """Answer one SQL QUERY over samples, tokens, topk, pairs, images, shards, caches, errors.

    \b
    logitlake sql runs/demo/lake "SELECT task, avg(entropy) FROM tokens GROUP BY task"
    """
    from logitlake_shared.catalog import open_catalog

    with open_catalog(lake) as catalog:
        answer = catalog.query(query)
    if output == "parquet":
        _write_parquet(answer, to)
    elif output == "table" and to is None:
        _show_table(answer)
    else:
        text = _as_csv(answer) if output == "csv" else _as_json_lines(answer)
        if to is None:
            click.echo(text, nl=False)
        else:
            Path(to).write_text(text, encoding="utf-8")


@cli.command()
@_LAKE
def verify(lake: str) -> None:
    """Check every committed byte and the laws of every row; exit code 2 when something is wrong."""
    from logitlake_shared.lake import Lake
    from logitlake_shared.verify import verify_cache

    opened = Lake.open(lake)
    work = [
        (cache, commit)
        for name in opened.cache_names()
        if (cache := opened.cache(name)).has_snapshot()
        for commit in cache.open_snapshot().commits
    ]
    findings = []
    with progress("verify", len(work), "units") as advance:
        for cache, commit in work:
            findings += list(verify_cache(cache, commit))
            advance(1, problems=len(findings))
    for finding in findings:
        click.echo(f"{finding.path or finding.unit}: {finding.problem}", err=True)
    if findings:
        raise LakeCorruptError(f"{lake}: {len(findings)} problems in {len({f.unit for f in findings})} units")
    click.echo(f"{lake}: {len(work)} units verified, no problem found")


def main() -> None:
    """Entry point of the console script."""
    run_cli(cli)


def _show_table(table: "pa.Table") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for field in table.schema:
        numeric = str(field.type).startswith(("int", "uint", "float", "double", "decimal"))
        shown.add_column(field.name, justify="right" if numeric else "left", overflow="fold")
    for row in table.to_pylist():
        shown.add_row(*(_cell(value) for value in row.values()))
    Console().print(shown)


def _show_records(table: "pa.Table") -> None:
    """The table turned on its side, one column a record: wide records stay readable on a narrow terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    head, *fields = table.schema.names
    records = table.to_pylist()
    shown = Table(head, *(record[head] for record in records), box=box.SIMPLE_HEAD)
    for field in fields:
        shown.add_row(field, *(_cell(record[field]) for record in records))
    Console().print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return str(value)


def _as_csv(table: "pa.Table") -> str:
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(table.schema.names)
    writer.writerows(row.values() for row in table.to_pylist())
    return buffer.getvalue()


def _as_json_lines(table: "pa.Table") -> str:
    import json

    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table.to_pylist())


def _write_parquet(table: "pa.Table", to: str | None) -> None:
    import pyarrow.parquet as pq

    if to is None:
        raise ConfigError("--output parquet needs --to FILE; a Parquet file is not for the terminal")
    pq.write_table(table, to)
