"""The commands of `logitlake` that look after a lake: verify, diff, gc, rebuild."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from logitlake_shared.cli_support import progress
from logitlake_shared.errors import ConfigError, LakeCorruptError

if TYPE_CHECKING:
    from logitlake_shared.lake import Lake
    from logitlake_shared.tools.verify import Finding

__all__ = ["diff", "gc", "rebuild", "verify"]

_LAKE = click.argument("lake", metavar="LAKE")
_YES = click.option("--yes", is_flag=True, help="Do it without asking.")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SHOWN_LINES = 50
_QUIET_S = 1.0


def _share(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    """`1%` or `0.01` as a share."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise click.BadParameter(f"expected a share such as 1% or 0.01, got {text!r}")
    return share


def _duration(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    """`24h`, `30m`, `90s`, `7d` in seconds."""
    number, unit = text[:-1], text[-1:]
    if unit not in _SECONDS or not number.replace(".", "", 1).isdigit():
        raise click.BadParameter(f"expected a time such as 90s, 30m, 24h or 7d, got {text!r}")
    return float(number) * _SECONDS[unit]


@click.command(short_help="Check every byte and every row; return damaged units to the plan.")
@_LAKE
@click.option("--cache", metavar="NAME", help="Only this cache.  [default: all of the lake]")
@click.option(
    "--sample",
    metavar="SHARE",
    default="100%",
    show_default=True,
    callback=_share,
    help="Share of the units to read, e.g. 1%.",
)
@click.option("--seed", metavar="N", default=0, show_default=True, help="Another seed, another sample.")
@click.option("--repair", is_flag=True, help="Return the damaged units to the plan; the next capture does them anew.")
@_YES
def verify(lake: str, cache: str | None, sample: float, seed: int, repair: bool, yes: bool) -> None:
    """Check every committed byte and the laws of every row; exit code 2 when something is wrong.

    With --sample only a share of the units is read; the lengths of all files are compared in any case.

    \b
    logitlake verify runs/demo/lake
    logitlake verify s3://bucket/lake --sample 1% --seed 7
    logitlake verify runs/demo/lake --repair
    """
    from logitlake_shared.lake import Lake

    opened = Lake.open(lake)
    findings, num_units, num_read = _check(opened, cache, sample, seed)
    for line in _lines([str(finding) for finding in findings]):
        click.echo(line, err=True)
    if not findings:
        others = num_units - num_read
        rest = f", every file of the other {others:,} is there in full length" if others else ""
        click.echo(f"{lake}: {_count(num_read, 'unit')} verified{rest}, no problem found")
        return
    damaged = {(finding.cache, finding.unit) for finding in findings if finding.unit and finding.damaged}
    if not repair:
        hint = "; `--repair` returns those units to the plan" if damaged else ""
        counts = f"{_count(len(findings), 'problem')}, {_count(len(damaged), 'damaged unit')}"
        raise LakeCorruptError(f"{lake}: {counts}{hint}")
    if damaged:
        _repair(opened, lake, findings, len(damaged), yes)
    unsolved = [finding for finding in findings if not (finding.unit and finding.damaged)]
    if unsolved:
        raise LakeCorruptError(
            f"{lake}: {_count(len(unsolved), 'problem')} not of a unit's making, and left as they are: see above"
        )


def _check(lake: "Lake", only: str | None, share: float, seed: int) -> tuple[list["Finding"], int, int]:
    """All findings, the number of units, and how many of them were read."""
    from logitlake_shared.tools.verify import CacheCheck, chosen_units, verify_catalog

    checks = [CacheCheck(lake.cache(name)) for name in ([only] if only else lake.cache_names())]
    findings: list[Finding] = []
    total = sum(len(check.units) for check in checks)
    num_read = 0
    with progress("verify", total, "units", after_s=_QUIET_S) as advance:
        for check in checks:
            findings += check.records()
            chosen = chosen_units(check.units, share, seed)
            num_read += len(chosen)
            for unit in check.units:
                findings += check.unit(unit, full=unit in chosen)
                advance(1, problems=len(findings))
            findings += check.ids()
    if only is None and any(finding.unit for finding in findings):
        click.echo("the catalog is compared when the units are sound", err=True)
    elif only is None:
        findings += verify_catalog(lake, seed)
    return findings, total, num_read


def _repair(lake: "Lake", uri: str, findings: list["Finding"], num_units: int, yes: bool) -> None:
    from logitlake_shared.tools.verify import quarantine_damaged

    if not yes and sys.stdin.isatty():
        question = f"take back the commit records of {_count(num_units, 'unit')}? Quarantine records keep them"
        click.confirm(question, abort=True, err=True)
    for name, units in quarantine_damaged(lake, findings).items():
        click.echo(f"cache {name!r}: {_count(len(units), 'unit')} back in the plan, left out by a new snapshot:")
        for line in _lines(units):
            click.echo(f"  {line}")
    click.echo(
        "next: run the capture again with the configuration that made the cache (it does what is missing), then "
        f"`logitlake verify {uri}`"
    )


@click.command(short_help="Compare two caches of the same samples.")
@_LAKE
@click.argument("cache_a")
@click.argument("cache_b")
@click.option("--to-lake", metavar="LAKE_B", help="The lake of CACHE_B.  [default: the same]")
@click.option("--worst", type=click.IntRange(0), default=10, show_default=True, help="Tokens listed that differ most.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def diff(lake: str, cache_a: str, cache_b: str, to_lake: str | None, worst: int, output: str) -> None:
    """Compare two caches of the same samples: other teacher, other codec, other machine.

    KL(A‖B) is taken over the ids that both caches store, with everything else as one class: exact for these classes,
    and a lower bound of the divergence over the whole vocabulary.

    \b
    logitlake diff runs/demo/lake main exact
    logitlake diff runs/a/lake main main --to-lake runs/b/lake -o json
    """
    from logitlake_shared.lake import Lake
    from logitlake_shared.tools.diff import diff_caches
    from logitlake_shared.tools.diff_text import diff_json, print_diff

    a = Lake.open(lake).cache(cache_a)
    b = Lake.open(to_lake or lake).cache(cache_b)
    with progress("diff", len(a.open_snapshot().commits), "units", after_s=_QUIET_S) as advance:
        found = diff_caches(a, b, num_worst=worst, on_progress=advance)
    if output == "json":
        click.echo(diff_json(found))
    else:
        print_diff(found, f"{lake} {cache_a}", f"{to_lake or lake} {cache_b}")


@click.command(short_help="Delete what killed writers left behind.")
@_LAKE
@click.option("--dry-run", is_flag=True, help="Only say what would go. This is what happens without --yes.")
@_YES
@click.option(
    "--grace",
    metavar="TIME",
    default="24h",
    show_default=True,
    callback=_duration,
    help="Leave what is younger: 90s, 30m, 2d.",
)
def gc(lake: str, dry_run: bool, yes: bool, grace: float) -> None:
    """Delete what no commit record and no snapshot names: what killed writers left, and catalogs that were replaced.

    Without --yes it only lists. --grace must be longer than a unit takes from its first file to its commit record.

    \b
    logitlake gc runs/demo/lake
    logitlake gc runs/demo/lake --grace 2d --yes
    """
    from logitlake_shared.lake import Lake
    from logitlake_shared.tools.gc import collect, find_garbage

    if dry_run and yes:
        raise ConfigError("--dry-run and --yes ask for opposite things; give one of them")
    opened = Lake.open(lake)
    garbage = find_garbage(opened, grace)
    if not garbage:
        click.echo(f"{lake}: nothing to collect")
        return
    for line in _lines([f"{one.path}  {_bytes(one.bytes)}, {_age(one.age_s)} old: {one.reason}" for one in garbage]):
        click.echo(line)
    if not yes:
        click.echo(f"{_count(len(garbage), 'file')}, {_bytes(sum(one.bytes for one in garbage))}; --yes deletes them")
        return
    gone = collect(opened, garbage)
    click.echo(f"{_count(len(gone), 'file')} deleted, {_bytes(sum(one.bytes for one in gone))}")
    if len(gone) < len(garbage):
        click.echo(f"{len(garbage) - len(gone)} stay: a writer committed them meanwhile")


@click.command(short_help="Make the catalog anew.")
@_LAKE
def rebuild(lake: str) -> None:
    """Make the catalog anew from commit records and shards, and publish it. Nothing else is touched.

    \b
    logitlake rebuild runs/demo/lake
    """
    from logitlake_shared.catalog import rebuild_catalog
    from logitlake_shared.lake import Lake

    number = rebuild_catalog(Lake.open(lake))
    click.echo(f"{lake}: catalog {number} published")


def _lines(lines: list[str]) -> Iterator[str]:
    """The first of them, and how many more there are."""
    yield from lines[:_SHOWN_LINES]
    if len(lines) > _SHOWN_LINES:
        yield f"… and {len(lines) - _SHOWN_LINES:,} more"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(count: int) -> str:
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1e6:,.2f} MB"


def _age(seconds: float) -> str:
    unit = next((unit for unit in ("d", "h", "m") if seconds >= _SECONDS[unit]), "s")
    return f"{seconds / _SECONDS[unit]:.0f} {unit}"
