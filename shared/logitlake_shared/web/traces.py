"""Traces for who has a collector: a span for each request, below the one that the client says it belongs to.

Off unless `service.traces` is true, and then nothing of OpenTelemetry is imported; this is the one file that does.
Where spans go, which are kept and how they are sent is said by OpenTelemetry's own variables
(`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_SAMPLER`, …), and nothing here repeats them. A collector that is slow or
gone costs spans and a line in the log, never an answer.

A span holds names, numbers and ids: the route as it is declared and never the path that was asked for, the class of an
exception and never its message. Those may hold what only the log of the service should.

    with span("sql.begin", query_id=request.query_id):  # below the request that is being answered; without one, nothing
        ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from logitlake_shared.errors import ConfigError
from logitlake_shared.web.logs import TRACE_ID

if TYPE_CHECKING:
    from opentelemetry.trace import Span

__all__ = ["RequestSpan", "Traces", "request_span", "span"]

Attributes = Mapping[str, str | int | float | bool]

_W3C = ("traceparent", "tracestate")
_UNDER_WAY: ContextVar[Traces | None] = ContextVar("traces", default=None)
# What would be passed over otherwise: spans are sent in one way.
_SETTLED = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}


class RequestSpan:
    """The span of one request, as the frame sees it; with nothing behind it while traces are off."""

    def __init__(self, behind: Span | None = None, method: str = "") -> None:
        self._behind, self._method = behind, method
        self.trace_id: str | None = None
        """for log lines and problems"""
        self.traceparent: str | None = None
        """for whoever asked: what to look for (W3C Trace Context)"""
        if behind is not None and (context := behind.get_span_context()).is_valid:
            self.trace_id = f"{context.trace_id:032x}"
            self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"

    def answered(self, route: str | None, status: int) -> None:
        """What came of it, which is known at the end. A `status` of 0 is an answer that never began."""
        if self._behind is None:
            return
        from opentelemetry.trace import StatusCode

        if route:
            self._behind.update_name(f"{self._method} {route}")
            self._behind.set_attribute("http.route", route)
        if status:
            self._behind.set_attribute("http.response.status_code", status)
        if status >= 500 or not status:
            self._behind.set_status(StatusCode.ERROR)


class Traces:
    """The spans of one application, sent from a thread of their own.

    Raises `ConfigError` where OpenTelemetry is not installed, or its variables ask for what is not done here.
    """

    def __init__(self, name: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"traces: {error.name} is not installed; pip install 'logitlake[otel]', or leave `traces` off"
            ) from None
        for variable, only in _SETTLED.items():
            if (given := os.environ.get(variable, only)) not in (only, ""):
                raise ConfigError(f"traces: {variable} is {given!r}, and spans are sent as {only!r} only; unset it")
        resource = Resource({SERVICE_VERSION: version("logitlake")}).merge(Resource.create())
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # nobody gave it a name
            resource = resource.merge(Resource({SERVICE_NAME: f"logitlake-{name}"}))
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("logitlake", version("logitlake"))
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, scope: Scope, request_id: str, method: str) -> Iterator[RequestSpan]:
        """The span around the answer to a request."""
        from opentelemetry.trace import SpanKind

        headers = Headers(scope=scope)
        context = self._propagator.extract({key: headers[key] for key in _W3C if key in headers})
        attributes = {
            "http.request.method": "_OTHER" if method == "other" else method,
            "logitlake.request_id": request_id,
        }
        with self._span(method, attributes, context=context, kind=SpanKind.SERVER) as behind:
            token = _UNDER_WAY.set(self)
            try:
                yield RequestSpan(behind, method)
            finally:
                _UNDER_WAY.reset(token)

    @contextmanager
    def below(self, name: str, attributes: Attributes) -> Iterator[None]:
        """A span below the one that is under way."""
        with self._span(name, attributes):
            yield

    @contextmanager
    def _span(self, name: str, attributes: Attributes, **more: Any) -> Iterator[Span]:
        from opentelemetry.trace import StatusCode

        more |= {"record_exception": False, "set_status_on_exception": False}  # they would tell its message
        with self._tracer.start_as_current_span(name, attributes=attributes, **more) as behind:
            try:
                yield behind
            except Exception as error:
                behind.set_attribute("error.type", type(error).__name__)
                behind.set_status(StatusCode.ERROR)
                raise

    def close(self) -> None:
        """Sends what is left, or gives it up after a while."""
        self._provider.shutdown()


@contextmanager
def request_span(traces: Traces | None, scope: Scope, request_id: str, method: str) -> Iterator[RequestSpan]:
    """The span around the answer to a request, and its id in every line that is logged meanwhile.

    `method` is one that is known, or `other`.
    """
    if traces is None:
        yield RequestSpan()
        return
    with traces.request(scope, request_id, method) as seen:
        token = TRACE_ID.set(seen.trace_id)
        try:
            yield seen
        finally:
            TRACE_ID.reset(token)


@contextmanager
def span(name: str, **attributes: str | int | float | bool) -> Iterator[None]:
    """A span around a part of a request, with `logitlake.…` attributes; nothing while traces are off.

    For functions, threads of the request's included; not around the `yield` of an asynchronous generator, which may
    end elsewhere than it began.
    """
    traces = _UNDER_WAY.get()
    if traces is None:
        yield
        return
    with traces.below(name, {f"logitlake.{key}": value for key, value in attributes.items()}):
        yield
