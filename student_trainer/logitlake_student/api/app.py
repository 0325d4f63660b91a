"""The application of the student trainer: runs, and training as jobs, for those who may see them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from logitlake_shared.errors import ConfigError
from logitlake_shared.jobs.processes import ProcessRunner
from logitlake_shared.web.app import Check, make_app
from logitlake_shared.web.job_figures import STUDENT_FIGURES
from logitlake_shared.web.job_pages import job_pages
from logitlake_shared.web.jobs import Jobs, job_routes
from logitlake_student.api.jobs import command_of, kinds_of_jobs
from logitlake_student.api.pages import page_routes
from logitlake_student.api.runs import run_routes
from logitlake_student.config.serve import StudentServeConfig

__all__ = ["student_app"]


def student_app(config: StudentServeConfig) -> FastAPI:
    """The application over the runs that are there. Raises `ConfigError`."""
    if not config.runs.is_dir():
        raise ConfigError(f"runs: {config.runs}: no such folder; make it, or name the folder of your runs")
    jobs = None
    if config.jobs is not None:
        runner = ProcessRunner(config.jobs.folder / "attempts", command_of)
        jobs = Jobs(config.jobs, lambda _: runner, kinds_of_jobs(config.runs, config.jobs), STUDENT_FIGURES)

    def runs_are_there() -> str | None:
        return None if config.runs.is_dir() else "the folder of runs is gone"

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        if jobs is None:
            yield
        else:
            with jobs.running(app.state.service):
                yield

    routers = [run_routes(), page_routes()]
    checks: dict[str, Check] = {"runs": runs_are_there}
    nav = {"/": "Runs"}
    if jobs is not None:
        routers += [job_routes(), job_pages("/runs/")]
        checks["jobs"] = jobs.supervisor.problem
        nav["/jobs"] = "Jobs"
    app = make_app("student", config.service, routers, checks, life, nav)
    app.state.runs, app.state.jobs = config.runs, jobs
    return app
