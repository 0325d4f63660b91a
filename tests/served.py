"""An ASGI application on 127.0.0.1, for tests that talk HTTP to it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

__all__ = ["served"]

_START_S = 30.0


@contextmanager
def served(app: Any, **settings: Any) -> Iterator[str]:
    """Its address, on a free port, while the context lasts. `settings` are uvicorn's."""
    started = threading.Event()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", **settings))
    startup = server.startup

    async def announce(*arguments: Any, **keywords: Any) -> None:
        await startup(*arguments, **keywords)
        started.set()

    server.startup = announce  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(_START_S)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_START_S)
