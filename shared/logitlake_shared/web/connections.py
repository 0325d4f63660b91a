"""Connections that say nothing, or never more than half of a request's headers, end.

uvicorn closes a connection that stays idle after an answer (`timeout_keep_alive`), and lets one that never asked
anything, or that sends its headers byte by byte, stay for ever: each is a file that the process has open. Here a timer
runs from the moment at which headers are awaited until they are there. What comes after them is the application's
(`limits`), and it is not touched.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["bounded_protocol"]


def bounded_protocol(seconds: float, base: Any = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """uvicorn's protocol, `base`, that closes a connection whose headers did not come within so many seconds."""

    class Bounded(base):  # type: ignore[misc]  # which of uvicorn's two it is shows when they are imported
        """One connection."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop()
            super().connection_lost(exc)

        def watch(self) -> None:
            """Starts the timer where headers are awaited, stops it where they are there."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop()
            elif self.timer is None:
                self.timer = self.loop.call_later(seconds, self.transport.close)

        def stop(self) -> None:
            """Stops the timer."""
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return Bounded
