"""`/v1/tokens`: who gets in, for those who may say so: a token of scope `admin` that covers every cache.

What the command line's `token` does, for operators who are elsewhere. A token's text is in one answer, once.
"""

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from logitlake_shared.errors import ConfigError
from logitlake_shared.web.doors import Asking, Principal
from logitlake_shared.web.problems import Problem
from logitlake_shared.web.tokens import TokenScope, TokenStore

__all__ = ["token_routes"]


class TokenRequest(BaseModel):
    """A token to be made."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(min_length=1, max_length=100, examples=["ada"])
    scope: TokenScope = Field(default="read", examples=["read"])
    caches: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field(
        default=["*"], min_length=1, max_length=100, examples=[["main", "team-*"]]
    )
    """patterns of what it covers: caches, with the student runs"""
    expires_in_s: float | None = Field(default=None, gt=0, le=1e9, examples=[86_400.0])
    """default: never"""


class TokenDocument(BaseModel):
    """What is kept of a token. Times are seconds since 1970."""

    model_config = ConfigDict(frozen=True, from_attributes=True, use_attribute_docstrings=True)

    id: str = Field(examples=["tok_01K0000000000000000000000"])
    name: str = Field(examples=["ada"])
    scope: TokenScope = Field(examples=["read"])
    caches: tuple[str, ...] = Field(examples=[("main", "team-*")])
    created: float = Field(examples=[1_790_000_000.0])
    expires: float | None = Field(examples=[None])
    revoked: float | None = Field(examples=[None])
    last_used: float | None = Field(examples=[None])


class NewTokenDocument(TokenDocument):
    """A token that was just made."""

    token: str = Field(examples=["llk_…"])
    """its text; nobody can read it again"""


def token_routes(tokens: TokenStore | None) -> APIRouter:
    """The routes, of a service that has a file of tokens."""
    router = APIRouter(prefix="/v1/tokens", tags=["operation"])
    if tokens is None:
        return router

    @router.get("")
    def list_tokens(asking: Asking) -> list[TokenDocument]:
        """Every token there ever was, the oldest first; never their texts."""
        _check(asking)
        return [TokenDocument.model_validate(token) for token in tokens.all()]

    @router.post("", status_code=201)
    def create(asking: Asking, wanted: TokenRequest) -> NewTokenDocument:
        """Make a token. With the first one, who has none is refused from then on."""
        _check(asking)
        text, made = tokens.create(wanted.name, wanted.scope, tuple(wanted.caches), wanted.expires_in_s)
        return NewTokenDocument(token=text, **vars(made))

    @router.delete("/{token_id}", status_code=204)
    def revoke(asking: Asking, token_id: Annotated[str, Path(max_length=100)]) -> Response:
        """Make a token invalid, at once and for good. Twice is fine."""
        _check(asking)
        try:
            tokens.revoke(token_id)
        except ConfigError:
            raise Problem("not_found", f"no token {token_id!r}") from None
        return Response(status_code=204)

    return router


def _check(asking: Principal) -> None:
    asking.require("admin")
    if not asking.sees_all:
        raise Problem("forbidden", "this needs a token that covers every cache")
