"""A connection to Ray that leaves the process as it found it.

`RAY_ADDRESS` names a cluster; without it a local Ray of the wanted size is started and ended. Ray itself waits 100
seconds for a head that is not there, takes over SIGTERM, and, for a local cluster, turns token authentication on in
this process's environment and writes the token below HOME. Here an absent head is an error within seconds, signal
handlers and environment are put back, and a local cluster's token lives in memory, so that HOME may be unwritable.
"""

import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from logitlake_shared.errors import ConfigError, EngineError

__all__ = ["cluster_resources", "connected", "import_ray", "node_is_alive"]

_LOG = logging.getLogger(__name__)
# A head that is there accepts a connection in milliseconds; across continents, in one second.
_REACHABLE_S = 5.0
# Of all our local clusters in this process: Ray remembers the first token that it saw.
_LOCAL_TOKEN = secrets.token_hex(32)


def import_ray() -> Any:
    """The module. Raises `ConfigError` where it is not installed."""
    try:
        with _restored():
            import ray
    except ImportError as error:
        raise ConfigError(
            f"executor.type is 'ray', but Ray cannot be imported: {error}; install logitlake[teacher-hf], or use "
            "executor.type=inline"
        ) from error
    return ray


@contextmanager
def connected(num_cpus: int) -> Iterator[Any]:
    """The module `ray`, connected to the cluster of `RAY_ADDRESS`, or to a local one with `num_cpus` to hand out.

    Raises `ConfigError` if no cluster answers at the address, `EngineError` if a local one does not start.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
    with _restored():
        ray = import_ray()
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address:
            _join(ray, address, quiet)
        else:
            _start(ray, num_cpus, quiet)
    try:
        with _quiet(ray):
            yield ray
    finally:
        ray.shutdown()
        if not address:
            _forget_token(ray)


def cluster_resources(ray: Any) -> tuple[dict[str, float], dict[str, float]]:
    """What the biggest node has of each resource, and what is free in the whole cluster now."""
    biggest: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"]:
            for name, amount in node["Resources"].items():
                biggest[name] = max(amount, biggest.get(name, 0.0))
    return biggest, ray.available_resources()


def node_is_alive(ray: Any, node_id: str) -> bool:
    """Whether the cluster still counts the node in."""
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    try:
        ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, but this process cannot join a Ray cluster there: {error}; check the "
            "address, that both sides run one version of Ray and Python, and RAY_AUTH_TOKEN"
        ) from error


def _start(ray: Any, num_cpus: int, quiet: dict[str, Any]) -> None:
    # Only the token: Ray reads RAY_AUTH_MODE when it is imported, and sets it itself for a local cluster.
    os.environ.setdefault("RAY_AUTH_TOKEN", _LOCAL_TOKEN)
    try:
        ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, **quiet)
    except (ConnectionError, RuntimeError, TimeoutError, OSError, ray.exceptions.RayError) as error:
        raise EngineError(
            f"a local Ray cannot be started: {error}; see the logs below /tmp/ray/session_latest, or use "
            "executor.type=inline"
        ) from error


def _forget_token(ray: Any) -> None:
    """Makes Ray look for a token again: the next local cluster of this process, if it is not ours, has another."""
    loader: Any = getattr(ray._raylet, "AuthenticationTokenLoader", None)
    if hasattr(loader, "reset_cache"):
        loader.instance().reset_cache()


def _check_reachable(address: str) -> None:
    """Raises `ConfigError` unless something listens at `host:port` or `ray://host:port`; other forms are Ray's."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local") or not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHABLE_S).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there: {error}; check the address and that the "
            "head runs, or unset RAY_ADDRESS to start a local Ray"
        ) from error


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Sends to the log what Ray prints to stdout about dead workers, whatever it is told: a command's stdout is data.

    There is no option for it, and the function is Ray's own affair; if it goes, Ray prints again.
    """
    worker = ray._private.worker
    printing = getattr(worker, "print_to_stdstream", None)
    worker.print_to_stdstream = lambda data, *_, **__: _LOG.info("%s", "\n".join(data["lines"]))
    try:
        yield
    finally:
        worker.print_to_stdstream = printing


@contextmanager
def _restored() -> Iterator[None]:
    """Puts the environment and the signal handlers back that `ray.init` changes."""
    environment = dict(os.environ)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        # `signal.signal` works in the main thread only, and so does what Ray does to it.
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)
