"""`logitlake-teacher`: plan, capture, pairs.

Each command takes a TOML file and `section.key=value` overrides. A command can be killed at any time and run again:
it goes on with the units that have no commit record. Everything heavy is imported inside the commands.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from logitlake_shared.cli_support import config_command, progress, run_cli

if TYPE_CHECKING:
    from logitlake_schemas import CommitRecord
    from logitlake_shared.cache_figures import CacheFigures
    from logitlake_teacher.config import CaptureConfig, PairsConfig
    from logitlake_teacher.items import Unit

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitlake")
def cli() -> None:
    """Let a teacher say what it knows, once, into a lake."""


@cli.command()
@config_command("logitlake_teacher.config:CaptureConfig")
def plan(config: CaptureConfig) -> None:
    """Check all data of a capture and show its units; nothing is captured."""
    from logitlake_teacher.service import prepare

    prepared = prepare(config)
    click.echo(
        f"{prepared.plan.dataset.num_samples} samples, {prepared.plan.num_tokens} tokens (an image counted as one), "
        f"{len(prepared.plan.units)} units of at most {config.plan.unit_tokens} tokens"
    )
    click.echo(f"dataset     {prepared.spec.dataset.snapshot_sha256}")
    click.echo(f"fingerprint {prepared.spec.fingerprint}")


@cli.command()
@config_command("logitlake_teacher.config:CaptureConfig")
def capture(config: CaptureConfig) -> None:
    """Capture the teacher's distribution over every response token; resumes where it was stopped."""
    _run(config)


@cli.command()
@config_command("logitlake_teacher.config:PairsConfig")
def pairs(config: PairsConfig) -> None:
    """Score preferred and rejected responses with the teacher; resumes where it was stopped."""
    _run(config)


def main() -> None:
    """The console script."""
    run_cli(cli)


def _run(config: CaptureConfig | PairsConfig) -> None:
    from logitlake_teacher import service

    prepared = service.prepare(config)
    cache = service.open_cache(config, prepared)
    units = service.remaining_units(prepared, cache)
    what = f"{config.lake.uri}: cache {config.lake.cache!r}"
    noun = prepared.kind
    if not units:
        summary = service.summarise(cache)
        rows, snapshot = summary.figures.rows, summary.figures.snapshot
        click.echo(f"{what}: everything is captured already ({rows} {noun}, snapshot {snapshot})")
        service.check_error_rate(summary, config.max_error_rate)
        return
    done = len(prepared.plan.units) - len(units)
    if done:
        click.echo(f"{what}: going on, {done} of {len(prepared.plan.units)} units are committed", err=True)
    total = sum(len(unit.items) for unit in units)
    with progress(f"{config.engine.type} teacher", total, noun) as advance:
        started, tokens, errors = time.monotonic(), 0, 0

        def on_commit(unit: Unit, record: CommitRecord) -> None:
            nonlocal tokens, errors
            tokens += sum(entry.tokens for entry in record.shards)
            errors += len(record.errors)
            rate = tokens / max(time.monotonic() - started, 1e-9)
            advance(len(unit.items), tokens_per_s=f"{rate:.0f}", errors=errors)

        seconds = service.run_units(config, prepared, units, on_commit)
    summary = service.summarise(cache)
    _show(what, noun, summary.figures, seconds)
    service.check_error_rate(summary, config.max_error_rate)


def _show(what: str, noun: str, figures: CacheFigures, seconds: float) -> None:
    said = [f"{figures.rows} {noun}", f"{figures.tokens} response tokens"]
    if figures.bytes_per_token is not None:
        said.append(f"{figures.bytes_per_token:.1f} bytes/token")
    said.append(f"{figures.image_bytes / 1e6:.1f} MB of images")
    if figures.stored_kl_mean is not None:
        said.append(f"stored KL {figures.stored_kl_mean:.1e} nats/token")
    said += [f"{figures.errors} errors", f"{seconds:.1f} s"]
    click.echo(f"{what}, snapshot {figures.snapshot}: {', '.join(said)}")


if __name__ == "__main__":
    main()
