"""How a browser shows its token: a cookie that scripts cannot read and other sites cannot send.

The cookie holds the token itself, so there is no session to keep and none to forget when a token is revoked. A request
that changes something and comes with the cookie must come from a page of this service: browsers say so in
`Sec-Fetch-Site` or `Origin`.
"""

from functools import partial
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from starlette.requests import HTTPConnection
from starlette.responses import FileResponse, RedirectResponse, Response

from logitlake_shared.web.html import SCRIPT, render
from logitlake_shared.web.tokens import TokenStore

__all__ = ["COOKIE", "OPEN_PATHS", "is_from_elsewhere", "is_from_here", "session_routes"]

COOKIE = "logitlake_token"
_STATIC = {
    "/static/style.css": ("style.css", "text/css"),
    SCRIPT: ("htmx/htmx-2.0.8.min.js", "text/javascript"),
}
OPEN_PATHS = ("/login", *_STATIC)
_WEEK_S = 7 * 86400


def is_from_here(connection: HTTPConnection) -> bool:
    """Whether a browser says that one of this service's own pages made the request."""
    return _is_own(connection) is True


def is_from_elsewhere(connection: HTTPConnection) -> bool:
    """Whether a browser says that a page of another site made the request. What is no browser says nothing."""
    return _is_own(connection) is False


def _is_own(connection: HTTPConnection) -> bool | None:
    site = connection.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin, host = connection.headers.get("origin"), connection.headers.get("host")
    return None if origin is None else bool(host) and origin.partition("://")[2] == host


def session_routes(tokens: TokenStore | None) -> APIRouter:
    """Logging in and out, and the pages' looks."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _STATIC.items():
        router.add_api_route(path, partial(_static, name, media_type), response_class=FileResponse)

    @router.get("/login")
    def login(request: Request, then: Annotated[str, Query(max_length=2000)] = "/") -> Response:
        if tokens is None or tokens.is_empty():
            return RedirectResponse("/", 303)
        return render(request, "login", then=_local(then), refused=False)

    @router.post("/login")
    def enter(
        request: Request, token: Annotated[str, Form(max_length=200)], then: Annotated[str, Form(max_length=2000)] = "/"
    ) -> Response:
        if tokens is None or not is_from_here(request) or tokens.find(token.strip()) is None:
            return render(request, "login", status=401, then=_local(then), refused=True)
        answer = RedirectResponse(_local(then), 303)
        answer.set_cookie(
            COOKIE,
            token.strip(),
            max_age=_WEEK_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    @router.post("/logout")
    def leave() -> Response:
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(COOKIE)
        return answer

    return router


def _static(name: str, media_type: str) -> FileResponse:
    path = files("logitlake_shared.web") / "static" / name
    return FileResponse(str(path), media_type=media_type, headers={"Cache-Control": "max-age=300"})


def _local(path: str) -> str:
    """A path of this service; never another site's address."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"
