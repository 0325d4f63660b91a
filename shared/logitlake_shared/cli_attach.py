"""`logitlake attach`: a lake in a DuckDB of one's own."""

from pathlib import Path

import click

from logitlake_shared.cli_support import progress
from logitlake_shared.errors import ConfigError

__all__ = ["attach"]


@click.command(short_help="Attach a lake in a DuckDB of your own.")
@click.argument("lake", metavar="LAKE")
@click.option("--cache", metavar="NAME", help="Only the files of this cache.  [default: all of the lake]")
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Copy catalog and shards there first; needed where LAKE is not on the local disk.",
)
def attach(lake: str, cache: str | None, to: Path | None) -> None:
    """Print what a DuckDB of your own, 1.4 or later, is told so that it has the lake: paste it, or pipe it.

    The newest published catalog is attached as `lake` (tables caches, shards, errors, sample_index); samples, pairs and
    images are views. LAKE is also s3://bucket/lake, or http://host:8321/v1/files (its token: LOGITLAKE_TOKEN): with
    --to, what is not in FOLDER yet is fetched and verified first, and a catalog is made where LAKE shows none.

    \b
    logitlake attach runs/demo/lake
    logitlake attach http://localhost:8321/v1/files --to copy > attach.sql
    duckdb -init attach.sql
    """
    from logitlake_shared.catalog.attach import attach_statements, check_files, copy_files, find_attachable
    from logitlake_shared.lake import Lake

    opened = Lake.open(lake)
    folder = opened.store.root if to is None else to
    if folder is None:
        raise ConfigError(
            f"{lake}: is not on the local disk, where DuckDB reads; name a folder for a copy: --to FOLDER"
        )
    found = find_attachable(opened, cache, is_copied=to is not None)
    for line in found.late:
        click.echo(f"{line}; `logitlake rebuild` on the lake publishes a catalog that knows it", err=True)
    statements = attach_statements(folder, found)
    total = f"{len(found.files):,} files"
    if to is None:
        check_files(opened, found)
    else:
        with progress("attach", len(found.files), "files", after_s=1.0) as advance:
            num_fetched = copy_files(opened, found, folder, advance)
        total += f" in {folder}, {num_fetched:,} fetched now"
    number = found.catalog.number
    click.echo(f"{f'catalog {number}' if number else 'a catalog made here'}: {total}", err=True)
    for statement in statements:
        click.echo(statement)
