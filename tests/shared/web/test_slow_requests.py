"""Who sends half of a request, or none, keeps neither a place nor a connection; who waits for an answer keeps both."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from starlette.responses import StreamingResponse
from tests.served import served
from tests.shared.web.conftest import odd_routes
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

from logitlake_shared.web.app import make_app
from logitlake_shared.web.connections import bounded_protocol
from logitlake_shared.web.settings import ServiceSettings

# What a request may take here; and what a test waits for at most, on a busy machine.
REQUEST_S = 0.3
PATIENCE_S = 30.0

Started = tuple[Any, str]


@pytest.fixture(params=[H11Protocol, AutoHTTPProtocol], ids=["h11", "auto"])
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., Started]]:
    """`start(max_concurrent=1)`: a service with these settings, on h11 and on what uvicorn prefers."""
    with ExitStack() as stack:

        def begin(**settings: Any) -> Started:
            app = make_app(
                "test", ServiceSettings(**{"request_s": REQUEST_S} | settings), [odd_routes(), slow_routes()]
            )
            protocol = bounded_protocol(app.state.service.settings.request_s, request.param)
            return app, stack.enter_context(served(app, http=protocol))

        yield begin


def slow_routes() -> APIRouter:
    """An answer that goes on until it is told to end."""
    router = APIRouter()
    go_on = threading.Event()

    @router.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "begun"
            await asyncio.to_thread(go_on.wait, PATIENCE_S)
            yield " and ended"

        return StreamingResponse(pieces())

    @router.get("/end")
    def end() -> None:
        go_on.set()

    return router


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    """A bare connection."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 80), timeout=PATIENCE_S) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """What comes until the service closes the connection."""
    said = b""
    while data := connection.recv(2**16):
        said += data
    return said


@pytest.mark.parametrize(
    ("path", "media_type"),
    [("/echo", "text/plain"), ("/body", "application/json"), ("/login", "application/x-www-form-urlencoded")],
)
@pytest.mark.parametrize("length", ["content-length: 10\r\n\r\n12", "transfer-encoding: chunked\r\n\r\n1\r\nx\r\n"])
def test_a_body_that_does_not_come_is_a_problem_and_its_place_is_free(
    start: Callable[..., Started], path: str, media_type: str, length: str
) -> None:
    """Read by the route or by the framework, of a told length or not; the connection ends with it."""
    app, url = start(max_concurrent=1)
    with connected(url) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {media_type}\r\n{length}"
        connection.sendall(head.encode())
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in said
    assert b'"retryable":true' in said
    assert b"connection: close" in said.lower()
    assert app.state.service.limits.under_way == 0
    assert httpx.post(f"{url}/echo", content=b"quick").json() == 5


@pytest.mark.parametrize(
    ("asked_before", "sent"),
    [
        (False, b""),
        (False, b"GET /livez HTTP/1.1\r\nhost: 127.0"),
        (False, b"P"),
        (True, b"POST /echo HTTP/1.1\r\n"),
        (True, b"G"),
    ],
)
def test_a_connection_without_whole_headers_is_closed(
    start: Callable[..., Started], asked_before: bool, sent: bytes
) -> None:
    """From its beginning, and after an answer on it."""
    _, url = start()
    with connected(url) as connection:
        if asked_before:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            said = b""
            while not said.endswith(b"ok"):
                said += connection.recv(2**16)
        connection.sendall(sent)
        assert rest(connection) == b""


def test_whoever_waits_for_an_answer_is_not_cut_off(start: Callable[..., Started]) -> None:
    """For the beginning of one, or for the rest of one that streams, for longer than a request may take."""
    app, url = start()
    app.state.waiting, app.state.go_on = threading.Event(), threading.Event()
    with connected(url) as waits, connected(url) as streams, connected(url) as says_nothing:
        waits.sendall(b"GET /wait HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        streams.sendall(b"GET /stream HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        assert app.state.waiting.wait(PATIENCE_S)
        said = b""
        while b"begun" not in said:
            said += streams.recv(2**16)
        assert rest(says_nothing) == b""
        with connected(url) as another:  # another time as long has passed since both were sent
            assert rest(another) == b""
        app.state.go_on.set()
        assert rest(waits).startswith(b"HTTP/1.1 200 ")
        assert httpx.get(f"{url}/end").status_code == 200
        assert b" and ended" in rest(streams)


def test_a_body_in_pieces_is_read_while_they_come_in_time(start: Callable[..., Started]) -> None:
    """A bound of the whole, not of each piece: within it, as slow as one likes."""
    _, url = start(request_s=PATIENCE_S)

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 10

    assert httpx.post(f"{url}/echo", content=pieces()).json() == 200
