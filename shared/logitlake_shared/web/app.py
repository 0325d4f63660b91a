"""An application with everything in its place, for a service to add its routes to.

    app = make_app("teacher", ServiceSettings(), routers=[...], checks={"lake": lake_is_there})

Every route answers errors as problems and says so in the OpenAPI document; every route needs a principal but the
probes; nothing is served from another host.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from importlib.metadata import version
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from logitlake_shared.errors import LogitLakeError
from logitlake_shared.spelling import did_you_mean
from logitlake_shared.web.doors import Door, principal_of
from logitlake_shared.web.frame import Frame, HttpMetrics, problem_response
from logitlake_shared.web.health import health_page
from logitlake_shared.web.limits import Limits
from logitlake_shared.web.problems import (
    MEDIA_TYPE,
    FieldError,
    Problem,
    ProblemDocument,
    problem_of,
    problem_of_status,
    scrubbed,
)
from logitlake_shared.web.sessions import OPEN_PATHS, session_routes
from logitlake_shared.web.settings import ServiceSettings
from logitlake_shared.web.token_routes import token_routes
from logitlake_shared.web.tokens import TokenStore
from logitlake_shared.web.traces import Traces

__all__ = ["Check", "Service", "make_app", "service_of"]

Check = Callable[[], str | None]
"""None if it is fine, else what is wrong"""

_PROBES = ("/livez", "/readyz")
# Machines ask for these every few seconds: as spans they would bury those of people's requests.
_UNTRACED = (*_PROBES, "/metrics")


class Service:
    """What belongs to one running application."""

    def __init__(self, name: str, settings: ServiceSettings, checks: Mapping[str, Check]) -> None:
        self.settings = settings
        self.tokens = None if settings.tokens is None else TokenStore(settings.tokens)
        self.registry = CollectorRegistry()
        self.limits = Limits(settings)
        self.checks = checks
        self.traces = Traces(name) if settings.traces else None
        self.is_ending = False
        """set when the process was asked to end: nothing new should come here"""
        self.on_ending: list[Callable[[], None]] = []
        """called then, from a signal handler"""

    def problems(self) -> dict[str, str]:
        """What keeps the service from being ready, by the names of checks; everybody may know it."""
        found = {name: scrubbed(problem) for name, check in self.checks.items() if (problem := check()) is not None}
        return {"service": "it is ending"} | found if self.is_ending else found

    def begin_ending(self) -> None:
        """Says that the process was asked to end."""
        self.is_ending = True
        for tell in self.on_ending:
            tell()


def service_of(request: Request) -> Service:
    """The service that a request came to; also a dependency of FastAPI's."""
    service: Service = request.app.state.service
    return service


def make_app(
    name: str,
    settings: ServiceSettings,
    routers: Sequence[APIRouter] = (),
    checks: Mapping[str, Check] | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    nav: Mapping[str, str] | None = None,
) -> FastAPI:
    """The application of the service `name`: `checks` are what `/readyz` asks, `lifespan` is around its whole life,
    `nav` names its pages by their paths.

    Raises `ConfigError`.
    """
    service = Service(name, settings, checks or {})
    Info("logitlake_build", "What runs.", registry=service.registry).info(
        {"version": version("logitlake"), "service": name}
    )
    frame = Middleware(
        Frame,
        door=Door(service.tokens, frozenset(settings.host_names)),
        limits=service.limits,
        metrics=HttpMetrics(service.registry),
        is_open=(*_PROBES, *OPEN_PATHS),
        traces=service.traces,
        is_untraced=_UNTRACED,
    )

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with nullcontext() if lifespan is None else lifespan(app):
                yield
        finally:
            if service.traces is not None:  # sends what is left: not on the event loop, and it may take a while
                await to_thread.run_sync(service.traces.close)

    app = FastAPI(
        title=f"LogitLake {name}",
        version=version("logitlake"),
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        middleware=[frame],
        lifespan=life,
        responses={
            "default": {"model": ProblemDocument, "description": "A problem (RFC 9457)", "content": {MEDIA_TYPE: {}}}
        },
    )
    app.state.service = service
    app.state.nav = {**(nav or {}), "/health": "Health"}
    app.add_exception_handler(Problem, _answered)
    app.add_exception_handler(LogitLakeError, _answered)
    app.add_exception_handler(HTTPException, _status_answered)
    app.add_exception_handler(RequestValidationError, _invalid_answered)
    app.include_router(_operation())
    app.include_router(health_page(service.checks, service.problems, service.registry))
    app.include_router(session_routes(service.tokens))
    app.include_router(token_routes(service.tokens))
    for router in routers:
        app.include_router(router)
    return app


def _operation() -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """Whether the process answers at all."""
        return "ok"

    @router.get("/readyz")
    def readyz(request: Request) -> JSONResponse:
        """Whether requests should come here: 200, or 503 with what is wrong."""
        problems = service_of(request).problems()
        status = "not ready" if problems else "ready"
        return JSONResponse({"status": status, "problems": problems}, 503 if problems else 200)

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:
        """Prometheus' text format. For a token that covers every cache."""
        if not principal_of(request).sees_all:
            raise Problem("not_found", "no metrics")
        return Response(generate_latest(service_of(request).registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _answered(request: Request, error: Exception) -> Response:
    return problem_response(problem_of(error), request)


def _status_answered(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, Problem):  # FastAPI makes a 400 of whatever goes wrong while it reads a body
        return _answered(request, error.__cause__)
    detail = f"{request.method} {request.url.path}"
    return problem_response(problem_of_status(error.status_code, detail, error.headers), request)


def _invalid_answered(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # What FastAPI read the body as: the model of the route, or one that it made of several parameters.
    body = getattr(request.scope.get("route"), "body_field", None)
    faults = [_field_error(fault, body and body.field_info.annotation) for fault in error.errors()]
    detail = "; ".join(f"{fault.pointer[1:].replace('/', '.')}: {fault.detail}" for fault in faults[:3])
    return problem_response(Problem("invalid_request", detail, faults), request)


def _field_error(fault: Mapping[str, Any], body: Any) -> FieldError:
    # RFC 6901: `~` and `/` of a key are escaped.
    pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in fault["loc"])
    where, *path = fault["loc"]
    is_unknown = where == "body" and path and fault["type"] == "extra_forbidden"
    hint = did_you_mean(body, path) if is_unknown else None
    return FieldError(pointer=pointer, detail=f"{fault['msg']}; {hint}" if hint else fault["msg"])
