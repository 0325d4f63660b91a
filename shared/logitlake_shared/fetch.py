"""One image over https from a host that somebody allowed, and from nowhere else.

The address of an image comes with the data, so it is an attacker's to choose: what it must never do is make this
machine ask something inside its own network. Therefore:

* a host is allowed by name, or not at all; https on its usual port; no user, no address of numbers
* the name is resolved once, every answer must be a public address, and exactly the checked one is connected to,
  with the name only in TLS and in `Host`: an answer that changes afterwards changes nothing
* a redirect is refused, or (when allowed) is an address like any other and checked from the start
* no proxy and no cookie; of a body, as many bytes as allowed are read, and compressed ones not at all
* all attempts together have a time; an answer slower than allowed is given up

Every fault is an `ImageError` with a code. No message shows the query or the user of an address.
"""

import http.client
import io
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, cast
from urllib.parse import SplitResult, urljoin, urlsplit

from logitlake_shared.data_formats.image_refs import public_address
from logitlake_shared.errors import ImageError
from logitlake_shared.public_addresses import is_loopback, is_public

__all__ = ["FetchPolicy", "Fetcher", "Resolve"]

_MAX_URL = 8192
_MAX_HEAD_BYTES = 64 * 2**10
_READ_BYTES = 64 * 2**10
# A name, its last label with a letter: what looks like an address in any notation (2130706433, 0x7f.1) is none.
_HOST = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*(?=[a-z0-9-]*[a-z])(?!0x)[a-z0-9-]{1,63}")
# Everything that may stand in an address: printable ASCII, and none of the signs that clients read differently.
_URL = re.compile(r"[\x21\x23-\x3b\x3d\x3f-\x5b\x5d-\x5f\x61-\x7a\x7e]+")
_TYPES = ("application/octet-stream", "binary/octet-stream")
_TRY_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_GONE = frozenset((404, 410))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_BACKOFF_S = 0.2
_MAX_SHOWN = 200
_MAX_REASON = 300

Resolve = Callable[[str, int], Sequence[str]]
"""(host, port) -> its IP addresses. Raises `OSError`."""


@dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched and what it may cost."""

    allow_hosts: frozenset[str] = frozenset()
    """`images.example.org`, or `*.example.org` for every host below it; lower case"""
    max_bytes: int = 32 * 2**20
    timeout_s: float = 30.0
    """for all attempts at one image together"""
    min_bytes_per_s: int = 1024
    """averaged over windows of a sixth of `timeout_s`, from the first byte on"""
    attempts: int = 3
    max_redirects: int = 0
    allow_loopback: bool = False
    """for tests: also plain http, any port, and addresses of this machine; never in a configuration"""


class Fetcher:
    """Fetches by one policy; may be used from several threads."""

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        resolve: Resolve | None = None,
        wait: Callable[[float], None] = time.sleep,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._resolve = resolve or _resolve
        self._wait = wait
        self._given_tls = tls

    def __call__(self, url: str) -> bytes:
        """The body. Raises `ImageError`.

        `image_url_refused`, `image_missing`, `image_fetch_failed`, `image_fetch_timeout`, `image_too_large`,
        `image_format`.
        """
        deadline = time.monotonic() + self._policy.timeout_s
        for attempt in range(1, self._policy.attempts + 1):
            try:
                return self._follow(url, deadline)
            except _TryAgainError as error:
                pause = _BACKOFF_S * 2 ** (attempt - 1)
                if attempt == self._policy.attempts or time.monotonic() + pause >= deadline:
                    tries = f", {attempt} attempts" if attempt > 1 else ""
                    raise _error("image_fetch_failed", url, f"{error}{tries}") from error
                self._wait(pause)
        raise AssertionError("a policy has at least one attempt")

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        # Reading the system's certificates takes a while, and most captures fetch nothing.
        return self._given_tls or ssl.create_default_context()

    def _follow(self, url: str, deadline: float) -> bytes:
        for _ in range(self._policy.max_redirects + 1):
            answer = self._ask(url, deadline)
            if isinstance(answer, bytes):
                return answer
            try:
                target = urljoin(url, answer.location)  # it may be relative
            except ValueError as error:
                raise _error("image_url_refused", url, f"it redirects to what is no address: {error}") from error
            if not self._policy.max_redirects:
                _refuse(url, f"it redirects to {_shown(target)}; no redirect is followed")
            url = target
        _refuse(url, f"it redirects more than {self._policy.max_redirects} times")

    def _ask(self, url: str, deadline: float) -> "bytes | _Redirect":
        parts = self._allowed(url)
        host = str(parts.hostname)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = self._checked_address(url, host, port, deadline)
        connection: socket.socket | None = None
        try:
            connection = socket.create_connection((address, port), timeout=_left(deadline))
            if parts.scheme == "https":
                connection.settimeout(_left(deadline))
                connection = self._tls.wrap_socket(connection, server_hostname=host)
            connection.settimeout(_left(deadline))
            connection.sendall(_request(parts))
            cap = self._policy.max_bytes + _MAX_HEAD_BYTES
            stream = _Stream(connection, deadline, self._policy, cap)
            response = http.client.HTTPResponse(cast(socket.socket, stream), method="GET")
            response.begin()
            return self._body(url, response)
        except ImageError:
            raise
        except ssl.SSLCertVerificationError as error:
            why = f"the host cannot prove its name: {error.verify_message}"
            raise _error("image_fetch_failed", url, why) from error
        except (TimeoutError, _TooSlowError) as error:
            limits = f"at most {self._policy.timeout_s:g} s, at least {self._policy.min_bytes_per_s} bytes/s"
            raise _error("image_fetch_timeout", url, f"{error or 'no answer'}; {limits}") from error
        except _TooMuchError as error:
            raise _error("image_too_large", url, f"more than {self._policy.max_bytes} bytes come") from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a chunk of negative size
            raise _TryAgainError(f"{type(error).__name__}: {error}") from error
        finally:
            if connection is not None:
                connection.close()

    def _allowed(self, url: str) -> SplitResult:
        """The address in parts, if its form and its host are allowed."""
        policy = self._policy
        if len(url) > _MAX_URL or not _URL.fullmatch(url):
            _refuse(url, "an address is at most 8192 printable ASCII characters; write others as %xx or xn--…")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            _refuse(url, "its host or its port cannot be one")
        if parts.scheme != "https" and not (policy.allow_loopback and parts.scheme == "http"):
            _refuse(url, f"{parts.scheme or 'no'} scheme; only https is fetched")
        if parts.username is not None or parts.password is not None or "@" in parts.netloc:
            _refuse(url, "it names a user")
        if port not in (None, 443) and not policy.allow_loopback:
            _refuse(url, f"port {port}; only 443 is fetched from")
        host = parts.hostname or ""
        if not _HOST.fullmatch(host) or len(host) > 253:
            _refuse(url, "its host is not a name; addresses of numbers are not fetched from")
        parents = [f"*.{host[place + 1 :]}" for place, char in enumerate(host) if char == "."]
        if policy.allow_hosts.isdisjoint((host, *parents)):
            _refuse(url, f"host {host} is not in images.allow_hosts; add it there if its images are wanted")
        return parts

    def _checked_address(self, url: str, host: str, port: int, deadline: float) -> str:
        """The one address to connect to. Refuses the host if any of its addresses is not public."""
        try:
            addresses = _within(lambda: self._resolve(host, port), _left(deadline))
        except TimeoutError as error:
            raise _error("image_fetch_timeout", url, f"no answer about the name {host}") from error
        except (OSError, UnicodeError) as error:
            raise _TryAgainError(f"the name {host} has no address: {error}") from error
        if not addresses:
            raise _TryAgainError(f"the name {host} has no address")
        for address in addresses:
            if not (is_public(address) or (self._policy.allow_loopback and is_loopback(address))):
                _refuse(url, f"the name {host} stands for {address}, which is not an address of the public internet")
        return addresses[0]

    def _body(self, url: str, response: http.client.HTTPResponse) -> "bytes | _Redirect":
        status, max_bytes = response.status, self._policy.max_bytes
        location = response.getheader("Location")
        if status in _REDIRECTS and location is not None:
            return _Redirect(location)
        if status in _TRY_AGAIN:
            raise _TryAgainError(f"the host answers {status}")
        if status != 200:
            raise _error(
                "image_missing" if status in _GONE else "image_fetch_failed", url, f"the host answers {status}"
            )
        encoding = response.getheader("Content-Encoding", "identity").strip().lower()
        if encoding != "identity":
            raise _error("image_fetch_failed", url, f"the body is compressed ({encoding}), which was not asked for")
        kind = response.getheader("Content-Type", _TYPES[0]).partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind not in _TYPES:
            raise _error("image_format", url, f"the host says it is {kind}, expected an image")
        if response.length is not None and response.length > max_bytes:
            raise _error("image_too_large", url, f"{response.length} bytes, at most {max_bytes} are fetched")
        pieces, size = [], 0
        while piece := response.read(_READ_BYTES):
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                raise _TooMuchError
        if response.length:
            raise _TryAgainError(f"the body ends {response.length} bytes early")
        return b"".join(pieces)


class _TryAgainError(Exception):
    """A fault that may be gone the next time."""


class _TooSlowError(Exception):
    """Bytes come, but too few."""


class _TooMuchError(Exception):
    """More bytes come than are taken."""


@dataclass(frozen=True)
class _Redirect:
    location: str


class _Stream(io.RawIOBase):
    """What `http.client` reads from: a socket with a deadline, a least speed and a most size."""

    def __init__(self, connection: socket.socket, deadline: float, policy: FetchPolicy, max_bytes: int) -> None:
        super().__init__()
        self._connection, self._deadline, self._left = connection, deadline, max_bytes
        self._window_s = policy.timeout_s / 6
        self._window_bytes = policy.min_bytes_per_s * self._window_s
        # The first window begins with the first byte: a host may think before it answers.
        self._window_end = math.inf
        self._in_window = 0

    def makefile(self, mode: str) -> io.BufferedReader:
        """How `http.client` asks a socket for a file."""
        assert mode == "rb"
        return io.BufferedReader(self, _READ_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        now = time.monotonic()
        if now >= self._window_end:
            if self._in_window < self._window_bytes:
                raise _TooSlowError(f"{self._in_window} bytes in {self._window_s:g} s")
            self._in_window, self._window_end = 0, now + self._window_s
        # Silence is found out at the end of a window, not of the whole time.
        self._connection.settimeout(max(1e-3, min(self._window_end, self._deadline) - now))
        try:
            count = self._connection.recv_into(buffer)
        except TimeoutError:
            if time.monotonic() >= self._deadline:
                raise
            return self.readinto(buffer)
        if time.monotonic() >= self._deadline:
            raise TimeoutError("the time is over")
        if self._window_end == math.inf:
            self._window_end = time.monotonic() + self._window_s
        self._in_window += count
        self._left -= count
        if self._left < 0:
            raise _TooMuchError
        return count


def _refuse(url: str, why: str) -> NoReturn:
    raise _error("image_url_refused", url, why)


def _error(code: str, url: str, why: str) -> ImageError:
    """What is said of the host comes from the host: it is cut short, and no terminal obeys it."""
    return ImageError(f"{code}: {_shown(url)}: {_printable(why)[:_MAX_REASON]}")


def _shown(url: str) -> str:
    """The address for people, whatever it holds."""
    return _printable(public_address(url)[:_MAX_SHOWN])


def _printable(text: str) -> str:
    ascii_text = text.encode("ascii", "backslashreplace").decode()
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in ascii_text)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over")
    return left


def _request(parts: SplitResult) -> bytes:
    target = parts.path or "/"
    if parts.query:
        target += f"?{parts.query}"
    return (
        f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: logitlake\r\nAccept: image/*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    ).encode("ascii")


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _within(call: Callable[[], Sequence[str]], seconds: float) -> Sequence[str]:
    """The call's result. Raises `TimeoutError`: the system's resolver keeps its own time, so it is left behind."""
    results: list[Sequence[str]] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="resolver")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError("the name is not resolved in time")
    return results[0]
