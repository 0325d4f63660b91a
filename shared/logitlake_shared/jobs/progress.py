"""What a running command says of itself, for whoever started it: lines in its log.

A command calls `say` where it has something to tell; without LOGITLAKE_PROGRESS in its environment that is nothing.
With it, a line of JSON behind a mark goes to standard error. The log is the one thing that every place where commands
run hands back (a file here, an HTTP route of a Ray cluster there), and whoever reads it from the start, in whatever
pieces, hears everything once.

Said so far: `phase` (validating, running, finalizing); `counts` (`total` items of the work, how many are `committed`,
whoever did them, how many of those `failed` or are `quarantined`, and by code their `errors`); `figures`, for people;
`measured`, for sums over many attempts (`jobs.measured`); `result`; `fault`. A log is text, and anybody may have
written it: what cannot be meant so is not heard, and what is heard can be told again in strict JSON: no NaN, no half of
a character, no abyss.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from logitlake_shared.errors import LogitLakeError
from logitlake_shared.jobs.measured import sound

__all__ = ["MARK", "PHASES", "VARIABLE", "faults_told", "is_heard", "parse_lines", "say", "say_sometimes"]

VARIABLE = "LOGITLAKE_PROGRESS"
MARK = b"@progress "
"""how such a line begins"""
PHASES = ("validating", "running", "finalizing")
_COUNTS = ("total", "committed", "failed", "quarantined")
_EVERY_S = 1.0
# Counts above this are none, and objects that lie deeper are not heard.
_MOST = 2**63
_DEEPEST = 32

_last_said = 0.0
_waiting: dict[str, Any] = {}
"""facts to be told soon"""
_lock = threading.Lock()


def is_heard() -> bool:
    """Whether anybody wants to hear anything."""
    return VARIABLE in os.environ


def say(**facts: Any) -> None:
    """Tells these facts, if anybody wants to hear them; and those that wait to be told, where they are not the same."""
    global _last_said
    if is_heard():
        with _lock:
            facts = _waiting | facts
            _waiting.clear()
            _last_said = time.monotonic()
            # One write: lines of processes that share the log stay whole.
            sys.stderr.write(f"{MARK.decode()}{json.dumps(facts, default=str)}\n")
            sys.stderr.flush()


def say_sometimes(**facts: Any) -> None:
    """Tells facts that the next ones replace: at most once a second, and the last of them not much later than that."""
    wait_s = _last_said + _EVERY_S - time.monotonic()
    if wait_s <= 0:
        say(**facts)
    elif is_heard():
        with _lock:
            is_first = not _waiting
            _waiting.update(facts)
        if is_first:
            timer = threading.Timer(wait_s, _say_what_waits)
            timer.daemon = True
            timer.start()


def _say_what_waits() -> None:
    if _waiting:
        say()


@contextmanager
def faults_told() -> Iterator[None]:
    """Around a command: an error that ends it is told, and what waits to be."""
    try:
        yield
    except LogitLakeError as error:
        say(fault={"error": type(error).__name__, "message": str(error)})
        raise
    except Exception as error:
        say(fault={"error": "Crashed", "message": f"{type(error).__name__}: {error}"})
        raise
    finally:
        _say_what_waits()


def parse_lines(data: bytes) -> tuple[list[Mapping[str, Any]], int]:
    """What the whole lines of a piece of a log tell, and the bytes up to the end of the last of them."""
    whole = data.rfind(b"\n") + 1
    said: list[Mapping[str, Any]] = []
    for line in data[:whole].splitlines():
        if line.startswith(MARK):
            try:
                said.append(_meant(json.loads(line[len(MARK) :])))
            except (ValueError, RecursionError):
                continue  # two processes wrote at once: the next line tells it anew
    return said, whole


def _meant(line: object) -> dict[str, Any]:
    if not isinstance(line, dict):
        return {}
    told = {name: _plain(line[name], _DEEPEST) for name in _FACTS if name in line}
    facts = {name: value for name, value in told.items() if _FACTS[name](value)}
    return facts | ({"measured": sound(facts["measured"])} if "measured" in facts else {})


def _plain(value: Any, deepest: int) -> Any:
    """The value as strict JSON in UTF-8 can have it; None for what it cannot."""
    match value:
        case str():
            return value.encode(errors="replace").decode()
        case float():
            return value if math.isfinite(value) else None
        case dict() | list() if not deepest:
            return None
        case dict():
            return {_plain(name, 0): _plain(inner, deepest - 1) for name, inner in value.items()}
        case list():
            return [_plain(inner, deepest - 1) for inner in value]
    return value


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _are_counts(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(errors := value.get("errors", {}), dict):
        return False
    return all(type(count) is int and 0 <= count < _MOST for count in (*map(value.get, _COUNTS), *errors.values()))


def _is_fault(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("error", "message"))


_FACTS: Mapping[str, Callable[[object], bool]] = {
    "phase": PHASES.__contains__,
    "counts": _are_counts,
    "figures": _is_object,
    "measured": _is_object,
    "result": _is_object,
    "fault": _is_fault,
}
"""what a line may say, and whether a value can be meant"""
