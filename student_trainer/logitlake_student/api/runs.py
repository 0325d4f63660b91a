"""Runs, their stages, metrics and checkpoints, as their folders say it, while they go on and afterwards."""

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from logitlake_shared.errors import RunFilesError
from logitlake_shared.web.cursors import Cursor, Limit, Page, page_of
from logitlake_shared.web.doors import Asking, Principal
from logitlake_shared.web.problems import Problem, scrubbed
from logitlake_student.run_files import StageFiles, find_run, find_runs, read_stages, snapshots_of, thinned

__all__ = ["RunDocument", "RunOf", "listed_run", "run_document", "run_routes", "runs_of"]

StageName = Literal["init", "d2d", "d2s", "preference"]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True, use_attribute_docstrings=True)


class StageDocument(_Document):
    """A stage that was begun."""

    name: str = Field(examples=["d2d"])
    is_done: bool
    steps: int = Field(examples=[400])
    """that it is to have"""
    step: int = Field(examples=[120])
    """of its newest line of metrics"""
    latest: dict[str, Any] = Field(examples=[{"step": 120, "loss": 0.31}])
    """that line, without experts"""
    figures: dict[str, Any] | None = Field(examples=[{"steps": 400, "seconds": 31.2}])
    """its closing figures; null before it is done"""


class RunDocument(_Document):
    """A run: the stages that were begun, and what they learn from."""

    name: str = Field(examples=["demo"])
    stages: list[StageDocument]
    snapshots: dict[str, int] = Field(examples=[{"main": 1}])
    """of each cache, the snapshot that the run is pinned to"""
    job: str | None = Field(examples=["job_01K0000000000000000000000"])
    """the newest job that trains it"""
    problem: str | None = Field(default=None, examples=[None])
    """in lists: which of its files is damaged, and nothing else of it; asked for by its name, it is `run_corrupt`"""


class Metrics(_Document):
    """Lines of a stage's metrics."""

    stage: str = Field(examples=["d2d"])
    data: list[dict[str, Any]] = Field(examples=[[{"step": 10, "loss": 0.9}]])
    """a line each `log_every` steps: means over the steps since the line before"""
    total: int = Field(examples=[40])
    """lines that there are"""


class CheckpointDocument(_Document):
    """What was saved of a stage."""

    stage: str = Field(examples=["d2d"])
    step: int = Field(examples=[100])
    kind: Literal["checkpoint", "model"]
    """a checkpoint to go on from, or the finished model"""
    bytes: int = Field(examples=[1_234_567])


def runs_of(request: Request) -> FilePath:
    """The folder of runs that is served."""
    runs: FilePath = request.app.state.runs
    return runs


def _run(request: Request, asking: Asking, run: Annotated[str, Path(max_length=100, examples=["demo"])]) -> FilePath:
    """The run of the path, if it is there for whoever asks."""
    asking.require("read")
    found = find_run(runs_of(request), run) if asking.sees(run) else None
    if found is None:
        raise Problem("not_found", f"no run {run!r}")
    return found


RunOf = Annotated[FilePath, Depends(_run)]


def run_routes() -> APIRouter:
    """The routes below `/v1/runs`."""
    router = APIRouter(prefix="/v1/runs", tags=["runs"])
    router.add_api_route("", _list_runs, response_model=Page[RunDocument])
    router.add_api_route("/{run}", _one_run, response_model=RunDocument)
    router.add_api_route("/{run}/metrics", _metrics, response_model=list[Metrics])
    router.add_api_route("/{run}/checkpoints", _checkpoints, response_model=list[CheckpointDocument])
    return router


def _list_runs(request: Request, asking: Asking, limit: Limit = 50, cursor: Cursor = None) -> Page[RunDocument]:
    """The runs that the token covers, by name."""
    asking.require("read")
    names = [(name, name) for name in find_runs(runs_of(request)) if asking.sees(name)]
    page = page_of(names, "runs", limit, cursor)
    runs = [listed_run(request, asking, runs_of(request) / name) for name in page.data]
    return Page(data=runs, next_cursor=page.next_cursor, has_more=page.has_more)


def _one_run(request: Request, asking: Asking, run: RunOf) -> RunDocument:
    """One run as it is now."""
    return run_document(request, asking, run, read_stages(run))


def _metrics(
    run: RunOf,
    stage: Annotated[StageName | None, Query(description="of this stage only")] = None,
    after_step: Annotated[int, Query(ge=0, lt=2**63, description="lines of later steps only")] = 0,
    points: Annotated[int, Query(ge=2, le=10_000, description="lines of a stage; more are thinned out")] = 1000,
) -> list[Metrics]:
    """The metrics of each stage. Without losing the first or the last, long ones are thinned out."""
    shown = []
    for files in read_stages(run):
        if stage in (None, files.name):
            lines = [line for line in files.metrics if line["step"] > after_step]
            shown.append(Metrics(stage=files.name, data=thinned(lines, points), total=len(lines)))
    return shown


def _checkpoints(run: RunOf) -> list[CheckpointDocument]:
    """What is saved of each stage: checkpoints to go on from, finished models."""
    return [CheckpointDocument.model_validate(saved) for files in read_stages(run) for saved in files.saved()]


def run_document(request: Request, asking: Principal, run: FilePath, stages: Sequence[StageFiles]) -> RunDocument:
    """A run as its stages say it. Raises `RunFilesError`."""
    return RunDocument(
        name=run.name,
        stages=[_stage(files) for files in stages],
        snapshots=snapshots_of(run),
        job=_newest_job(request, asking, run),
    )


def listed_run(request: Request, asking: Principal, run: FilePath) -> RunDocument:
    """A run among others, whom a damaged one is not to hide."""
    try:
        return run_document(request, asking, run, read_stages(run))
    except RunFilesError as error:
        job = _newest_job(request, asking, run)
        return RunDocument(name=run.name, stages=[], snapshots={}, job=job, problem=scrubbed(str(error)))


def _newest_job(request: Request, asking: Principal, run: FilePath) -> str | None:
    jobs = request.app.state.jobs
    newest = [] if jobs is None else jobs.store.page(1, asking.sees, subject=run.name)
    return newest[0].id if newest else None


def _stage(files: StageFiles) -> StageDocument:
    metrics = files.metrics
    latest = {name: value for name, value in metrics[-1].items() if name != "experts"} if metrics else {}
    return StageDocument(
        name=files.name,
        is_done=files.figures is not None,
        steps=files.steps,
        step=latest.get("step", 0),
        latest=latest,
        figures=files.figures,
    )
