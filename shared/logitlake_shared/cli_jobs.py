"""`jobs --server URL …`: the jobs of a service, from the command line; the same for both services.

What a script wants stands alone on standard output (an id, a document, a log), what a person wants to know beside it
on standard error. Ctrl-C while following leaves the job alone.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logitlake_shared.errors import ServiceError

if TYPE_CHECKING:
    from logitlake_shared.client import Client

__all__ = ["service_jobs"]

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_FOLLOW = click.option("--follow", is_flag=True, help="Show how it goes until it ends, and exit as it does.")
_JOB = click.argument("job")


def _labels(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE` of each."""
    for label in given:
        if not label.partition("=")[0] or "=" not in label:
            raise click.BadParameter(f"expected NAME=VALUE, got {label!r}")
    return dict(label.partition("=")[::2] for label in given)


def service_jobs(*kinds: str) -> click.Group:
    """The commands for a service with jobs of these kinds; its address is the group's `--server`."""

    @click.group()
    @click.option("--server", required=True, metavar="URL", envvar="LOGITLAKE_SERVER", show_envvar=True)
    @click.pass_context
    def jobs(context: click.Context, server: str) -> None:
        """Jobs of a service (its token: LOGITLAKE_TOKEN)."""
        context.obj = server

    @jobs.command()
    @click.argument("config", type=Path, metavar="CONFIG.toml")
    @click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
    @click.option(
        "--kind", type=click.Choice(kinds), default=kinds[0], show_default=True, help="What CONFIG.toml is of."
    )
    @click.option("--name", default="", help="For people.")
    @click.option(
        "--label",
        "labels",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_labels,
        help="To find it by; repeatable.",
    )
    @click.option("--key", help="Idempotency key: the same key is the same job.  [default: a new one]")
    @click.option("--plan-digest", help="Of a capture: fail unless its plan still has this digest.")
    @_FOLLOW
    @_JSON
    @click.pass_obj
    def submit(
        server: str,
        config: Path,
        overrides: tuple[str, ...],
        kind: str,
        name: str,
        labels: dict[str, str],
        key: str | None,
        plan_digest: str | None,
        follow: bool,
        as_json: bool,
    ) -> None:
        """Submit CONFIG.toml as a job. Paths in it are those of the service's machine."""
        from logitlake_shared.config import load_document

        more = {} if plan_digest is None else {"plan_digest": plan_digest}
        with _client(server) as client:
            document = load_document(config, overrides)
            job = client.jobs.submit(kind, document, name=name, labels=labels, key=key, **more)
            click.echo(json.dumps(job) if as_json else job["id"])
            click.echo(f"{job['state']}; {_where(server, job)} shows how it goes", err=True)
            if follow:
                _follow(client, job["id"])

    @jobs.command("ls")
    @click.option("--state", help="Only jobs in this state.")
    @click.option("--label", metavar="NAME=VALUE", help="Only jobs with this label.")
    @click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="The newest so many.")
    @_JSON
    @click.pass_obj
    def list_jobs(server: str, state: str | None, label: str | None, limit: int, as_json: bool) -> None:
        """Show the jobs, the newest first."""
        wanted = None if label is None else label.replace("=", ":", 1)
        with _client(server) as client:
            found = client.jobs.all(state=state, label=wanted)
            for job in (job for job, _ in zip(found, range(limit), strict=False)):
                click.echo(json.dumps(job) if as_json else _line(job))

    @jobs.command()
    @_JOB
    @click.pass_obj
    def get(server: str, job: str) -> None:
        """Print JOB as JSON."""
        with _client(server) as client:
            click.echo(json.dumps(client.jobs.get(job), indent=1))

    @jobs.command()
    @_JOB
    @click.argument("labels", nargs=-1, metavar="[NAME=VALUE]...", callback=_labels)
    @click.option("--remove", multiple=True, metavar="NAME", help="Take this label away; repeatable.")
    @click.option("--name", help="Call it this.")
    @click.pass_obj
    def label(server: str, job: str, labels: dict[str, str], remove: tuple[str, ...], name: str | None) -> None:
        """Give JOB labels, beside those that it has, or another name; prints it as JSON.

        Fails where somebody else edits it at the same time.
        """
        with _client(server) as client:
            found = client.jobs.get(job)
            kept = {key: value for key, value in found["labels"].items() if key not in remove}
            click.echo(json.dumps(client.jobs.edit(job, name=name, labels=kept | labels, tag=found["tag"])))

    @jobs.command()
    @_JOB
    @click.pass_obj
    def wait(server: str, job: str) -> None:
        """Show how JOB goes until it ends, and exit as it does: 0, or 1 where it did not succeed."""
        with _client(server) as client:
            _follow(client, job)

    @jobs.command()
    @_JOB
    @click.option("--tail", type=click.IntRange(1, 10_000), default=200, show_default=True, help="Lines from the end.")
    @click.option("--attempt", type=click.IntRange(1), help="Of this attempt.  [default: the newest]")
    @click.pass_obj
    def logs(server: str, job: str, tail: int, attempt: int | None) -> None:
        """Print what JOB wrote."""
        with _client(server) as client:
            click.echo(client.jobs.logs(job, tail=tail, attempt=attempt), nl=False)

    @jobs.command()
    @_JOB
    @click.option("--now", is_flag=True, help="Without finishing what is under way.")
    @click.pass_obj
    def cancel(server: str, job: str, now: bool) -> None:
        """End JOB; what is committed stays. Twice is fine."""
        with _client(server) as client:
            click.echo(client.jobs.cancel(job, now=now)["state"], err=True)

    @jobs.command()
    @_JOB
    @click.pass_obj
    def pause(server: str, job: str) -> None:
        """Have JOB wait until it is resumed."""
        with _client(server) as client:
            client.jobs.pause(job)
            click.echo("it finishes what is under way, and waits", err=True)

    @jobs.command()
    @_JOB
    @click.pass_obj
    def resume(server: str, job: str) -> None:
        """Have a paused JOB go on."""
        with _client(server) as client:
            click.echo(client.jobs.resume(job)["state"], err=True)

    return jobs


def _client(server: str) -> Client:
    from logitlake_shared.client import Client

    return Client(server)


def _follow(client: Client, job_id: str) -> None:
    try:
        for event in client.jobs.events(job_id):
            if said := _said(event):
                click.echo(f"{_time(event['time'])} {said}", err=True)
        client.jobs.wait(job_id)
    except KeyboardInterrupt:
        click.echo(f"\n{job_id} goes on; `jobs --server URL wait {job_id}` looks again", err=True)
        sys.exit(130)
    except ServiceError as error:
        if not error.code.startswith("job_"):
            raise
        click.echo(str(error), err=True)
        sys.exit(1)


def _said(event: dict[str, Any]) -> str:
    data = event["data"]
    if event["event"] == "state":
        return str(data["to"]) + (f": {data['reason']}" if data.get("reason") else "")
    if event["event"] == "progress" and (counts := data.get("counts")):
        done = counts["total"] - counts["pending"]
        failed = counts["failed"] + counts["quarantined"]
        return f"{done:,} of {counts['total']:,}" + (f", {failed:,} failed" if failed else "")
    return ""


def _line(job: dict[str, Any]) -> str:
    counts = job["counts"]
    done = counts["total"] - counts["pending"] - counts["cancelled"]
    cells = (job["id"], f"{job['state']:<11}", _time(job["entered"]["queued"]), f"{done}/{counts['total']}")
    return "  ".join((*cells, f"{job['kind']} {job['subject']}", job["name"])).rstrip()


def _where(server: str, job: dict[str, Any]) -> str:
    return f"{server.rstrip('/')}/jobs/{job['id']}"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
