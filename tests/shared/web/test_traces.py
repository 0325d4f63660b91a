"""Traces: what a real receiver of OTLP/HTTP gets, what answers and logs say, and that off is off."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tests.collector import Collector, collector
from tests.served import served
from tests.shared.web.conftest import CANARY
from tests.shared.web.test_service import logged

from logitlake_shared.errors import ConfigError
from logitlake_shared.web.app import make_app
from logitlake_shared.web.settings import ServiceSettings
from logitlake_shared.web.traces import RequestSpan, Traces, span

__all__ = ["collector", "logged"]

Service = Callable[..., tuple[Any, str]]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def facts(one: Span) -> dict[str, Any]:
    """Attributes as Python's values."""
    return {
        attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value")) for attribute in one.attributes
    }


def test_a_request_is_a_span(collector: Collector, service: Service) -> None:
    """Its route as declared, its status, its request id; nothing of what was asked for."""
    _, url = service(traces=True)
    answer = httpx.get(f"{url}/caches/secret-name", headers={"x-request-id": "mine-1"}, params={"scope": "admin"})
    (one,) = collector.wait(1)
    assert one.name == "GET /caches/{cache}"
    assert one.kind == Span.SPAN_KIND_SERVER
    assert facts(one) == {
        "http.request.method": "GET",
        "http.route": "/caches/{cache}",
        "http.response.status_code": 200,
        "logitlake.request_id": "mine-1",
    }
    assert one.parent_span_id == b""
    version, trace, parent, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, parent) == ("00", one.trace_id.hex(), one.span_id.hex())
    assert int(flags, 16) & 1  # sampled
    assert b"secret-name" not in one.SerializeToString()
    assert collector.paths == {"/v1/traces"}
    assert collector.resources[0]["service.name"] == "logitlake-test"


def test_a_trace_of_the_clients_is_gone_on_with(collector: Collector, service: Service) -> None:
    """W3C Trace Context: below the client's span where it sends one, on its own where that is none."""
    _, url = service(traces=True)
    answer = httpx.get(f"{url}/caches/main", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    (one,) = collector.wait(1)
    assert (one.trace_id.hex(), one.parent_span_id.hex()) == (TRACE, PARENT)
    assert answer.headers["traceparent"].startswith(f"00-{TRACE}-{one.span_id.hex()}-")
    for hostile in ("", "00-zz-1-01", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "x" * 5000):
        given = httpx.get(f"{url}/caches/main", headers={"traceparent": hostile}).headers["traceparent"]
        assert TRACE not in given
        assert len(given) == 55
    unsampled = httpx.get(f"{url}/caches/main", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert unsampled.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert unsampled.headers["traceparent"].endswith("-00")


def test_what_machines_ask_for_all_the_time_is_no_span(collector: Collector, service: Service) -> None:
    """Probes and figures, whoever sends a trace along; what comes after them is one."""
    app, url = service(traces=True)
    for path in ("/livez", "/readyz", "/metrics"):
        answer = httpx.get(f"{url}{path}", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert answer.status_code == 200
        assert "traceparent" not in answer.headers
    httpx.get(f"{url}/health")
    app.state.service.traces.close()
    assert [one.name for one in collector.spans] == ["GET /health"]


def test_the_id_is_in_logs_and_problems(collector: Collector, service: Service, logged: Any) -> None:
    _, url = service(traces=True)
    problem = httpx.get(f"{url}/bug", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).json()
    assert problem["trace_id"] == TRACE
    httpx.get(f"{url}/nothing", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    ours = [line for line in lines if line["logger"] == "logitlake.access"]
    assert len(ours) == 3  # two requests, one traceback
    assert {line["trace_id"] for line in ours} == {TRACE}


def test_faults_are_errors_without_their_words(collector: Collector, service: Service) -> None:
    """An exception's message is for the log of the service alone; a client's fault is no error of ours."""
    _, url = service(traces=True)
    httpx.get(f"{url}/bug")
    httpx.get(f"{url}/fails/DataError")
    httpx.request("TRACE", f"{url}/nothing")
    bug, client, none = collector.wait(3)
    assert (bug.name, bug.status.code) == ("GET /bug", Status.STATUS_CODE_ERROR)
    assert CANARY.encode() not in bug.SerializeToString()
    assert (client.name, client.status.code) == ("GET /fails/{name}", Status.STATUS_CODE_UNSET)
    assert facts(client)["http.response.status_code"] == 422
    assert (none.name, facts(none)["http.request.method"]) == ("other", "_OTHER")


def test_parts_of_a_request_are_below_it(collector: Collector, service: Service) -> None:
    """`span` in a route, in its thread; outside of a request it is nothing."""
    app, url = service(traces=True)

    @app.get("/parts")
    def parts(fails: bool = False) -> str:
        with span("outer", cache="main"), span("inner", rows=3):
            if fails:
                raise RuntimeError(CANARY)
        return "done"

    with span("nowhere"):
        httpx.get(f"{url}/parts")
    request, inner, outer = collector.wait(3)
    assert request.name == "GET /parts"
    assert (outer.parent_span_id, inner.parent_span_id) == (request.span_id, outer.span_id)
    assert (facts(outer), facts(inner)) == ({"logitlake.cache": "main"}, {"logitlake.rows": 3})
    httpx.get(f"{url}/parts", params={"fails": True})
    failed = [one for one in collector.wait(6) if one.status.code == Status.STATUS_CODE_ERROR]
    assert {one.name for one in failed} == {"GET /parts", "inner", "outer"}
    assert [facts(one)["error.type"] for one in failed if one.name == "inner"] == ["RuntimeError"]
    assert not any(CANARY.encode() in one.SerializeToString() for one in failed)


def test_what_is_left_is_sent_at_the_end(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the application ends, not an hour later."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    ended: list[int] = []

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        yield
        ended.append(len(collector.spans))

    with served(make_app("test", ServiceSettings(traces=True), lifespan=life)) as url:
        httpx.get(f"{url}/health")
    assert ended == [0]
    assert [one.name for one in collector.spans] == ["GET /health"]


def test_a_collector_that_refuses_costs_no_answer(collector: Collector, service: Service, logged: Any) -> None:
    """And is in the log."""
    collector.status = 400
    app, url = service(traces=True)
    assert httpx.get(f"{url}/caches/main").status_code == 200
    app.state.service.traces.close()
    assert collector.spans == []
    assert any(json.loads(line)["logger"].startswith("opentelemetry") for line in logged.getvalue().splitlines())


def test_names_that_the_environment_gives_are_kept(
    collector: Collector, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab")
    _, url = service(traces=True)
    httpx.get(f"{url}/health")
    collector.wait(1)
    assert collector.resources[0]["service.name"] == "mine"
    assert collector.resources[0]["deployment.environment.name"] == "lab"


@pytest.mark.parametrize(
    ("variable", "value"), [("OTEL_TRACES_EXPORTER", "console"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]
)
def test_what_would_be_passed_over_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable} is '{value}'"):
        Traces("test")


def test_the_sdk_may_be_switched_off_by_its_own_variable(
    collector: Collector, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    _, url = service(traces=True)
    answer = httpx.get(f"{url}/bug")
    assert "traceparent" not in answer.headers
    assert "trace_id" not in answer.json()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'logitlake\[otel\]'"):
        Traces("test")


def test_off_is_off(service: Service) -> None:
    """No header, no id, no span; a client's own trace changes nothing."""
    _, url = service()
    answer = httpx.get(f"{url}/bug", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert "traceparent" not in answer.headers
    assert "trace_id" not in answer.json()
    RequestSpan().answered("/x", 200)


def test_off_imports_nothing() -> None:
    """Not by an application, not by a request, not by `span`."""
    code = """if True:
        import asyncio, sys, httpx
        from logitlake_shared.web.app import make_app
        from logitlake_shared.web.settings import ServiceSettings
        from logitlake_shared.web.traces import span
        async def ask():
            transport = httpx.ASGITransport(make_app("test", ServiceSettings()))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return (await client.get("/livez")).status_code
        with span("x"):
            assert asyncio.run(ask()) == 200
        print([name for name in sys.modules if name.startswith("opentelemetry")])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
