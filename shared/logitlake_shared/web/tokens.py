"""Bearer tokens: made once, shown once, kept as their SHA-256.

A token is `llk_` + 43 characters of 256 random bits + `_` + 8 hex digits of a checksum, so that a scanner of secrets
finds a leaked one and a mistyped one is told from a revoked one without a look-up. Since they are random, a plain hash
is enough to keep; and since the hash is what is looked up, there is no comparison that time could tell of.

Kept in an SQLite file that only its owner reads, which several processes may open: what one revokes the others refuse.
"""

import hashlib
import json
import os
import re
import secrets
import sqlite3
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, get_args

from logitlake_shared.errors import ConfigError
from logitlake_shared.ids import new_id

__all__ = ["SCOPES", "Token", "TokenScope", "TokenStore", "without_tokens"]

TokenScope = Literal["read", "submit", "admin"]
SCOPES: tuple[TokenScope, ...] = get_args(TokenScope)
"""each may do what those before it may"""

_TOKEN = re.compile(r"llk_([A-Za-z0-9_-]{43})_([0-9a-f]{8})")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    id TEXT PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, name TEXT NOT NULL, scope TEXT NOT NULL, caches TEXT NOT NULL,
    created REAL NOT NULL, expires REAL, revoked REAL, last_used REAL
) STRICT
"""
_COLUMNS = "id, name, scope, caches, created, expires, revoked, last_used"
# When a token was last used is for people: once a minute is often enough to write it down.
_USED_EVERY_S = 60
# Whoever makes or revokes a token waits so long for others who do.
_PATIENCE_S = 30
_VALID = "revoked IS NULL AND coalesce(expires, 9e99) > ?"


@dataclass(frozen=True)
class Token:
    """What is kept of a token. Times are seconds since 1970."""

    id: str
    name: str
    scope: TokenScope
    caches: tuple[str, ...]
    """patterns of the names of the caches that it is for, e.g. `main`, `team-*`, `*`"""
    created: float
    expires: float | None
    revoked: float | None
    last_used: float | None

    def covers(self, cache: str) -> bool:
        """Whether it is for a cache of this name."""
        return any(fnmatchcase(cache, pattern) for pattern in self.caches)

    @property
    def covers_all(self) -> bool:
        """Whether it is for every cache there may ever be."""
        return "*" in self.caches


class TokenStore:
    """The tokens of a service, in the file `path`. May be used from several threads and processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path}: holds tokens and others may read it; `chmod 600 {path}`")
            self._connection().execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path}: cannot be opened as a file of tokens: {error}") from error

    def create(
        self, name: str, scope: TokenScope, caches: tuple[str, ...] = ("*",), expires_in_s: float | None = None
    ) -> tuple[str, Token]:
        """A new token: its text, which nobody can read again, and what is kept of it."""
        secret = secrets.token_urlsafe(32)
        text = f"llk_{secret}_{_checksum(secret)}"
        now = time.time()
        expires = None if expires_in_s is None else now + expires_in_s
        token = Token(new_id("tok"), name, scope, caches, now, expires, None, None)
        with self._connection() as connection:
            connection.execute(
                f"INSERT INTO tokens (sha256, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (_digest(text), token.id, name, scope, json.dumps(caches), now, expires, None, None),
            )
        return text, token

    def find(self, text: str) -> Token | None:
        """The token of this text, if it is valid now."""
        parts = _TOKEN.fullmatch(text)
        if parts is None or _checksum(parts[1]) != parts[2]:
            return None
        now = time.time()
        rows = self._select(f"WHERE sha256 = ? AND {_VALID}", _digest(text), now)
        if not rows:
            return None
        if now - (rows[0].last_used or 0) > _USED_EVERY_S:
            self._note_use(rows[0].id, now)
        return rows[0]

    def is_valid(self, token_id: str) -> bool:
        """Whether the token of this id is valid now."""
        return bool(self._select(f"WHERE id = ? AND {_VALID}", token_id, time.time()))

    def all(self) -> list[Token]:
        """Every token there ever was, the oldest first."""
        return self._select("ORDER BY id")

    def revoke(self, token_id: str) -> None:
        """Makes the token invalid; again is fine. Raises `ConfigError` when there is none of that id."""
        with self._connection() as connection:
            revoke = "UPDATE tokens SET revoked = coalesce(revoked, ?) WHERE id = ?"
            if not connection.execute(revoke, (time.time(), token_id)).rowcount:
                raise ConfigError(f"{self._path}: no token {token_id!r}; `token ls` lists them")

    def is_empty(self) -> bool:
        """Whether no token was ever made: then the service is for this machine alone."""
        return not self._connection().execute("SELECT 1 FROM tokens LIMIT 1").fetchall()

    def close(self) -> None:
        """Closes this thread's connection."""
        if (connection := getattr(self._local, "connection", None)) is not None:
            connection.close()
            self._local.connection = None

    def _note_use(self, token_id: str, now: float) -> None:
        """Writes down that a token was used, if that can be done at once.

        A full disk, or somebody who is writing, keeps nobody out and nobody waiting.
        """
        connection = self._connection()
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            with suppress(sqlite3.OperationalError), connection:
                connection.execute("UPDATE tokens SET last_used = ? WHERE id = ?", (now, token_id))
        finally:
            connection.execute(f"PRAGMA busy_timeout = {1000 * _PATIENCE_S}")

    def _select(self, condition: str, *values: object) -> list[Token]:
        rows = self._connection().execute(f"SELECT {_COLUMNS} FROM tokens {condition}", values).fetchall()
        return [Token(id_, name, scope, tuple(json.loads(caches)), *times) for id_, name, scope, caches, *times in rows]

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = sqlite3.connect(self._path, timeout=_PATIENCE_S)
            connection.execute("PRAGMA journal_mode = WAL")
        return connection


def without_tokens(text: str) -> str:
    """The text with whatever looks like a token left out, for logs and messages."""
    return _TOKEN.sub("llk_***", text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(secret: str) -> str:
    return f"{zlib.crc32(secret.encode()):08x}"
