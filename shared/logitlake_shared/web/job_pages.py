"""The pages about jobs, the same in both services: a list, and one job while it goes on.

A page is whole as it comes. While a job goes on, htmx asks for the part that changes, and stops asking at the end.
"""

import time
from contextlib import suppress
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from logitlake_shared.config import to_toml
from logitlake_shared.errors import JobStateError
from logitlake_shared.jobs import orders
from logitlake_shared.jobs.records import Job, JobState
from logitlake_shared.jobs.states import ACTIVE, ENDED
from logitlake_shared.web.doors import Asking
from logitlake_shared.web.html import render
from logitlake_shared.web.jobs import JobOf, jobs_of, jobs_page, log_of, shown
from logitlake_shared.web.problems import Problem

__all__ = ["job_pages"]

_JOBS = 50
_EVENTS = 200
_LOG_LINES = 40
_ORDERS = {"cancel": orders.cancel, "pause": orders.pause, "resume": orders.resume}


def job_pages(subjects: str) -> APIRouter:
    """`/jobs` and what is below it; pages of what jobs are for are below `subjects`."""
    router = APIRouter(include_in_schema=False)

    def one(request: Request, asking: Asking, job: JobOf) -> HTMLResponse:
        return _job(request, asking, job, "job", subjects)

    def live(request: Request, asking: Asking, job: JobOf) -> HTMLResponse:
        return _job(request, asking, job, "job_live", subjects)

    router.add_api_route("/jobs", _list_jobs, response_class=HTMLResponse)
    router.add_api_route("/jobs/{job_id}", one, response_class=HTMLResponse)
    router.add_api_route("/jobs/{job_id}/live", live, response_class=HTMLResponse)
    router.add_api_route("/jobs/{job_id}/{order}", _order, methods=["POST"], response_class=RedirectResponse)
    return router


def _list_jobs(
    request: Request,
    asking: Asking,
    state: Annotated[str, Query(max_length=20)] = "",
    label: Annotated[str, Query(max_length=264)] = "",
    before: Annotated[str | None, Query(max_length=100)] = None,
    live: bool = False,
) -> HTMLResponse:
    asking.require("read")
    if state and state not in list(JobState):
        raise Problem("invalid_request", f"query.state: expected one of {', '.join(JobState)}, got {state!r}")
    name, colon, value = label.partition(":")
    wanted = (name, value) if colon else None
    found = jobs_page(jobs_of(request), asking, _JOBS + 1, before, JobState(state) if state else None, label=wanted)
    jobs = found[:_JOBS]
    asked = {"state": state, "label": label}
    return render(
        request,
        "jobs_live" if live else "jobs",
        jobs=jobs,
        state=state,
        states=list(JobState),
        label=label,
        is_live=before is None,
        live_url=f"/jobs?{urlencode(asked | {'live': 'true'})}",
        next_url=f"/jobs?{urlencode(asked | {'before': jobs[-1].id})}" if len(found) > _JOBS else None,
    )


def _job(request: Request, asking: Asking, job: Job, template: str, subjects: str) -> HTMLResponse:
    jobs = jobs_of(request)
    may_order = asking.may("submit")
    events = [event for event in jobs.store.events(job.id, 0, 100_000) if event.event in ("state", "attempt")]
    return render(
        request,
        template,
        job=shown(job),
        is_live=job.state not in ENDED,
        bar=_bar(job),
        counts=job.counts.model_dump() | {f"error {code}": count for code, count in job.errors.items()},
        eta_s=_seconds_left(job),
        may_order=may_order,
        orders=_orders(job),
        subject_url=f"{subjects}{job.subject}",
        events=events[-_EVENTS:],
        log=log_of(jobs, job, len(job.attempts), _LOG_LINES) if may_order and job.attempts else None,
        config=to_toml(job.config),
    )


def _order(request: Request, asking: Asking, job: JobOf, order: str) -> Response:
    if order not in _ORDERS:
        raise Problem("not_found", f"no order {order!r}; there are {', '.join(_ORDERS)}")
    asking.require("submit", job.subject)
    with suppress(JobStateError):  # it went on since the page was made: the page that follows says where it is
        _ORDERS[order](jobs_of(request).store, job)
    jobs_of(request).supervisor.wake()
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _orders(job: Job) -> list[str]:
    """What makes sense to tell it now."""
    if job.state in ENDED or job.state is JobState.CANCELLING:
        return []
    if job.state is JobState.PAUSED:
        return ["resume", "cancel"]
    return ["cancel"] if job.wish == "pause" else ["pause", "cancel"]


def _bar(job: Job) -> list[tuple[str, int, int]]:
    """Class, place and width of the parts of the bar."""
    counts, parts, place = job.counts, [], 0
    bad = counts.failed + counts.quarantined
    widths = {"cached": counts.skipped_cached, "done": counts.succeeded, "bad": bad, "given-up": counts.cancelled}
    for name, width in widths.items():
        parts.append((name, place, width))
        place += width
    return parts


def _seconds_left(job: Job) -> float | None:
    """By the rate of this attempt until now; None where there is none."""
    counts, since = job.counts, job.entered.get(JobState.RUNNING)
    done = counts.succeeded + counts.failed + counts.quarantined
    if job.state not in ACTIVE or since is None or not done or not counts.pending:
        return None
    return counts.pending * (time.time() - since) / done
