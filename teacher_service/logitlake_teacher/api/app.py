"""The application of the teacher service: a lake's caches, files and SQL, for those who may see them."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI

from logitlake_shared.errors import LogitLakeError
from logitlake_shared.jobs.processes import ProcessRunner
from logitlake_shared.jobs.runner import Runner
from logitlake_shared.lake import Lake
from logitlake_shared.sql_service import SqlPool
from logitlake_shared.web.app import Check, make_app
from logitlake_shared.web.job_figures import TEACHER_FIGURES
from logitlake_shared.web.job_pages import job_pages
from logitlake_shared.web.jobs import Jobs, job_routes
from logitlake_teacher.api.cache_sizes import CacheSizes
from logitlake_teacher.api.caches import cache_routes
from logitlake_teacher.api.files import files_route
from logitlake_teacher.api.jobs import command_of, kinds_of_jobs, plan_routes
from logitlake_teacher.api.pages import page_routes
from logitlake_teacher.api.queries import LongQueries, query_routes
from logitlake_teacher.api.samples import sample_routes
from logitlake_teacher.api.sql import SqlQuestions, sql_routes
from logitlake_teacher.config import CONFIGS
from logitlake_teacher.config.serve import ServeConfig, TeacherJobsSettings
from logitlake_teacher.ray_runner import RayRunner

__all__ = ["teacher_app"]


def teacher_app(config: ServeConfig) -> FastAPI:
    """The application over the lake that is there. Raises `ConfigError` and `LakeError`."""
    lake = Lake.open(config.lake)
    jobs = None if config.jobs is None else _jobs(config.lake, config.jobs)

    def lake_is_there() -> str | None:
        try:
            Lake.of(lake.store)
        except LogitLakeError as error:
            return str(error)
        return None

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            pool = stack.enter_context(SqlPool(config.lake, config.sql))
            registry = app.state.service.registry
            stack.enter_context(CacheSizes(lake).running(registry))
            app.state.questions = SqlQuestions(pool, registry)
            app.state.queries = LongQueries(app.state.questions)
            stack.enter_context(app.state.queries.running())
            if jobs is not None:
                stack.enter_context(jobs.running(app.state.service))
            yield

    routers = [cache_routes(), sample_routes(), sql_routes(), query_routes(), page_routes()]
    checks: dict[str, Check] = {"lake": lake_is_there}
    if config.jobs is not None and jobs is not None:
        routers += [job_routes(), plan_routes(config.lake, config.jobs), job_pages("/caches/")]
        checks["jobs"] = jobs.supervisor.problem
    nav = {"/": "Caches"} | ({} if jobs is None else {"/jobs": "Jobs"}) | {"/sql": "SQL"}
    app = make_app("teacher", config.service, routers, checks, life, nav)
    app.state.jobs = jobs
    app.state.lake = lake
    app.state.tokenizer = config.tokenizer
    app.state.runs = config.runs
    app.router.routes.append(files_route(lake.store))
    return app


def _jobs(lake_uri: str, settings: TeacherJobsSettings) -> Jobs:
    here: Runner = ProcessRunner(settings.folder / "attempts", command_of)
    captures = here if settings.ray_address is None else RayRunner(settings.ray_address)
    # Plans read and capture nothing: they need no cluster.
    kinds = kinds_of_jobs(lake_uri, settings)
    return Jobs(settings, lambda job: captures if job.kind in CONFIGS else here, kinds, TEACHER_FIGURES)
