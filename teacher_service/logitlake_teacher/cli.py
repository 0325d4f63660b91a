"""`logitlake-teacher`: plan, capture, pairs; jobs, serve and token have files of their own.

Each command takes a TOML file and `section.key=value` overrides. A command can be killed at any time and run again:
it goes on with the units that have no commit record. Everything heavy is imported inside the commands.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from logitlake_shared.cli_support import config_command, progress, run_cli
from logitlake_shared.jobs.measured import Meter, labelled
from logitlake_shared.jobs.progress import is_heard, say, say_sometimes
from logitlake_teacher.jobs_cli import jobs
from logitlake_teacher.serve_cli import serve, token

if TYPE_CHECKING:
    from logitlake_teacher.config import CaptureConfig, PairsConfig
    from logitlake_teacher.executors import Committed, UnitCost
    from logitlake_teacher.service import Prepared, Summary

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitlake")
def cli() -> None:
    """Let a teacher say what it knows, once, into a lake."""


for command in (jobs, serve, token):
    cli.add_command(command)

_FLAGS = {
    "--limit": ("plan.limit", "Take this many records from the top of the data."),
    "--shard": ("plan.shard", "i/n: do the i-th of n parts of the units; n commands fill one cache."),
}
_DIGEST_HELP = "Refuse to start unless the plan still has this digest (see `plan`); its first 12 digits are enough."


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--measure", type=click.IntRange(min=1), help="Load the teacher and time it on this many units.")
@config_command("logitlake_teacher.config:CaptureConfig", _FLAGS, {"--pairs": "logitlake_teacher.config:PairsConfig"})
def plan(config: CaptureConfig | PairsConfig, as_json: bool, measure: int | None) -> None:
    """Check all data and say how much there is to do and what it takes; nothing is captured."""
    from logitlake_teacher import plan_service
    from logitlake_teacher.planning import check_plan
    from logitlake_teacher.planning.report import report_lines

    prepared = _prepared(config)
    rate = None if measure is None else plan_service.measure_rate(config, prepared, measure)
    report = plan_service.report(config, prepared, rate)
    say(result=report.model_dump(mode="json"))
    click.echo(report.model_dump_json() if as_json else "\n".join(report_lines(report)))
    check_plan(prepared.plan)


@cli.command()
@click.option("--plan-digest", help=_DIGEST_HELP)
@config_command("logitlake_teacher.config:CaptureConfig", _FLAGS)
def capture(config: CaptureConfig, plan_digest: str | None) -> None:
    """Capture the teacher's distribution over every response token; resumes where it was stopped."""
    _run(config, plan_digest)


@cli.command()
@click.option("--plan-digest", help=_DIGEST_HELP)
@config_command("logitlake_teacher.config:PairsConfig", _FLAGS)
def pairs(config: PairsConfig, plan_digest: str | None) -> None:
    """Make preference pairs, or score those of the data, with the teacher; resumes where it was stopped."""
    _run(config, plan_digest)


def main() -> None:
    """The console script."""
    run_cli(cli)


def _prepared(config: CaptureConfig | PairsConfig) -> Prepared:
    from logitlake_teacher import service

    say(phase="validating")
    records = 0
    with progress("planning", None, "records", after_s=1.0) as advance:

        def on_records(num: int) -> None:
            nonlocal records
            records += num
            advance(num)
            say_sometimes(figures={"records": records})

        return service.prepare(config, on_records)


def _run(config: CaptureConfig | PairsConfig, plan_digest: str | None) -> None:
    from logitlake_shared.stopped import RunStopped
    from logitlake_teacher import service
    from logitlake_teacher.planning import check_plan

    prepared = _prepared(config)
    check_plan(prepared.plan)
    service.check_digest(prepared, plan_digest)
    cache = service.open_cache(config, prepared)
    units = service.remaining_units(config, prepared, cache)
    what = f"{config.lake.uri}: cache {config.lake.cache!r}"
    noun = prepared.kind
    num_units = len(prepared.plan.unit_ids)
    counts = service.committed_counts(config, prepared, cache) if is_heard() else service.CommittedCounts()
    say(phase="running", counts=counts.told())
    if not len(units):
        summary = service.summarise(cache)
        _say_result(summary)
        rows, snapshot = summary.figures.rows, summary.figures.snapshot
        left = num_units - summary.figures.units
        done = "everything is captured already" if not left else f"this part is captured already, {left} units are not"
        click.echo(f"{what}: {done} ({rows} {noun}, snapshot {snapshot})")
        service.check_error_rate(summary, config.max_error_rate)
        return
    if len(units) < num_units:
        committed = len(cache.committed_units())
        click.echo(f"{what}: going on, {committed} of {num_units} units are committed", err=True)
    with progress(f"{config.engine.type} teacher", units.num_items, noun) as advance:
        started, tokens, errors = time.monotonic(), 0, 0
        meter = Meter()

        def on_commit(done: Committed) -> None:
            nonlocal tokens, errors
            record = done.record
            tokens += sum(entry.tokens for entry in record.shards)
            errors += sum(error.is_failure for error in record.errors)
            rate = tokens / max(time.monotonic() - started, 1e-9)
            counts.add(record, units)
            if done.cost is not None:
                _measure(meter, done.cost, sum(entry.bytes for entry in record.shards))
            figures = {"tokens": tokens, "tokens_per_s": round(rate, 1)}
            say_sometimes(counts=counts.told(), figures=figures, measured=meter.told())
            advance(units.items_of(record.unit), tokens_per_s=f"{rate:.0f}", errors=errors)

        try:
            seconds = service.run_units(config, prepared, units, on_commit)
        except RunStopped as stopped:
            say(counts=counts.told())
            kept = service.summarise(cache).figures
            click.echo(
                f"{what}: stopped by {stopped}; {kept.units} of {num_units} units are committed and in snapshot "
                f"{kept.snapshot}. Run the same command to go on",
                err=True,
            )
            sys.exit(stopped.exit_code)
    say(phase="finalizing", counts=counts.told())
    summary = service.summarise(cache)
    _say_result(summary)
    _show(what, noun, summary, seconds)
    service.check_error_rate(summary, config.max_error_rate)


def _measure(meter: Meter, cost: UnitCost, num_bytes: int) -> None:
    for kind, num_tokens in cost.tokens.items():
        meter.add(labelled("teacher_tokens", kind), num_tokens)
    for seconds in cost.batches_s:
        meter.time("teacher_batch_seconds", seconds)
    meter.add("shard_bytes", num_bytes)
    meter.time("shard_commit_seconds", cost.commit_s)


def _say_result(summary: Summary) -> None:
    say(result=vars(summary.figures) | {"errors_by_code": summary.errors, "without_pair": summary.without_pair})


def _show(what: str, noun: str, summary: Summary, seconds: float) -> None:
    figures = summary.figures
    said = [f"{figures.rows} {noun}", f"{figures.tokens} response tokens"]
    if figures.bytes_per_token is not None:
        said.append(f"{figures.bytes_per_token:.1f} bytes/token")
    said.append(f"{figures.image_bytes / 1e6:.1f} MB of images")
    if figures.stored_kl_mean is not None:
        said.append(f"stored KL {figures.stored_kl_mean:.1e} nats/token")
    if summary.without_pair:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(summary.without_pair.items()))
        said.append(f"{sum(summary.without_pair.values())} prompts without a pair ({codes})")
    said += [f"{sum(summary.errors.values())} errors", f"{seconds:.1f} s"]
    click.echo(f"{what}, snapshot {figures.snapshot}: {', '.join(said)}")


if __name__ == "__main__":
    main()
