"""A loopback HTTP proxy in front of an object store: it passes everything on, except what it was told to break."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit

__all__ = ["Breakage", "Proxy", "proxy_to"]

_NOT_PASSED_ON = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}
_ANSWERS = {
    503: b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    500: b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>",
    409: b"<Error><Code>ConditionalRequestConflict</Code><Message>Try again.</Message></Error>",
    403: b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
}


@dataclass
class Breakage:
    """What is done to requests of `method` whose path contains `part`: to the first `times` of them."""

    what: str
    """`503` and other codes: answered so, and not passed on; `cut before`: the connection ends and nothing was passed
    on; `cut after`: passed on, and the connection ends instead of the answer; `late 503`: passed on, answered 503;
    `short`: half of the answer's body, then the end"""
    method: str = "PUT"
    part: str = ""
    times: int = 1


@dataclass
class Proxy:
    """A running proxy: its address, what is to be broken, and what came through."""

    url: str
    broken: list[Breakage] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    """method, path and what was done to it"""
    _lock: Lock = field(default_factory=Lock)

    def breakage(self, method: str, path: str) -> str:
        """What is to be done to this request."""
        with self._lock:
            for one in self.broken:
                if one.times and one.method == method and one.part in path:
                    one.times -= 1
                    self.seen.append((method, path, one.what))
                    return one.what
            self.seen.append((method, path, ""))
            return ""


@contextmanager
def proxy_to(endpoint: str) -> Iterator[Proxy]:
    """A proxy on a free port of 127.0.0.1."""
    target = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: two would wait for each other's acknowledgement

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            what = proxy.breakage(self.command, self.path)
            if what == "cut before":
                self.close_connection = True
                return
            if what.isdigit():
                self.answer(int(what), {}, _ANSWERS[int(what)])
                return
            onward = http.client.HTTPConnection(target)
            onward.request(self.command, self.path, body, dict(self.headers))
            response = onward.getresponse()
            data = response.read()
            onward.close()
            if what == "cut after":
                self.close_connection = True
            elif what == "late 503":
                self.answer(503, {}, _ANSWERS[503])
            else:
                headers = {key: value for key, value in response.getheaders() if key.lower() not in _NOT_PASSED_ON}
                length = response.getheader("content-length") if self.command == "HEAD" else None
                self.answer(response.status, headers, data, length, half=what == "short")

        def answer(
            self, status: int, headers: dict[str, str], data: bytes, length: str | None = None, half: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("content-length", length or str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if half else data)
            self.close_connection |= half

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
