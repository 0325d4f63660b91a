"""How much a service takes at once: bytes of a body, requests of one principal, requests of all. And how long a body
may take to come: who sends one byte by byte would keep a place for ever.

An answer that goes on for as long as somebody listens is a stream, counted by itself: a thousand who follow a job keep
nobody from asking.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope

from logitlake_shared.web.problems import Problem
from logitlake_shared.web.settings import ServiceSettings

__all__ = ["Limits", "becomes_stream"]

# At once, of what may be asked for in a minute.
_BURST = 0.1
# Principals that are remembered; one that is forgotten starts with a full bucket.
_MOST_PRINCIPALS = 10_000


class Limits:
    """One service's; used on its event loop alone."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._rate = settings.requests_per_minute / 60
        self._burst = max(1.0, settings.requests_per_minute * _BURST)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """of each principal: requests left, and when that was so"""
        self.under_way = 0
        """requests being answered"""
        self.streams = 0
        """answers that go on"""

    @contextmanager
    def request(self, principal: str) -> Iterator["Slot"]:
        """Around the answer to one request. Raises `Problem` `too_many_requests`."""
        if self.under_way >= self._settings.max_concurrent:
            raise _too_many(f"{self.under_way} requests are under way, `max_concurrent` is as many", 1.0)
        now = time.monotonic()
        left, since = self._buckets.pop(principal, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        self._buckets[principal] = (max(0.0, left - 1), now) if left >= 1 else (left, now)
        if len(self._buckets) > _MOST_PRINCIPALS:
            self._buckets.popitem(last=False)
        if left < 1:
            detail = f"more than {self._settings.requests_per_minute} requests a minute, {self._burst:.0f} at once"
            raise _too_many(detail, (1 - left) / self._rate)
        self.under_way += 1
        slot = Slot(self, self._settings.max_streams)
        try:
            yield slot
        finally:
            slot.free()

    def bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, of a body that is counted while it comes, and waited for no longer than `request_s`.

        Raises `Problem` `body_too_large`, at once where the request says so itself, and `request_timeout`. After the
        body it is the end of the connection that is waited for, which may take its time.
        """
        most, within_s = self._settings.max_body_bytes, self._settings.request_s
        told = Headers(scope=scope).get("content-length", "0")
        if told.isdecimal() and int(told) > most:
            raise _too_large(most)
        deadline = asyncio.get_running_loop().time() + within_s
        seen, is_whole = 0, False

        async def counted() -> Message:
            nonlocal seen, is_whole
            try:
                async with asyncio.timeout_at(None if is_whole else deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"{seen:,} bytes of the body came within {within_s:g} s, and not its end"
                # What still comes of it is nobody's request: the connection cannot be used again.
                raise Problem("request_timeout", detail, headers={"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if seen > most:
                raise _too_large(most)
            return message

        return counted


class Slot:
    """One answer's place among those under way."""

    def __init__(self, limits: Limits, max_streams: int) -> None:
        self._limits, self._max_streams, self._is_stream = limits, max_streams, False

    def becomes_stream(self) -> None:
        """Counts it among the streams. Raises `Problem` `too_many_requests`."""
        if self._limits.streams >= self._max_streams:
            raise _too_many(f"{self._limits.streams} streams are open, `max_streams` is as many", 5.0)
        self._limits.under_way -= 1
        self._limits.streams += 1
        self._is_stream = True

    def free(self) -> None:
        """Gives the place back."""
        if self._is_stream:
            self._limits.streams -= 1
        else:
            self._limits.under_way -= 1


def becomes_stream(connection: HTTPConnection) -> None:
    """Says of the answer to a request that it goes on; on the event loop. Raises `Problem` `too_many_requests`."""
    slot: Slot = connection.state.slot
    slot.becomes_stream()


def _too_large(most: int) -> Problem:
    return Problem("body_too_large", f"a body may have {most:,} bytes")


def _too_many(detail: str, wait_s: float) -> Problem:
    return Problem("too_many_requests", detail, headers={"Retry-After": str(max(1, round(wait_s + 0.5)))})
