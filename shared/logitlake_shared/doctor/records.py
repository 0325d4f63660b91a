"""One check: what was looked at, how it is, what was found and what to do about it."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["STATUSES", "Check", "Status", "blocked", "ok", "warn"]

Status = Literal["ok", "warn", "blocked"]
STATUSES: tuple[Status, ...] = get_args(Status)
"""from good to bad"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    """what was found"""
    advice: str = ""
    """what to do; empty where there is nothing to do"""


def ok(name: str, detail: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", detail)


def warn(name: str, detail: str, advice: str) -> Check:
    """The work can be done, but something costs time, is missing for a part of it, or was not to be found out."""
    return Check(name, "warn", detail, advice)


def blocked(name: str, detail: str, advice: str) -> Check:
    """The work cannot be done, or must not be begun like this."""
    return Check(name, "blocked", detail, advice)
