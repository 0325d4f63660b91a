"""Around every answer: who asks, how much, under which id; headers that keep a browser safe; a log line; metrics.

Pure ASGI, and outermost: an answer that never came to be is an answer all the same, with an id under which the log has
its traceback.
"""

import logging
import re
import time
from collections.abc import Collection
from urllib.parse import urlencode

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitlake_shared.ids import new_id
from logitlake_shared.web.doors import Door, Principal
from logitlake_shared.web.html import problem_page, wants_page
from logitlake_shared.web.limits import Limits
from logitlake_shared.web.logs import REQUEST_ID
from logitlake_shared.web.problems import MEDIA_TYPE, Problem, problem_of
from logitlake_shared.web.traces import RequestSpan, Traces, request_span

__all__ = ["Frame", "HttpMetrics", "problem_response"]

_log = logging.getLogger("logitlake.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "PROPFIND", "OPTIONS"})
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class HttpMetrics:
    """Prometheus' figures of requests. Labels are bounded: routes as they are declared, never what was asked for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "route", "status")
        self._requests = Counter("logitlake_http_requests", "Requests answered.", labels, registry=registry)
        self._seconds = Histogram(
            "logitlake_http_request_duration_seconds", "Time to the end of an answer.", ("route",), registry=registry
        )

    def saw(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts one answer. `method` is one that is known, or `other`."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class Frame:
    """The outermost middleware. `is_open` are paths that everybody may ask for: probes, and the way to log in.

    `is_untraced` are paths whose requests are no spans.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        door: Door,
        limits: Limits,
        metrics: HttpMetrics,
        is_open: Collection[str],
        traces: Traces | None,
        is_untraced: Collection[str],
    ) -> None:
        self._app, self._door, self._limits = app, door, limits
        self._metrics, self._is_open = metrics, is_open
        self._traces, self._is_untraced = traces, is_untraced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = HTTPConnection(scope).headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        token = REQUEST_ID.set(request_id)
        traces = None if scope["path"] in self._is_untraced else self._traces
        try:
            with request_span(traces, scope, request_id, _method(scope)) as span:
                await self._traced(scope, receive, send, request_id, span)
        finally:
            REQUEST_ID.reset(token)

    async def _traced(self, scope: Scope, receive: Receive, send: Send, request_id: str, span: RequestSpan) -> None:
        started, status = time.perf_counter(), 0
        scope["state"]["trace_id"] = span.trace_id

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if span.traceparent is not None:
                    headers["traceparent"] = span.traceparent
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            try:
                await self._answer(scope, receive, framed)
            except Exception as error:
                problem = problem_of(error)
                if problem.code == "internal":
                    _log.exception("an unexpected error")
                if status:
                    raise  # half an answer is out: the connection must break, or the other half would be missed
                await problem_response(problem, HTTPConnection(scope))(scope, receive, framed)
        finally:
            route = getattr(scope.get("route"), "path", None)
            span.answered(route, status)
            self._tell(scope, route or "none", status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        receive = self._limits.bounded(scope, receive)
        if scope["path"] in self._is_open:
            await self._app(scope, receive, send)
            return
        principal = self._door.admit(HTTPConnection(scope))
        scope["state"]["principal"] = principal
        with self._limits.request(principal.id) as slot:
            scope["state"]["slot"] = slot
            await self._app(scope, receive, send)

    def _tell(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        self._metrics.saw(_method(scope), route, status, seconds)
        principal: Principal | None = scope["state"].get("principal")
        facts = {
            "method": scope["method"],
            "route": route,
            "path": scope["path"],
            "status": status,
            "milliseconds": round(seconds * 1000, 1),
            "principal": None if principal is None else principal.id,
        }
        level = logging.DEBUG if scope["path"] in self._is_open else logging.INFO
        _log.log(level, "%s %s", scope["method"], scope["path"], extra=facts)


def _method(scope: Scope) -> str:
    """Of the request, if it is one of those that there are: a label must be bounded."""
    method: str = scope["method"]
    return method if method in _METHODS else "other"


def problem_response(problem: Problem, connection: HTTPConnection) -> Response:
    """The answer that is an error: for a browser a page, or the way to log in, else the RFC's document."""
    request_id: str | None = getattr(connection.state, "request_id", None)
    if not wants_page(connection):
        document = problem.document(request_id, getattr(connection.state, "trace_id", None))
        return JSONResponse(document, problem.status, dict(problem.headers), MEDIA_TYPE)
    if problem.code == "unauthenticated" and connection.scope["method"] == "GET":
        return RedirectResponse(f"/login?{urlencode({'then': connection.scope['path']})}", 303)
    return problem_page(problem, connection, request_id)
