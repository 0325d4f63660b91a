"""A service with routes that go wrong in every way, to see what stands around them."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from tests.served import served

from logitlake_shared import errors
from logitlake_shared.web.app import make_app
from logitlake_shared.web.doors import Asking
from logitlake_shared.web.settings import ServiceSettings

CANARY = "canary-of-a-secret"


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int


class Square(Body):
    kind: Literal["a"]
    number: int = 0


class Wide(Square):
    kind: Literal["b"]  # type: ignore[assignment]  # the other one's tag
    width: int = 0


def odd_routes() -> APIRouter:
    router = APIRouter()

    @router.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @router.post("/body")
    def body(body: Body) -> int:
        return body.number

    @router.post("/bodies")
    def bodies(body: Body, parts: list[Annotated[Square | Wide, Field(discriminator="kind")]]) -> int:
        return body.number + len(parts)

    @router.get("/bug")
    def bug() -> None:
        raise RuntimeError(CANARY)

    @router.get("/fails/{name}")
    def fails(name: str) -> None:
        raise getattr(errors, name)("/home/somebody/lake/caches/main: it failed")

    @router.get("/wait")
    async def wait(request: Request) -> str:
        request.app.state.waiting.set()
        await asyncio.to_thread(request.app.state.go_on.wait, 30)
        return "done"

    @router.get("/caches/{cache}")
    def cache(cache: str, asking: Asking, scope: str = "read") -> str:
        asking.require(scope, cache)  # type: ignore[arg-type]
        return cache

    return router


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, str]]]:
    """`service(max_body_bytes=10)`: the application with these settings, and its address."""
    with ExitStack() as stack:

        def start(**settings: Any) -> tuple[Any, str]:
            app = make_app("test", ServiceSettings(**settings), [odd_routes()])
            return app, stack.enter_context(served(app))

        yield start
