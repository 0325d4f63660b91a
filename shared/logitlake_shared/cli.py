"""The `logitlake` command: look at a lake and ask it questions. What checks and changes a lake is in `cli_care`.

Each command imports what it needs when it runs, so that `--help` is instant and the base install stays light.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from logitlake_shared.cli_attach import attach
from logitlake_shared.cli_care import diff, gc, rebuild, verify
from logitlake_shared.cli_doctor import doctor
from logitlake_shared.cli_support import progress, run_cli
from logitlake_shared.errors import QueryError

if TYPE_CHECKING:
    import pyarrow as pa

    from logitlake_shared.tools.stats import By, CacheStats

__all__ = ["main"]

_LAKE = click.argument("lake", metavar="LAKE")
_LAKE_OR_SERVER = click.argument("lake", metavar="[LAKE]", required=False)
_SERVER = click.option(
    "--server", metavar="URL", help="Ask this service instead of a LAKE; its token: LOGITLAKE_TOKEN."
)
_CACHE = click.option("--cache", metavar="NAME", help="Only this cache.  [default: all of the lake]")
_TABLE_OR_JSON = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)
_FILE = click.Path(dir_okay=False, path_type=Path)
_VIEWS = "samples, tokens, topk, pairs, images, sample_index, shards, caches, errors"
_CACHES = (
    "SELECT cache, kind, teacher, engine, fingerprint[:16] AS fingerprint, snapshot, units, rows, tokens, errors, "
    "bytes, round(bytes_per_token, 2) AS bytes_per_token, round(mean_k, 2) AS mean_k, stored_kl_mean, stored_kl_max "
    "FROM caches ORDER BY cache"
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitlake")
def cli() -> None:
    """Ask a lake of teacher logprobs. LAKE is a folder or an object-store URL such as s3://bucket/lake."""


@cli.command(short_help="The caches of a lake in figures.")
@_LAKE_OR_SERVER
@_SERVER
@_TABLE_OR_JSON
def ls(lake: str | None, server: str | None, output: str) -> None:
    """The caches of a lake: teacher, rows, tokens, bytes per token, stored error.

    \b
    logitlake ls runs/demo/lake
    logitlake ls --server http://localhost:8321
    """
    from logitlake_shared.cli_output import show_records, to_json

    with _asked(lake, server) as ask:
        if output == "table":
            show_records(ask(_CACHES).read_all())
        else:
            for record in ask("SELECT * FROM caches ORDER BY cache").read_all().to_pylist():
                click.echo(to_json(record))


@cli.command(short_help="Answer a question in SQL.")
@_LAKE_OR_SERVER
@click.argument("query", required=False)
@_SERVER
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "csv", "parquet", "arrow"]),
    help="json is one object a line, arrow an IPC stream.  [default: by the name of --to, else table]",
)
@click.option("--to", type=_FILE, metavar="FILE", help="Write to this file; it appears whole or not at all.")
@click.option(
    "--rows", type=click.IntRange(0), default=100, show_default=True, help="Rows that a terminal shows; 0 is all."
)
def sql(
    lake: str | None, query: str | None, server: str | None, output: str | None, to: Path | None, rows: int
) -> None:
    """Answer one SQL QUERY; `-` reads it from standard input.

    Views: samples, tokens, topk, pairs, images, sample_index, shards, caches, errors. `DESCRIBE tokens` lists a
    view's columns.

    \b
    logitlake sql runs/demo/lake "SELECT task, avg(entropy) FROM tokens GROUP BY task"
    logitlake sql runs/demo/lake "SELECT * FROM tokens" --to tokens.parquet
    logitlake sql --server http://localhost:8321 "SELECT count(*) FROM tokens"
    """
    from logitlake_shared.cli_output import format_of, write

    if server is not None and query is None:
        lake, query = None, lake  # the only argument is the question
    if query is None:
        raise click.UsageError("Missing argument 'QUERY'.")
    started = time.perf_counter()
    with _asked(lake, server) as ask:
        try:
            answer = ask(sys.stdin.read() if query == "-" else query)
            num_rows = write(answer, format_of(output, to), to, limit=rows)
        except QueryError as error:
            raise QueryError(f"{error}\nThe views are {_VIEWS}; `DESCRIBE tokens` lists a view's columns") from error
    if sys.stderr.isatty():
        count = f"{num_rows:,} row{'' if num_rows == 1 else 's'}"
        seconds = time.perf_counter() - started
        click.echo(f"{count} in {seconds:.2f} s{f', written to {to}' if to else ''}", err=True)


@cli.command(short_help="Show one sample, token by token.")
@_LAKE_OR_SERVER
@click.argument("sample", required=False)
@_SERVER
@click.option("--cache", metavar="NAME", help="The cache to look in.  [default: the first that holds SAMPLE]")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="DIR",
    envvar="LOGITLAKE_TOKENIZER",
    show_envvar=True,
    help="The teacher's model folder, to see text and not ids.",
)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Choices shown for each token.")
@click.option("--save-images", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Keep its images.")
@click.option("--scores", type=_FILE, metavar="FILE", help="A student beside it: what `logitlake-student score` wrote.")
@click.option("--student", metavar="NAME", help="The same of a service: one of the students that it has scores of.")
@_TABLE_OR_JSON
def inspect(
    lake: str | None,
    sample: str | None,
    server: str | None,
    cache: str | None,
    tokenizer: Path | None,
    top: int,
    save_images: Path | None,
    scores: Path | None,
    student: str | None,
    output: str,
) -> None:
    """Show one SAMPLE, or one pair: what was asked, what was answered, what the teacher thought of every token.

    \b
    logitlake inspect runs/demo/lake train-00145-0-caption --tokenizer examples/digit_scenes/models/teacher
    logitlake inspect --server http://localhost:8321 train-00145-0-caption
    """
    from dataclasses import asdict

    from logitlake_shared.cli_output import to_json
    from logitlake_shared.tools.inspect_text import print_sample

    if server is not None and sample is None:
        lake, sample = None, lake  # the only argument is the sample
    if sample is None:
        raise click.UsageError("Missing argument 'SAMPLE'.")
    _check_one(lake, server)
    if (scores is not None and lake is None) or (student is not None and server is None):
        raise click.UsageError("--scores is for a LAKE, --student for a service (--server URL).")
    if lake is not None:
        from logitlake_shared.lake import Lake
        from logitlake_shared.student_scores import scores_of
        from logitlake_shared.tools.inspect_sample import find_sample, view_sample
        from logitlake_shared.tools.token_text import find_token_text

        place = find_sample(Lake.open(lake), sample, cache)
        decode, note = find_token_text(place.cache.spec, tokenizer)
        beside = None if scores is None else scores_of(scores, place.cache, sample)
        view = view_sample(place, decode, note, top=top, save_to=save_images, student=beside)
        also_in = place.also_in
    else:
        from logitlake_shared.client import Client
        from logitlake_shared.tools.inspect_served import find_served, view_served

        with Client(str(server)) as client:
            first, *others = find_served(client, str(server), sample) if cache is None else [cache]
            view = view_served(client, first, sample, tokenizer, top=top, save_to=save_images, student=student)
            also_in = tuple(others)
    if output == "json":
        click.echo(to_json(asdict(view), indent=2))
    else:
        print_sample(view, also_in)


@cli.command(short_help="How sure the teacher was, and what is stored of it.")
@_LAKE
@_CACHE
@click.option("--by", type=click.Choice(["task", "source", "split"]), default="task", show_default=True)
@click.option("--html", type=_FILE, metavar="FILE", help="Also as one page without scripts.")
@click.option("--png", type=_FILE, metavar="FILE", help="Also as a picture; needs matplotlib, the extra `plot`.")
@_TABLE_OR_JSON
def stats(lake: str, cache: str | None, by: "By", html: Path | None, png: Path | None, output: str) -> None:
    """How sure the teacher was, what share of it is stored, how far it agrees with the labels.

    Entropy in nats, mean and percentiles; tail mass is the probability outside the stored entries; perplexity is
    that of the labels under the teacher.

    \b
    logitlake stats runs/demo/lake --cache main --by task --html stats.html
    """
    from logitlake_shared.catalog import open_catalog
    from logitlake_shared.tools.stats import lake_stats

    with open_catalog(lake) as catalog:
        num_caches = 1 if cache else catalog.query("FROM caches").num_rows
        with progress("stats", num_caches, "caches", after_s=1.0) as advance:
            found = lake_stats(catalog, cache, by, advance)
    if html is not None:
        from logitlake_shared.tools.stats_page import save_html

        save_html(lake, found, html)
        click.echo(f"page: {html}", err=True)
    if png is not None:
        from logitlake_shared.tools.stats_plot import save_png

        save_png(found, png)
        click.echo(f"picture: {png}", err=True)
    _print_stats(found, output)  # last: a reader like `head` may close the pipe


def _print_stats(found: "list[CacheStats]", output: str) -> None:
    if output == "json":
        from dataclasses import asdict

        from logitlake_shared.cli_output import to_json

        for one in found:
            click.echo(to_json(asdict(one)))
    else:
        from logitlake_shared.tools.stats_text import print_stats

        print_stats(found)


def _check_one(lake: str | None, server: str | None) -> None:
    if (lake is None) == (server is None):
        raise click.UsageError("Name either a LAKE or a service (--server URL).")


Ask = Callable[[str], "pa.RecordBatchReader"]


@contextmanager
def _asked(lake: str | None, server: str | None) -> Iterator[Ask]:
    """What answers questions in SQL: the lake, or the service, of which exactly one is named."""
    _check_one(lake, server)
    if lake is not None:
        from logitlake_shared.catalog import open_catalog

        with open_catalog(lake) as catalog:
            yield catalog.query_batches
        return
    from logitlake_shared.client import Client

    with Client(str(server)) as client, ExitStack() as stack:
        answers = []

        def ask(sql: str) -> "pa.RecordBatchReader":
            answers.append(stack.enter_context(client.sql(sql)))
            return answers[-1].reader()

        yield ask
        for answer in answers:
            if answer.truncated:
                click.echo(f"cut short: the service gives no more {answer.truncated} of an answer", err=True)


for command in (attach, verify, diff, gc, rebuild, doctor):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    run_cli(cli)
