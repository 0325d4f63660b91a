"""Pages: one environment of Jinja's that escapes everything, one look, and errors as pages for browsers.

A service adds its own templates to the shared ones (`base`, `login`, `problem`). Nothing is fetched from elsewhere and
nothing runs in the browser: a page is whole when it is there.
"""

import math
from functools import lru_cache
from typing import Any

import jinja2
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse

from logitlake_shared.web.problems import CODES, Problem, scrubbed

__all__ = ["environment", "problem_page", "render", "wants_page"]

_SHARED = "logitlake_shared.web"


@lru_cache
def environment(package: str | None = None) -> jinja2.Environment:
    """The templates of a service's package, before the shared ones."""
    loaders = [jinja2.PackageLoader(name) for name in (package, _SHARED) if name is not None]
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made.filters |= {"number": _number, "size": _size}
    return made


def render(
    connection: HTTPConnection, template: str, *, package: str | None = None, status: int = 200, **values: Any
) -> HTMLResponse:
    """The page of a template of `package`. `principal`, `title_of_service` and `here` are there in every one."""
    page = environment(package).get_template(f"{template}.html.jinja")
    shared = {
        "principal": getattr(connection.state, "principal", None),
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
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if math.isfinite(value) else str(value)


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
