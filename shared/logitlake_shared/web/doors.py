"""Who is asking, and what they may do. One function decides: `Principal.require`.

A service without tokens is for this machine alone: it listens on loopback and nowhere else, and who asks may do
everything. From the first token on, who has none may do nothing. What a token does not cover is not there: a foreign
cache is `not_found`, never `forbidden`, so that names do not leak; `forbidden` only tells of a scope.
"""

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from logitlake_shared.errors import ConfigError
from logitlake_shared.web.problems import Problem
from logitlake_shared.web.sessions import COOKIE, is_from_elsewhere, is_from_here
from logitlake_shared.web.tokens import SCOPES, Token, TokenScope, TokenStore

__all__ = ["Asking", "Door", "Principal", "check_listening", "principal_of", "unauthenticated"]

_SAFE_METHODS = frozenset({"GET", "HEAD"})
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})


@dataclass(frozen=True)
class Principal:
    """Whoever makes a request."""

    token: Token | None
    """none for this machine's own user, while the service has no tokens"""
    tokens: TokenStore | None = field(default=None, repr=False, compare=False)
    """those of the service"""

    @property
    def id(self) -> str:
        """For logs, limits and records."""
        return "local" if self.token is None else self.token.id

    def is_let_in(self) -> bool:
        """Whether they still are: a token expires, or is revoked, while an answer goes on."""
        if self.tokens is None:
            return True
        return self.tokens.is_empty() if self.token is None else self.tokens.is_valid(self.token.id)

    def sees(self, cache: str) -> bool:
        """Whether a cache is there for them."""
        return self.token is None or self.token.covers(cache)

    @property
    def sees_all(self) -> bool:
        """Whether what tells of every cache is for them."""
        return self.token is None or self.token.covers_all

    def require(self, scope: TokenScope, cache: str | None = None) -> None:
        """Raises `Problem` `not_found` for a cache that is not theirs, `forbidden` for more than their scope."""
        if cache is not None and not self.sees(cache):
            raise Problem("not_found", f"no cache {cache!r}")
        if self.token is not None and not self.may(scope):
            raise Problem("forbidden", f"this needs a token of scope `{scope}`, yours is of scope `{self.token.scope}`")

    def may(self, scope: TokenScope) -> bool:
        """Whether their scope is as much as this."""
        return self.token is None or SCOPES.index(self.token.scope) >= SCOPES.index(scope)


class Door:
    """Lets requests in, or not."""

    def __init__(self, tokens: TokenStore | None, host_names: frozenset[str]) -> None:
        self._tokens, self._host_names = tokens, frozenset(map(str.lower, host_names))

    def admit(self, connection: HTTPConnection) -> Principal:
        """Whoever asks. Raises `Problem` `misdirected` or `unauthenticated`.

        Without tokens the host that was asked for must be this machine: a page of somebody else's, whose name was made
        to resolve to 127.0.0.1, is not let in; nor may one that says where it comes from change anything.
        """
        asked = connection.headers.get("host", "").lower()
        host = asked.rpartition(":")[0] or asked
        changes = connection.scope.get("method") not in _SAFE_METHODS
        is_local = self._tokens is None or self._tokens.is_empty()
        known = self._host_names | _LOOPBACK_NAMES if is_local else self._host_names
        if (is_local or self._host_names) and host not in known:
            raise Problem(
                "misdirected", f"this service does not answer to {host!r}; `host_names` lists what it does to"
            )
        if is_local:
            if changes and is_from_elsewhere(connection):
                raise _other_site()
            return Principal(None, self._tokens)
        assert self._tokens is not None
        kind, _, text = connection.headers.get("authorization", "").partition(" ")
        if not kind and (text := connection.cookies.get(COOKIE, "")):
            if changes and not is_from_here(connection):
                raise _other_site()
            kind = "bearer"
        token = self._tokens.find(text.strip()) if kind.lower() == "bearer" else None
        if token is None:
            raise unauthenticated()
        return Principal(token, self._tokens)


def unauthenticated() -> Problem:
    """The answer to whoever has no valid token, or has none any more."""
    return Problem("unauthenticated", "no valid token was sent", headers={"WWW-Authenticate": "Bearer"})


def _other_site() -> Problem:
    return Problem("forbidden", "a page of another site made this request")


def principal_of(request: HTTPConnection) -> Principal:
    """Whoever made a request that was let in."""
    principal: Principal = request.state.principal
    return principal


Asking = Annotated[Principal, Depends(principal_of)]
"""the parameter of a route: whoever asks"""


def check_listening(host: str, tokens: TokenStore | None, tokens_path: Path | None) -> None:
    """Raises `ConfigError` where a service without tokens would listen to more than this machine."""
    if host == "localhost":
        return
    try:
        is_loopback = ip_address(host.strip("[]")).is_loopback
    except ValueError:
        raise ConfigError(f"host: expected an address or localhost, got {host!r}") from None
    if not is_loopback and (tokens is None or tokens.is_empty()):
        where = "set `tokens` to a file, and make one" if tokens_path is None else f"make one in {tokens_path}"
        raise ConfigError(
            f"host: {host} is open to other machines and the service has no tokens; {where} with "
            "`logitlake-teacher token create NAME`, or listen on 127.0.0.1"
        )
