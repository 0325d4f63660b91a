"""The teacher's jobs: captures and pairs into the lake that is served, and plans of them.

A job's configuration is that of the command line, with bounds: it writes into this lake, reads below `data_roots`, and
may let images in from no more hosts and stores than the operator does.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from logitlake_schemas import layout
from logitlake_shared.config import parse_config
from logitlake_shared.config_paths import check_roots, expanded, is_below
from logitlake_shared.errors import ConfigError
from logitlake_shared.jobs.records import Job, NewJob
from logitlake_shared.jobs.states import ENDED
from logitlake_shared.web.doors import Asking
from logitlake_shared.web.jobs import Resolve, Submission, jobs_of, new_job, shown, submit, wait_for_end
from logitlake_shared.web.limits import becomes_stream
from logitlake_shared.web.problems import Problem
from logitlake_teacher.config import CONFIGS, CaptureConfig, PairsConfig
from logitlake_teacher.config.serve import TeacherJobsSettings

__all__ = ["command_of", "kinds_of_jobs", "plan_routes"]


def kinds_of_jobs(lake_uri: str, settings: TeacherJobsSettings) -> Mapping[str, Resolve]:
    """What a submission of each kind becomes."""
    return {kind: partial(_resolve, lake_uri, settings) for kind in CONFIGS}


def command_of(job: Job, config: Path) -> Sequence[str]:
    """The command that does a job."""
    return ["logitlake_teacher.cli:cli", job.kind, str(config), *job.arguments]


def plan_routes(lake_uri: str, settings: TeacherJobsSettings) -> APIRouter:
    """`/v1/plans`."""
    router = APIRouter(prefix="/v1/plans", tags=["jobs"])
    resolve = partial(_resolve, lake_uri, settings)

    async def plan(
        request: Request,
        response: Response,
        asking: Asking,
        submission: Submission,
        wait: Annotated[float, Query(ge=0, le=60, description="seconds to wait for it")] = 20.0,
    ) -> Job:
        """What a job would do and what it would take: samples, tokens, bytes, hours. Nothing is captured.

        A plan is a job of kind `plan`, which waits for no other; its `result` is the plan. 200 with the job once it
        ended, 202 where it goes on: look again at `Location`.
        """
        becomes_stream(request)
        if submission.kind not in CONFIGS:
            raise Problem("invalid_request", f"body.kind: expected one of {', '.join(CONFIGS)}")
        job, _ = submit(jobs_of(request), asking, submission, lambda said: _as_plan(resolve(said)))
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        job = await wait_for_end(jobs_of(request), job, wait)
        response.status_code = 200 if job.state in ENDED else 202
        return shown(job)

    router.add_api_route("", plan, methods=["POST"], response_model=Job, responses={202: {"model": Job}})
    return router


def _as_plan(new: NewJob) -> NewJob:
    arguments = ("--json", *(("--pairs",) if new.kind == "pairs" else ()))
    return new.model_copy(update={"kind": "plan", "lane": None, "arguments": arguments})


def _resolve(lake_uri: str, settings: TeacherJobsSettings, submission: Submission) -> NewJob:
    document = dict(submission.config)
    lake = document.get("lake")
    cache = lake.get("cache") if isinstance(lake, dict) else None
    if not isinstance(lake, dict) or not isinstance(cache, str) or not layout.valid_name(cache):
        raise ConfigError("config: `lake.cache` is required: the name of the cache to fill, letters, digits and `._-`")
    if not _is_same_lake(str(lake.get("uri", lake_uri)), lake_uri):
        raise ConfigError("config: `lake.uri` is another lake than the one that is served; leave it out")
    document["lake"] = lake | {"uri": lake_uri}
    config = parse_config(CONFIGS[submission.kind], document, "config")
    _check_bounds(config, settings)
    if "folder" not in document.get("plan", {}):
        plans = config.plan.model_copy(update={"folder": settings.folder / "plans"})
        config = config.model_copy(update={"plan": plans})
    digest = submission.plan_digest
    return new_job(submission, config, cache, settings, () if digest is None else ("--plan-digest", digest))


def _is_same_lake(uri: str, other: str) -> bool:
    if "://" in uri or "://" in other:
        return uri.rstrip("/") == other.rstrip("/")
    return expanded(uri).resolve() == expanded(other).resolve()


def _check_bounds(config: CaptureConfig | PairsConfig, settings: TeacherJobsSettings) -> None:
    """Raises `ConfigError` for what the operator does not let jobs read."""
    read: dict[str, BaseModel] = {"teacher": config.teacher}
    read |= {f"data.{place}": source for place, source in enumerate(config.data)}
    if "folder" in config.plan.model_fields_set:
        read["plan"] = config.plan
    for key, section in read.items():
        check_roots(section, settings.data_roots, key)
    for host in config.images.allow_hosts:
        if host not in settings.allow_hosts:
            raise ConfigError(f"`images.allow_hosts`: {host!r} is not a host that jobs may use (jobs.allow_hosts)")
    roots = [root for source in config.data if "://" in (root := str(getattr(source, "image_root", "")))]
    for store in (*config.images.allow_stores, *roots):
        if not is_below(store, settings.allow_stores):
            raise ConfigError(f"`images.allow_stores`: {store!r} is not a store that jobs may use (jobs.allow_stores)")
