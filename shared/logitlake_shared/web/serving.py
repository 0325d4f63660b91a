"""The process of a service: where it may listen, what it says, how it ends.

On SIGTERM or Ctrl-C `/readyz` turns to 503 at once, so that nobody sends more; requests under way have `drain_s` to
end; then the process ends. A second signal ends it at once.
"""

import asyncio
import socket
from types import FrameType

import click
import uvicorn
from fastapi import FastAPI

from logitlake_shared.errors import ConfigError
from logitlake_shared.web.app import Service
from logitlake_shared.web.connections import bounded_protocol
from logitlake_shared.web.doors import check_listening
from logitlake_shared.web.logs import log_to

__all__ = ["serve"]


class _Server(uvicorn.Server):
    """uvicorn's, which tells the service of its end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # uvicorn knows a second Ctrl-C alone, and goes on waiting for connections
            asyncio.get_running_loop().call_soon_threadsafe(self._hang_up)
        self._service.begin_ending()
        super().handle_exit(sig, frame)

    def _hang_up(self) -> None:
        """Ends what is under way."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        for task in self.server_state.tasks:
            task.cancel()


def serve(app: FastAPI) -> None:
    """Serves the application until it is asked to end. Raises `ConfigError` where it may not or cannot listen."""
    service: Service = app.state.service
    settings = service.settings
    check_listening(settings.host, service.tokens, settings.tokens)
    listening = _listen(settings.host, settings.port)
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    is_open = service.tokens is None or service.tokens.is_empty()
    log_to()
    click.echo(f"{app.title} listens on http://{shown}:{port}" + (" (no tokens: this machine only)" if is_open else ""))
    config = uvicorn.Config(
        app,
        http=bounded_protocol(settings.request_s),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        # Behind a proxy its client's address is the proxy's: nothing here believes a header about it.
        proxy_headers=False,
    )
    _Server(config, service).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"host, port: cannot listen on {host}:{port}: {error.strerror}; choose another port"
        ) from error
    listening.listen(2048)
    return listening
