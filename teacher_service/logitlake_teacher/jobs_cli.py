"""`logitlake-teacher jobs`: captures that run on a Ray cluster while nobody watches; with `--server`, a service's jobs.

`submit` stores what is to be done in the lake and starts it; `ls`, `logs` and `cancel` look after it; `resume` starts
the same again, which does what is left. Ctrl-C while following a log leaves the job alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logitlake_shared.cli_jobs import service_jobs
from logitlake_shared.cli_support import config_command
from logitlake_shared.errors import JobError

if TYPE_CHECKING:
    from logitlake_teacher.config import CaptureConfig, PairsConfig
    from logitlake_teacher.ray_jobs import Attempt, RayJobs, Run

__all__ = ["jobs"]

# Between two looks at a log.
_LOOK_S = 1.0

_KINDS = ("capture", "pairs")
_ADDRESS = click.option("--address", metavar="URL", help="http(s)://head:8265 of the cluster; default: RAY_ADDRESS.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_FOLLOW = click.option("--follow", is_flag=True, help="Show the log until the job ends, and exit as it does.")


@click.command(name="plan")
@click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--kind", type=click.Choice(_KINDS), default=_KINDS[0], show_default=True, help="What CONFIG.toml is of.")
@_JSON
@click.pass_obj
def served_plan(server: str, config: Path, overrides: tuple[str, ...], kind: str, as_json: bool) -> None:
    """Have the service say what a job would do and take; nothing is captured."""
    from logitlake_shared.client import Client
    from logitlake_shared.config import load_document
    from logitlake_teacher.planning.report import PlanReport, report_lines

    with Client(server) as client:
        job = client.jobs.plan(kind, load_document(config, overrides))
        report = PlanReport.model_validate(client.jobs.wait(job["id"])["result"])
    click.echo(report.model_dump_json() if as_json else "\n".join(report_lines(report)))


class _Jobs(click.Group):
    """The cluster's commands; those of a service where `--server` names one."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See `click.Group`."""
        return self._commands(ctx).get(cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return sorted(self._commands(ctx))

    def _commands(self, context: click.Context) -> Mapping[str, click.Command]:
        if context.params.get("server") is None:
            return self.commands
        return {**service_jobs(*_KINDS).commands, "plan": served_plan}


@click.group(cls=_Jobs)
# Eager, so that --help behind it is that of a service's commands.
@click.option("--server", metavar="URL", is_eager=True, help="Jobs of this service; its token: LOGITLAKE_TOKEN.")
@click.pass_context
def jobs(context: click.Context, server: str | None) -> None:
    """Captures as jobs of a Ray cluster (its token: RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH), or of a service.

    \b
    logitlake-teacher jobs submit capture.toml
    logitlake-teacher jobs --server http://localhost:8321 submit capture.toml
    """
    context.obj = server


@jobs.command()
@_ADDRESS
@_JSON
@_FOLLOW
@config_command(
    "logitlake_teacher.config:CaptureConfig", other_classes={"--pairs": "logitlake_teacher.config:PairsConfig"}
)
def submit(config: CaptureConfig | PairsConfig, address: str | None, as_json: bool, follow: bool) -> None:
    """Start a capture on the cluster. The same configuration is the same run: it is not started twice."""
    from logitlake_teacher.config import CaptureConfig
    from logitlake_teacher.ray_jobs import RayJobs, store_run

    cluster = RayJobs(address)
    run = store_run("capture" if isinstance(config, CaptureConfig) else "pairs", config)
    before = cluster.attempts(run.name)
    if before and before[-1].ended:
        raise JobError(
            f"run {run.name} was submitted before and ended {before[-1].status}; "
            f"`logitlake-teacher jobs resume {run.name}` does what is left of it"
        )
    if before:
        _tell(cluster, before[-1], False, as_json, follow)
    else:
        _tell(cluster, *cluster.submit(run, 1), as_json, follow)


@jobs.command()
@_ADDRESS
@_JSON
@_FOLLOW
@click.argument("run")
@click.option("--lake", metavar="URI", help="The run's lake, where the cluster is another and does not know the run.")
def resume(run: str, lake: str | None, address: str | None, as_json: bool, follow: bool) -> None:
    """Start RUN again, as it was submitted; it does what is left."""
    from logitlake_teacher.ray_jobs import RayJobs, load_run

    cluster = RayJobs(address)
    before = cluster.attempts(run)
    if before and not before[-1].ended:
        raise JobError(f"run {run} is {before[-1].status} as {before[-1].submission_id}; cancel it first, or wait")
    where = lake or (before[-1].lake if before else None)
    if where is None:
        raise JobError(f"{cluster.address} knows no run {run!r}; say in which lake it is: --lake URI")
    stored: Run = load_run(where, run)
    _tell(cluster, *cluster.submit(stored, before[-1].number + 1 if before else 1), as_json, follow)


@jobs.command("ls")
@_ADDRESS
@_JSON
def list_jobs(address: str | None, as_json: bool) -> None:
    """Show the runs of the cluster, every attempt a line."""
    from logitlake_teacher.ray_jobs import RayJobs

    attempts = RayJobs(address).attempts()
    if as_json:
        click.echo(json.dumps([asdict(attempt) for attempt in attempts]))
        return
    for attempt in attempts:
        started = _time(attempt.start_time_ms)
        click.echo(f"{attempt.submission_id}  {attempt.status:<9}  {started}  {attempt.lake}: cache {attempt.cache!r}")
    if not attempts:
        click.echo("no runs on this cluster", err=True)


@jobs.command()
@_ADDRESS
@click.argument("run")
@_FOLLOW
def logs(run: str, address: str | None, follow: bool) -> None:
    """Show what RUN (or one attempt of it) wrote."""
    from logitlake_teacher.ray_jobs import RayJobs

    cluster = RayJobs(address)
    attempt = cluster.find(run)
    if follow:
        _follow(cluster, attempt)
    else:
        click.echo(cluster.logs(attempt.submission_id), nl=False)


@jobs.command()
@_ADDRESS
@click.argument("run")
def cancel(run: str, address: str | None) -> None:
    """End RUN: the units under way are finished, all that is committed is in a snapshot. Twice is fine."""
    from logitlake_teacher.ray_jobs import RayJobs

    cluster = RayJobs(address)
    attempt = cluster.find(run)
    if attempt.ended:
        click.echo(f"{attempt.submission_id} ended before: {attempt.status}", err=True)
        return
    cluster.stop(attempt.submission_id)
    click.echo(
        f"{attempt.submission_id} is asked to end; it finishes the units under way. "
        f"`logitlake-teacher jobs resume {attempt.run}` goes on",
        err=True,
    )


@jobs.command(hidden=True)
@click.argument("run")
@click.argument("arguments", nargs=-1)
@click.pass_context
def drive(context: click.Context, run: str, arguments: tuple[str, ...]) -> None:
    """What a job runs on the cluster: the RUN that lies in the lake which the environment names."""
    import os
    import tempfile

    from logitlake_shared.config import to_toml
    from logitlake_teacher.ray_jobs import LAKE_VARIABLE, load_run

    lake = os.environ.get(LAKE_VARIABLE)
    if lake is None:
        raise JobError(f"{LAKE_VARIABLE} is not set: `jobs drive` is for the jobs that `jobs submit` starts")
    stored = load_run(lake, run)
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(to_toml(stored.config))
        file.flush()
        root: Any = context.find_root().command
        root.main([stored.command, file.name, *arguments], standalone_mode=False)


def _tell(cluster: RayJobs, attempt: Attempt, is_new: bool, as_json: bool, follow: bool) -> None:
    """Says what was submitted, and where to look; stdout holds the submission id alone."""
    click.echo(json.dumps(asdict(attempt) | {"new": is_new}) if as_json else attempt.submission_id)
    said = "submitted" if is_new else f"submitted before, it is {attempt.status}"
    click.echo(f"{said}; `logitlake-teacher jobs logs --follow {attempt.run}` shows how it goes", err=True)
    if follow:
        _follow(cluster, attempt)


def _follow(cluster: RayJobs, attempt: Attempt) -> None:
    shown = 0
    try:
        while True:
            ended = cluster.get(attempt.submission_id)
            text = cluster.logs(attempt.submission_id)
            click.echo(text[shown:], nl=False)
            shown = len(text)
            if ended.ended:
                break
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        click.echo(
            f"\n{attempt.submission_id} goes on; `logitlake-teacher jobs logs --follow {attempt.run}` comes back to it",
            err=True,
        )
        sys.exit(130)
    click.echo(f"{ended.submission_id}: {ended.status}" + (f": {ended.message}" if ended.message else ""), err=True)
    if ended.status != "SUCCEEDED":
        sys.exit(ended.code or 1)


def _time(milliseconds: int | None) -> str:
    if milliseconds is None:
        return "not started      "
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
