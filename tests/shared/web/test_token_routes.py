"""Tokens over HTTP: made, shown once, listed, revoked, by an administrator of everything and by nobody else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from logitlake_shared.web.tokens import TokenStore

Service = Callable[..., tuple[Any, str]]


def bearer(text: str) -> dict[str, str]:
    """The header that shows a token."""
    return {"Authorization": f"Bearer {text}"}


def test_a_token_is_made_used_listed_and_revoked(service: Service, tmp_path: Path) -> None:
    """Its text is in one answer; a revoked one opens nothing; twice is fine."""
    tokens = TokenStore(tmp_path / "tokens.sqlite")
    admin = bearer(tokens.create("root", "admin")[0])
    _, url = service(tokens=tmp_path / "tokens.sqlite")
    with httpx.Client(base_url=url) as client:
        made = client.post("/v1/tokens", json={"name": "ada", "caches": ["team-*"]}, headers=admin)
        assert made.status_code == 201
        ada = bearer(made.json()["token"])
        assert client.get("/caches/team-a", headers=ada).status_code == 200
        assert client.get("/caches/other", headers=ada).status_code == 404
        listed = client.get("/v1/tokens", headers=admin)
        assert [token["name"] for token in listed.json()] == ["root", "ada"]
        assert made.json()["token"] not in listed.text
        for _ in range(2):
            assert client.delete(f"/v1/tokens/{made.json()['id']}", headers=admin).status_code == 204
        assert client.get("/caches/team-a", headers=ada).status_code == 401
        assert client.delete("/v1/tokens/tok_x", headers=admin).status_code == 404
        for wrong in ({"name": ""}, {"name": "x", "scope": "root"}, {"name": "x", "caches": []}, {"name": "x", "a": 1}):
            assert client.post("/v1/tokens", json=wrong, headers=admin).status_code == 422


def test_nobody_else_may(service: Service, tmp_path: Path) -> None:
    """Not a smaller scope, not an administrator of some caches, not without a token."""
    tokens = TokenStore(tmp_path / "tokens.sqlite")
    others = [tokens.create(scope, scope, caches)[0] for scope, caches in (("submit", ("*",)), ("admin", ("team-*",)))]  # type: ignore[arg-type]
    _, url = service(tokens=tmp_path / "tokens.sqlite")
    with httpx.Client(base_url=url) as client:
        for headers, status in ((bearer(others[0]), 403), (bearer(others[1]), 403), ({}, 401)):
            assert client.get("/v1/tokens", headers=headers).status_code == status
            assert client.post("/v1/tokens", json={"name": "x"}, headers=headers).status_code == status
            assert client.delete("/v1/tokens/tok_x", headers=headers).status_code == status


def test_a_service_without_a_file_of_tokens_has_none(service: Service) -> None:
    """No route."""
    _, url = service()
    assert httpx.get(f"{url}/v1/tokens").status_code == 404
