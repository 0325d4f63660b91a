"""A receiver of OpenTelemetry's spans on 127.0.0.1, as OTLP over HTTP: what a service really sends is what it holds."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

__all__ = ["Collector", "collector"]

WAIT_S = 30


class Collector:
    """A receiver of OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.paths: set[str] = set()
        self.changed = threading.Condition()
        self.status = 200

    def take(self, path: str, body: bytes) -> int:
        request = ExportTraceServiceRequest.FromString(body)
        with self.changed:
            self.paths.add(path)
            if self.status == 200:
                for group in request.resource_spans:
                    self.resources.append({one.key: one.value.string_value for one in group.resource.attributes})
                    self.spans += [one for scope in group.scope_spans for one in scope.spans]
            self.changed.notify_all()
            return self.status

    def wait(self, count: int) -> list[Span]:
        """The spans, when there are so many; by name."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.spans) >= count, WAIT_S), self.spans
            return sorted(self.spans, key=lambda one: one.name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """One that the environment names, as an operator would."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = found.take(self.path, self.rfile.read(int(self.headers["content-length"])))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    yield found
    server.shutdown()
    server.server_close()
    thread.join(WAIT_S)
