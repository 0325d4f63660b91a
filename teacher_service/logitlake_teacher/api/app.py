"""The application of the teacher service: a lake's caches, files and SQL, for those who may see them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from logitlake_shared.errors import LogitLakeError
from logitlake_shared.lake import Lake
from logitlake_shared.sql_service import SqlPool
from logitlake_shared.web.app import make_app
from logitlake_teacher.api.caches import cache_routes
from logitlake_teacher.api.files import files_route
from logitlake_teacher.api.pages import page_routes
from logitlake_teacher.api.sql import SqlQuestions, sql_routes
from logitlake_teacher.config.serve import ServeConfig

__all__ = ["teacher_app"]


def teacher_app(config: ServeConfig) -> FastAPI:
    """The application over the lake that is there. Raises `ConfigError` and `LakeError`."""
    lake = Lake.open(config.lake)

    def lake_is_there() -> str | None:
        try:
            Lake.of(lake.store)
        except LogitLakeError as error:
            return str(error)
        return None

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        with SqlPool(config.lake, config.sql) as pool:
            app.state.questions = SqlQuestions(pool, app.state.service.registry)
            yield

    routers = [cache_routes(), sql_routes(), page_routes()]
    app = make_app("teacher", config.service, routers, {"lake": lake_is_there}, life)
    app.state.lake = lake
    app.state.tokenizer = config.tokenizer
    app.router.routes.append(files_route(lake.store))
    return app
