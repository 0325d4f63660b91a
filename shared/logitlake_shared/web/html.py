"""Pages: one environment of Jinja's that escapes everything, one look, and errors as pages for browsers.

A service adds its own templates to the shared ones. Nothing is fetched from elsewhere, and a page is whole when it is
there; what changes while one looks (a job) is asked for anew by htmx, a fragment at a time.
"""

import math
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import jinja2
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse

from logitlake_shared.web.problems import CODES, Problem, scrubbed

__all__ = ["SCRIPT", "environment", "problem_page", "render", "wants_page"]

SCRIPT = "/static/htmx-2.0.8.min.js"
_SHARED = "logitlake_shared.web"


@lru_cache
def environment(package: str | None = None) -> jinja2.Environment:
    """The templates of a service's package, before the shared ones."""
    loaders = [jinja2.PackageLoader(name) for name in (package, _SHARED) if name is not None]
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made.filters |= {"nats": _nats, "number": _number, "size": _size, "span": _span, "utc": _utc, "when": _when}
    return made


def render(
    connection: HTTPConnection, template: str, *, package: str | None = None, status: int = 200, **values: Any
) -> HTMLResponse:
    """The page of a template of `package`. What `base` needs is there in every one."""
    page = environment(package).get_template(f"{template}.html.jinja")
    shared = {
        "principal": getattr(connection.state, "principal", None),
        "nav": connection.app.state.nav if "app" in connection.scope else {},
        "script": SCRIPT,
        "title_of_service": connection.app.title if "app" in connection.scope else "LogitLake",
        "here": connection.scope["path"],
    }
    return HTMLResponse(page.render(**shared, **values), status)


def wants_page(connection: HTTPConnection) -> bool:
    """Whether a browser asks, and not a program."""
    accepted = [part.partition(";")[0].strip() for part in connection.headers.get("accept", "").split(",")]
    return "text/html" in accepted and "application/json" not in accepted


def problem_page(problem: Problem, connection: HTTPConnection, request_id: str | None) -> HTMLResponse:
    """The error as a page."""
    code = CODES[problem.code]
    answer = render(
        connection, "problem", status=code.status, code=code, detail=scrubbed(problem.detail), request_id=request_id
    )
    answer.headers.update(problem.headers)
    return answer


def _number(value: Any) -> str:
    """A figure for people: thousands apart, four digits of what is no whole number, – for what is unknown."""
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{one} {name}" for name, one in value.items()) or "none"
    return str(value)


def _nats(value: float) -> str:
    """A logprob or a divergence, in a column of them: zero has no sign."""
    return f"{value:z.4f}"


def _size(num_bytes: int | None) -> str:
    """Bytes for people."""
    if num_bytes is None:
        return "–"
    amount, unit = float(num_bytes), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _when(seconds: float) -> str:
    """A time for people, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _span(seconds: float) -> str:
    """A span of time for people."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
