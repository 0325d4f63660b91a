"""All checks in the order in which they are shown, and the report of them."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from logitlake_shared.doctor.network import network_checks
from logitlake_shared.doctor.records import STATUSES, Check, Status, warn
from logitlake_shared.doctor.safety import safety_checks
from logitlake_shared.doctor.software import software_checks
from logitlake_shared.doctor.storage import storage_checks
from logitlake_shared.errors import LogitLakeError

__all__ = ["as_json", "as_line", "examine", "worst"]

_NAME_WIDTH = 12


def examine(lake: str | None, tokens: Path | None) -> Iterator[Check]:
    """Looks at this machine, at the storage of `lake` and at the file `tokens`, one check after the other."""
    themes: tuple[tuple[str, Callable[[], Iterable[Check]]], ...] = (
        ("software", software_checks),
        ("storage", lambda: storage_checks(lake)),
        ("network", network_checks),
        ("safety", lambda: safety_checks(lake, tokens)),
    )
    for name, checks in themes:
        try:
            yield from checks()
        except (LogitLakeError, OSError) as error:
            yield warn(name, f"not looked at to the end: {error}", "what follows in this part was not checked")


def worst(checks: Sequence[Check]) -> Status:
    """The worst of them."""
    return max((check.status for check in checks), key=STATUSES.index, default="ok")


def as_line(check: Check) -> str:
    """One check as a line of text, without its colour."""
    advice = f" → {check.advice}" if check.advice else ""
    return f"{check.status:<7}  {check.name:<{_NAME_WIDTH}}  {' '.join(check.detail.split())}{advice}"


def as_json(checks: Sequence[Check], lake: str | None) -> str:
    """The report as one object."""
    counts = {status: sum(check.status == status for check in checks) for status in STATUSES}
    return json.dumps(
        {"status": worst(checks), "lake": lake, "counts": counts, "checks": [asdict(check) for check in checks]}
    )
