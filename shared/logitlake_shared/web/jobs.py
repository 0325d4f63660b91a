"""Jobs over HTTP, the same in both services: submit, list, look, edit, cancel, pause, resume; events and logs.

A service says which kinds of jobs it has: what a submission becomes, and which command does it. Who may see a job is
who may see its subject; telling it what to do needs `submit`.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from logitlake_shared.config_paths import absolute
from logitlake_shared.jobs import orders
from logitlake_shared.jobs.progress import MARK
from logitlake_shared.jobs.records import Event, Job, JobFault, JobState, NewJob
from logitlake_shared.jobs.runner import RunnerOf
from logitlake_shared.jobs.settings import JobsSettings
from logitlake_shared.jobs.states import ENDED
from logitlake_shared.jobs.store import JobStore
from logitlake_shared.jobs.supervisor import Supervisor
from logitlake_shared.web.app import Service
from logitlake_shared.web.cursors import Cursor, Limit, Page, decode_cursor, encode_cursor
from logitlake_shared.web.doors import Asking, Principal, unauthenticated
from logitlake_shared.web.feed import Feed
from logitlake_shared.web.job_edits import JobEdit, Labels, Name, check_unchanged, etag
from logitlake_shared.web.job_figures import CountsFigure, Figure
from logitlake_shared.web.job_metrics import JobMetrics
from logitlake_shared.web.limits import becomes_stream
from logitlake_shared.web.problems import Problem, scrubbed
from logitlake_shared.web.tokens import without_tokens

__all__ = [
    "Events",
    "JobOf",
    "Jobs",
    "Resolve",
    "Submission",
    "job_routes",
    "jobs_of",
    "jobs_page",
    "log_of",
    "new_job",
    "shown",
    "submit",
    "wait_for_end",
]

_HEARTBEAT_S = 15.0
_RETRY_MS = 2000
_LOG_BYTES = 2**20


def _of_text(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, whose strings are what a path and a file can hold."""
    left: list[Any] = [config]
    while left:
        match left.pop():
            case dict() as section:
                left += [*section, *section.values()]
            case list() as items:
                left += items
            case str() as text if "\0" in text or text != text.encode(errors="replace").decode():
                raise ValueError(f"{text[:100]!r} has a NUL, or half of a surrogate pair")
    return config


class Submission(BaseModel):
    """Work that is to be done."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: str = Field(examples=["capture"])
    """one of the service's kinds of jobs"""
    config: Annotated[dict[str, Any], AfterValidator(_of_text)] = Field(examples=[{"engine": {"type": "fake"}}])
    """the configuration of the command of that name, as JSON; paths are those of the service's machine"""
    name: Name = ""
    labels: Labels = {}
    max_attempts: int | None = Field(default=None, ge=1, le=1000)
    """attempts that may end before their time; default: the service's"""
    expires_in_s: float | None = Field(default=None, gt=0, le=1e9, examples=[86_400.0])
    """seconds after which it ends, done or not"""
    plan_digest: str | None = Field(default=None, pattern="^[0-9a-f]{12,64}$")
    """of a capture or pairs: fail unless the plan still has this digest"""


class Cancel(BaseModel):
    """How to end a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["drain", "now"] = Field(default="drain", description="`drain` finishes what is under way")


class Events(BaseModel):
    """Some of a job's events."""

    data: list[Event]
    next_after: int = Field(examples=[17], description="send it as `after` to go on")
    ended: bool = Field(description="whether the job ended and these are the last")


def new_job(
    submission: Submission,
    config: BaseModel,
    subject: str,
    settings: JobsSettings,
    arguments: tuple[str, ...] = (),
) -> NewJob:
    """What a submission becomes with this configuration, whose paths are made absolute."""
    resolved = absolute(config).model_dump(mode="json")
    return NewJob(
        kind=submission.kind,
        config=resolved,
        digest=hashlib.sha256(json.dumps([submission.kind, resolved], sort_keys=True).encode()).hexdigest(),
        subject=subject,
        lane=subject,
        arguments=arguments,
        name=submission.name,
        labels=submission.labels,
        max_attempts=submission.max_attempts or settings.max_attempts,
        expires_in_s=submission.expires_in_s,
    )


Resolve = Callable[[Submission], NewJob]
"""what a submission of a kind becomes. Raises `ConfigError`"""


class Jobs:
    """The jobs of one service, in the folder of its settings; `figures` are what its attempts measure.

    Raises `ConfigError` where that folder is no place for jobs.
    """

    def __init__(
        self,
        settings: JobsSettings,
        runner_of: RunnerOf,
        kinds: Mapping[str, Resolve],
        figures: Sequence[Figure | CountsFigure],
    ) -> None:
        self.store = JobStore(settings.folder / "jobs.sqlite")
        self.metrics = self.store.observer = JobMetrics(self.store, figures)
        self.runner_of, self.kinds = runner_of, kinds
        self.supervisor = Supervisor(self.store, runner_of, settings)
        self.supervisor.claim()
        self.feed = Feed(self.store)

    @contextmanager
    def running(self, service: Service) -> Iterator[None]:
        """While the service's application lives, on its event loop. Raises `ConfigError`."""
        service.registry.register(self.metrics)
        service.on_ending.append(self.feed.end)
        self.feed.open()
        with self.supervisor:
            yield
        self.feed.end()


def jobs_of(request: Request) -> Jobs:
    """The jobs of the service that a request came to."""
    jobs: Jobs = request.app.state.jobs
    return jobs


def _job(request: Request, asking: Asking, job_id: Annotated[str, Path(max_length=100)]) -> Job:
    """The job of the path, if it is there for whoever asks."""
    asking.require("read")
    job = jobs_of(request).store.find(job_id)
    if job is None or not asking.sees(job.subject):
        raise Problem("not_found", f"no job {job_id!r}")
    return job


JobOf = Annotated[Job, Depends(_job)]
IdempotencyKey = Annotated[str | None, Header(max_length=255, pattern="^[ -~]+$")]


def job_routes() -> APIRouter:
    """The routes below `/v1/jobs`."""
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
    router.add_api_route("", _submit, methods=["POST"], response_model=Job, status_code=201)
    router.add_api_route("", _list_jobs, response_model=Page[Job])
    router.add_api_route("/{job_id}", _one_job, response_model=Job)
    router.add_api_route("/{job_id}", _edit, methods=["PATCH"], response_model=Job)
    router.add_api_route("/{job_id}/cancel", _cancel, methods=["POST"], response_model=Job, status_code=202)
    router.add_api_route("/{job_id}/pause", _pause, methods=["POST"], response_model=Job, status_code=202)
    router.add_api_route("/{job_id}/resume", _resume, methods=["POST"], response_model=Job, status_code=202)
    sse = {"text/event-stream": {"schema": {"type": "string"}}}
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": Events, "content": sse},
        204: {"description": "the job ended, and all of its events are known"},
    }
    router.add_api_route("/{job_id}/events", _events, responses=answers)
    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    router.add_api_route("/{job_id}/logs", _logs, response_class=Response, responses={200: text})
    return router


def submit(
    jobs: Jobs, asking: Principal, submission: Submission, resolve: Resolve, key: str | None = None
) -> tuple[Job, bool]:
    """The job of a submission, and whether it is of an earlier one. Raises `Problem` and `LogitLakeError`s."""
    asking.require("submit")
    new = resolve(submission)
    asking.require("submit", new.subject)
    body = hashlib.sha256(json.dumps(submission.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    made, replayed = jobs.store.submit(new, asking.id, key, body)
    jobs.supervisor.wake()
    return made, replayed


async def wait_for_end(jobs: Jobs, job: Job, wait_s: float) -> Job:
    """The job as it is once it ended, or after so many seconds."""

    async def ended() -> None:
        async with aclosing(jobs.feed.follow(job.id, job.last_event, _HEARTBEAT_S)) as follow:
            async for events in follow:
                if any(map(_is_end, events)):
                    return

    with suppress(TimeoutError):
        await asyncio.wait_for(ended(), wait_s)
    found = await run_in_threadpool(jobs.store.find, job.id)
    assert found is not None  # jobs are never deleted
    return found


def jobs_page(
    jobs: Jobs,
    asking: Principal,
    limit: int,
    before: str | None = None,
    state: JobState | None = None,
    **asked: Any,
) -> list[Job]:
    """Up to `limit` jobs that may be seen, the newest first."""
    sees = None if asking.sees_all else asking.sees
    return [shown(job) for job in jobs.store.page(limit, sees, before=before, state=state, **asked)]


def shown(job: Job) -> Job:
    """The job as a user sees it: without paths of the machine in what it says of its fault."""
    if job.fault is None:
        return job
    return job.model_copy(update={"fault": JobFault(error=job.fault.error, message=scrubbed(job.fault.message))})


def log_of(jobs: Jobs, job: Job, attempt: int, num_lines: int) -> str:
    """The last lines that an attempt wrote for people."""
    written = jobs.runner_of(job).log_tail(job, attempt, _LOG_BYTES)
    lines = [line for line in written.splitlines(keepends=True) if not line.startswith(MARK)]
    return without_tokens(b"".join(lines[-num_lines:]).decode(errors="replace"))


def _submit(
    request: Request, response: Response, asking: Asking, submission: Submission, idempotency_key: IdempotencyKey = None
) -> Job:
    """Submit a job. It is on disk when this answers. The same `Idempotency-Key` again is the same job."""
    asking.require("submit")
    jobs = jobs_of(request)
    resolve = jobs.kinds.get(submission.kind)
    if resolve is None:
        detail = f"body.kind: expected one of {', '.join(jobs.kinds)}, got {submission.kind!r}"
        raise Problem("invalid_request", detail)
    job, replayed = submit(jobs, asking, submission, resolve, idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return shown(job)


def _list_jobs(
    request: Request,
    asking: Asking,
    state: JobState | None = None,
    kind: Annotated[str | None, Query(max_length=100)] = None,
    subject: Annotated[str | None, Query(max_length=200, description="the cache or run that they write")] = None,
    label: Annotated[str | None, Query(max_length=264, pattern=":", description="`name:value`")] = None,
    created_after: Annotated[
        AwareDatetime | None, Query(description="submitted then or later", examples=["2026-11-27T00:00:00Z"])
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Job]:
    """The jobs that the token covers, the newest first."""
    asking.require("read")
    of_list = f"jobs {state} {kind} {subject} {label} {created_after}"
    before = None if cursor is None else decode_cursor(cursor, of_list)
    name, _, value = (label or "").partition(":")
    wanted = (name, value) if label else None
    since = None if created_after is None else created_after.timestamp()
    found = jobs_page(
        jobs_of(request),
        asking,
        limit + 1,
        before,
        state,
        kind=kind,
        subject=subject,
        label=wanted,
        created_after=since,
    )
    page, has_more = found[:limit], len(found) > limit
    next_cursor = encode_cursor(page[-1].id, of_list) if has_more else None
    return Page(data=page, next_cursor=next_cursor, has_more=has_more)


def _one_job(response: Response, job: JobOf) -> Job:
    """One job as it is now, with its attempts. `ETag` is of its name and labels alone: progress does not change it."""
    response.headers["ETag"] = etag(job)
    return shown(job)


def _edit(
    request: Request,
    response: Response,
    asking: Asking,
    job: JobOf,
    edit: JobEdit,
    if_match: Annotated[
        str | None, Header(max_length=1000, description="the job's `ETag`, as it was looked at")
    ] = None,
) -> Job:
    """Give a job, ended ones too, another name, or these labels for all that it has.

    With `If-Match` only where name and labels are still those of that `ETag`; else 412, and nothing is changed.
    """
    asking.require("submit", job.subject)
    check = partial(check_unchanged, if_match)
    edited = jobs_of(request).store.edit(job.id, name=edit.name, labels=edit.labels, check=check)
    response.headers["ETag"] = etag(edited)
    return shown(edited)


def _cancel(request: Request, response: Response, asking: Asking, job: JobOf, how: Cancel | None = None) -> Job:
    """End a job. What is committed stays. 202, or 200 where it was asked for before."""
    now = how is not None and how.mode == "now"
    return _ordered(request, response, asking, job, partial(orders.cancel, now=now))


def _pause(request: Request, response: Response, asking: Asking, job: JobOf) -> Job:
    """Have a job wait until it is resumed. What is committed stays."""
    return _ordered(request, response, asking, job, orders.pause)


def _resume(request: Request, response: Response, asking: Asking, job: JobOf) -> Job:
    """Have a paused job go on, in another attempt."""
    return _ordered(request, response, asking, job, orders.resume)


def _ordered(
    request: Request, response: Response, asking: Principal, job: Job, order: Callable[[JobStore, Job], Job]
) -> Job:
    asking.require("submit", job.subject)
    jobs = jobs_of(request)
    after = order(jobs.store, job)
    if (after.state, after.wish) == (job.state, job.wish):
        response.status_code = 200
    jobs.supervisor.wake()
    return shown(after)


async def _events(
    request: Request,
    asking: Asking,
    job_id: Annotated[str, Path(max_length=100)],
    after: Annotated[int, Query(ge=0, lt=2**63, description="the last event that is known")] = 0,
    wait: Annotated[float, Query(ge=0, le=60, description="seconds to wait for the first, where it is not SSE")] = 0.0,
    accept: Annotated[str, Header(max_length=1000)] = "application/json",
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> Response:
    """A job's events after `after` (or `Last-Event-ID`): as Server-Sent Events while they come where `Accept` is
    `text/event-stream`, else as JSON, at once or as soon as there is one within `wait` seconds."""
    becomes_stream(request)
    job = await run_in_threadpool(_job, request, asking, job_id)
    if last_event_id is not None:
        if not last_event_id.isdecimal() or int(last_event_id) >= 2**63:
            raise Problem("invalid_request", f"header.last-event-id: expected an event's id, got {last_event_id!r}")
        after = int(last_event_id)
    jobs = jobs_of(request)
    if "text/event-stream" not in accept:
        found = await _some_events(jobs, job, after, wait)
        if not asking.is_let_in():
            raise unauthenticated()
        return JSONResponse(found.model_dump(mode="json"))
    if job.state in ENDED and after >= job.last_event:
        return Response(status_code=204)  # a browser's EventSource stops asking
    return StreamingResponse(_stream(jobs, asking, job, after), media_type="text/event-stream")


async def _some_events(jobs: Jobs, job: Job, after: int, wait_s: float) -> Events:
    found: list[Event] = await run_in_threadpool(jobs.store.events, job.id, after, 500)
    if not found and wait_s and job.state not in ENDED:
        async with aclosing(jobs.feed.follow(job.id, after, wait_s)) as follow:
            found = await anext(follow, [])
    last = found[-1].id if found else after
    return Events(data=[_safe(event) for event in found], next_after=last, ended=_are_last(job, found, last))


async def _stream(jobs: Jobs, asking: Principal, job: Job, after: int) -> AsyncGenerator[bytes]:
    yield format_sse_event(retry=_RETRY_MS)
    async with aclosing(jobs.feed.follow(job.id, after, _HEARTBEAT_S)) as follow:
        async for events in follow:
            if not asking.is_let_in():
                return
            yield b"".join(map(_as_sse, events)) or KEEPALIVE_COMMENT
            if _are_last(job, events, events[-1].id if events else after):
                return


def _as_sse(event: Event) -> bytes:
    event = _safe(event)
    data = json.dumps({"time": event.time} | event.data)
    return format_sse_event(data_str=data, event=event.event, id=str(event.id))


def _are_last(job: Job, events: Sequence[Event], last: int) -> bool:
    """Whether a job, as it was before its events up to `last` were read, ended with them; edits may come after the
    end, and whoever asks again gets them."""
    return last >= job.last_event if job.state in ENDED else any(map(_is_end, events))


def _is_end(event: Event) -> bool:
    return event.event == "state" and event.data["to"] in ENDED


def _safe(event: Event) -> Event:
    if "fault" not in event.data:
        return event
    fault = event.data["fault"] | {"message": scrubbed(event.data["fault"]["message"])}
    return event.model_copy(update={"data": event.data | {"fault": fault}})


def _logs(
    request: Request,
    asking: Asking,
    job: JobOf,
    attempt: Annotated[int | None, Query(ge=1, description="default: the newest")] = None,
    tail: Annotated[int, Query(ge=1, le=10_000, description="lines from the end")] = 200,
) -> Response:
    """What an attempt wrote, from its end."""
    asking.require("submit", job.subject)  # a log may name anything of the machine
    number = attempt or len(job.attempts)
    if number > len(job.attempts):
        raise Problem("not_found", f"job {job.id} has {len(job.attempts)} attempts")
    text = log_of(jobs_of(request), job, number, tail) if number else ""
    return Response(text, media_type="text/plain; charset=utf-8")
