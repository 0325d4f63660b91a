"""`logitlake-teacher serve` and `token`: a lake over HTTP, and who may see it."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from logitlake_shared.cli_support import config_command
from logitlake_shared.errors import ConfigError

if TYPE_CHECKING:
    from logitlake_shared.web.tokens import Token, TokenScope
    from logitlake_teacher.config.serve import ServeConfig

__all__ = ["serve", "token"]

_FILE = click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    default="tokens.sqlite",
    show_default=True,
    help="The service's `service.tokens`.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_SPAN = re.compile(r"(\d+)([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}


@click.command()
@config_command("logitlake_teacher.config.serve:ServeConfig")
def serve(config: ServeConfig) -> None:
    """Serve a lake over HTTP until SIGTERM: caches, samples, files. A student reads it as `lake = "http://…/v1/files"`."""
    try:
        from logitlake_shared.web.serving import serve as serve_app
        from logitlake_teacher.api.app import teacher_app
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve: {error.name} is not installed; pip install 'logitlake[serve]'") from None
    serve_app(teacher_app(config))


@click.group()
def token() -> None:
    """Tokens that open a service. With the first one, who has none is refused."""


@token.command()
@click.argument("name")
@_FILE
@_JSON
@click.option("--scope", type=click.Choice(["read", "submit", "admin"]), default="read", show_default=True)
@click.option("--cache", "caches", multiple=True, default=["*"], show_default=True, help="Name or pattern; repeatable.")
@click.option("--expires", metavar="SPAN", help="E.g. 12h or 90d.  [default: never]")
def create(
    name: str, file: Path, as_json: bool, scope: TokenScope, caches: tuple[str, ...], expires: str | None
) -> None:
    """Make a token called NAME. It is shown once; send it as `Authorization: Bearer TOKEN`, or set LOGITLAKE_TOKEN."""
    from logitlake_shared.web.tokens import TokenStore

    text, made = TokenStore(file).create(name, scope, tuple(caches), _seconds(expires))
    if as_json:
        click.echo(json.dumps({"token": text} | asdict(made)))
        return
    click.echo(text)
    click.echo(f"{made.id}: {scope} on {', '.join(made.caches)}; it cannot be shown again", err=True)


@token.command()
@_FILE
@_JSON
def ls(file: Path, as_json: bool) -> None:
    """List the tokens: names, scopes, when they were last used. Never the tokens."""
    from logitlake_shared.web.tokens import TokenStore

    if not file.is_file():
        raise ConfigError(f"{file}: no such file; `token create NAME --file {file}` makes it")
    for made in TokenStore(file).all():
        click.echo(json.dumps(asdict(made)) if as_json else _line(made))


@token.command()
@click.argument("token_id")
@_FILE
def revoke(token_id: str, file: Path) -> None:
    """Make the token of this id invalid, at once and for good."""
    from logitlake_shared.web.tokens import TokenStore

    TokenStore(file).revoke(token_id)
    click.echo(f"{token_id} is revoked")


def _line(made: Token) -> str:
    now = time.time()
    if made.revoked is not None:
        state = f"revoked {_day(made.revoked)}"
    elif made.expires is None:
        state = "valid"
    else:
        state = f"{'expired' if made.expires <= now else 'valid until'} {_day(made.expires)}"
    used = "never used" if made.last_used is None else f"used {_day(made.last_used)}"
    return f"{made.id}  {made.name}  {made.scope} on {','.join(made.caches)}  {state}, {used}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _seconds(span: str | None) -> float | None:
    if span is None:
        return None
    found = _SPAN.fullmatch(span)
    if found is None or not int(found[1]):
        raise ConfigError(
            f"--expires: expected a number of minutes, hours or days such as 90m, 12h or 90d, got {span!r}"
        )
    return int(found[1]) * _SECONDS[found[2]]
