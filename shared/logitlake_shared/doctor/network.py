"""Who reaches what this machine offers, and what Ray lets them do.

Whoever reaches Ray's dashboard, its client port or its head runs code there: Ray trusts its network unless it is told
to ask for a token (`RAY_AUTH_MODE=token`, from 2.52 on). So what listens beyond loopback is looked up where the kernel
keeps it, `/proc/net/tcp` and `/proc/net/tcp6`: no package, no privilege, no connection. A listener is known by its
process where that may be seen, else by the port that it has by default.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

from logitlake_shared.doctor.records import Check, blocked, ok, warn

__all__ = ["Listener", "check_ports", "check_ray", "listeners", "network_checks", "parse_listeners"]

RAY_PORTS = {8265: "Ray's dashboard", 10001: "Ray's client port"}
OUR_PORTS = {8321: "a LogitLake service"}
# Parts of what a process is, the first that fits. Ray's head and nodes listen for each other, on ports that differ.
_RAY_PROCESSES = {
    "gcs_server": "Ray's head",
    "raylet": "a node of Ray",
    "ray.util.client.server": "Ray's client port",
    "ray/dashboard/": "Ray's dashboard",
    "ray::DashboardAgent": "Ray's agent",
}
_OUR_PROCESSES = {
    "logitlake-teacher": "a LogitLake service",
    "logitlake_teacher": "a LogitLake service",
    "logitlake-student": "a LogitLake service",
    "logitlake_student": "a LogitLake service",
}
# `python -u PROGRAM`, `python -m MODULE`: what follows are arguments, which may name anything.
_WORDS_OF_PROGRAM = 3
_LISTENS = "0A"
_AUTH_SINCE = (2, 52)


@dataclass(frozen=True)
class Listener:
    """A socket that takes connections."""

    address: IPv4Address | IPv6Address
    port: int
    command: str | None = None
    """of the process, where it may be seen"""
    asks_for_token: bool | None = None
    """of Ray's: whether the process was told to; None where it may not be seen"""

    @property
    def is_reachable(self) -> bool:
        """Whether other machines may reach it."""
        mapped = self.address.ipv4_mapped if isinstance(self.address, IPv6Address) else None
        return not (mapped or self.address).is_loopback

    def __str__(self) -> str:
        shown = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{shown}:{self.port}"


def network_checks() -> Iterator[Check]:
    """All of them, as they are on this machine."""
    try:
        ray: str | None = version("ray")
    except PackageNotFoundError:
        ray = None
    found = listeners()
    if found is None:
        yield warn("ports", "/proc/net/tcp cannot be read", "look with `ss -ltn` which ports are open to others")
    else:
        yield check_ports(found, os.environ)
    yield check_ray(ray, os.environ)


def check_ports(
    found: Iterable[Listener],
    environment: Mapping[str, str],
    ray_ports: Mapping[int, str] = RAY_PORTS,
    our_ports: Mapping[int, str] = OUR_PORTS,
) -> Check:
    """Whether Ray, or a service of ours, listens to more than this machine."""
    rays: dict[str, list[Listener]] = {}
    ours: dict[str, list[Listener]] = {}
    for listener in found:
        if not listener.is_reachable:
            continue
        if name := _known(listener, _RAY_PROCESSES, ray_ports):
            rays.setdefault(name, []).append(listener)
        elif name := _known(listener, _OUR_PROCESSES, our_ports):
            ours.setdefault(name, []).append(listener)
    shown = f"open to other machines: {', '.join(f'{name} on {_some(where)}' for name, where in (rays | ours).items())}"
    by_default = _asks_for_tokens(environment)
    told = [
        by_default if one.asks_for_token is None else one.asks_for_token for where in rays.values() for one in where
    ]
    if not all(told):
        return blocked(
            "ports",
            f"{shown}; Ray asks for no token",
            "start Ray with RAY_AUTH_MODE=token, or with --dashboard-host=127.0.0.1 in a closed network: who reaches "
            "these ports runs code here",
        )
    if rays:
        return warn("ports", f"{shown}; Ray asks for a token", "close them to all but the cluster's own machines")
    if ours:
        return warn("ports", shown, "put a proxy with TLS before it: tokens travel over this port")
    return ok("ports", "neither Ray nor a service of ours is open to other machines")


def check_ray(installed: str | None, environment: Mapping[str, str]) -> Check:
    """Whether a cluster elsewhere asks for a token, and whether there is one to show."""
    address = environment.get("RAY_ADDRESS", "")
    if installed is None:
        if address:
            return blocked("ray cluster", f"RAY_ADDRESS is {address!r}, Ray not installed", "install ray[default]")
        return ok("ray cluster", "Ray is not installed: captures run with executor.type=inline")
    if _is_here(address):
        return ok("ray cluster", f"RAY_ADDRESS is {address}, this machine" if address else "a local one, with a token")
    numbers = re.findall(r"\d+", installed)[:2]
    if tuple(map(int, numbers)) < _AUTH_SINCE:
        return blocked(
            "ray cluster",
            f"{address}, and Ray {installed} cannot ask for a token",
            "install ray 2.52 or newer",
        )
    if not _asks_for_tokens(environment):
        mode = environment.get("RAY_AUTH_MODE", "not set")
        return warn(
            "ray cluster",
            f"{address}, RAY_AUTH_MODE is {mode}: whoever reaches the cluster runs code on it",
            "set RAY_AUTH_MODE=token on every node and here, or keep the cluster in a network of its own",
        )
    if not _has_token(environment):
        return blocked(
            "ray cluster",
            f"{address} asks for a token and there is none here",
            "set RAY_AUTH_TOKEN_PATH to the cluster's token, or RAY_AUTH_TOKEN",
        )
    return ok("ray cluster", f"{address}, with a token")


def listeners() -> list[Listener] | None:
    """The sockets of this machine that take connections; None where the kernel does not tell."""
    tables = [path for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.is_file()]
    if not tables:
        return None
    sockets = [one for path in tables for one in parse_listeners(path.read_text())]
    holders = _holders({inode for _, _, inode in sockets})
    return [Listener(address, port, *holders.get(inode, (None, None))) for address, port, inode in sockets]


def parse_listeners(table: str) -> Iterator[tuple[IPv4Address | IPv6Address, int, str]]:
    """Address, port and inode of each socket of a `/proc/net/tcp` table that takes connections."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTENS:
            digits, _, port = fields[1].partition(":")
            # Words of 32 bits in the machine's byte order, which on all that we know is the little-endian one.
            words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
            yield ip_address(b"".join(words)), int(port, 16), fields[9]


def _holders(inodes: set[str]) -> dict[str, tuple[str, bool]]:
    """Of each socket whose process may be looked at: the command line, and whether it was told to ask for tokens."""
    found: dict[str, tuple[str, bool]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        # Processes end and close files while they are looked at; others are somebody else's.
        with suppress(OSError):
            held = set()
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    held.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
            if held & inodes:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found |= dict.fromkeys(held & inodes, (command, _was_told(process)))
    return found


def _was_told(process: Path) -> bool:
    """Whether a process was started with `RAY_AUTH_MODE=token`; of its environment nothing else is looked at.

    Ray's agents write their name over theirs, so that of the node which started them counts, too.
    """
    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    for one in (process, process.parent / parent):
        with suppress(OSError):
            if b"RAY_AUTH_MODE=token" in (one / "environ").read_bytes().split(b"\0"):
                return True
    return False


def _known(listener: Listener, processes: Mapping[str, str], ports: Mapping[int, str]) -> str | None:
    program = " ".join((listener.command or "").split()[:_WORDS_OF_PROGRAM])
    return next((name for part, name in processes.items() if part in program), ports.get(listener.port))


def _some(listeners: Sequence[Listener]) -> str:
    more = f" and {len(listeners) - 1} more" if len(listeners) > 1 else ""
    return f"{listeners[0]}{more}"


def _asks_for_tokens(environment: Mapping[str, str]) -> bool:
    return environment.get("RAY_AUTH_MODE", "").lower() == "token"


def _has_token(environment: Mapping[str, str]) -> bool:
    if environment.get("RAY_AUTH_TOKEN"):
        return True
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    return Path(named or Path(environment.get("HOME", "/")) / ".ray" / "auth_token").is_file()


def _is_here(address: str) -> bool:
    """Whether a `RAY_ADDRESS` is this machine: none, `local`, `auto`, or a loopback one."""
    if address in ("", "local", "auto"):
        return True
    host = urlsplit(address if "://" in address else f"ray://{address}").hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
