"""`logitlake-teacher serve` and `token` as a user runs them."""

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from logitlake_shared.store import TOKEN_VARIABLE

TIMEOUT_S = 60
ROOT = Path(__file__).parents[3]


@contextmanager
def serving(folder: Path, *overrides: str, lake: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address."""
    config = folder / "serve.toml"
    config.write_text(f'lake = "{lake}"\n[service]\nport = 0\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "logitlake_teacher.cli", "serve", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listens on " in line, process.communicate(timeout=TIMEOUT_S)
        yield process, line.split("listens on ")[1].split()[0]
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def test_a_service_serves_until_it_is_asked_to_end(small_lake: Path, tmp_path: Path) -> None:
    """And ends well: exit code 0, every line of its log JSON."""
    with serving(tmp_path, lake=small_lake) as (process, url):
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert [cache["name"] for cache in httpx.get(f"{url}/v1/caches").json()["data"]] == ["main", "pairs"]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode in (0, -signal.SIGTERM)
    messages = [json.loads(line)["message"] for line in err.splitlines()]
    assert "GET /v1/caches" in messages


def test_a_second_signal_ends_a_service_that_waits(small_lake: Path, tmp_path: Path) -> None:
    """For a request whose body never comes, as long as it may take."""
    half = b"POST /v1/sql HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    waits = ("service.request_s=1000", "service.drain_s=1000")
    with (
        serving(tmp_path, *waits, lake=small_lake) as (process, url),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=TIMEOUT_S) as connection,
    ):
        connection.sendall(half)
        assert httpx.get(f"{url}/v1/caches").status_code == 200  # what came before it is being answered
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        for line in process.stderr:
            if json.loads(line)["message"].startswith("Waiting for connections"):
                break
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT_S)
    assert process.returncode in (0, -signal.SIGTERM)


def test_whoever_never_ends_a_request_is_hung_up_on(small_lake: Path, tmp_path: Path) -> None:
    """Half of the headers: closed without a word; half of a body: a problem."""
    half = b"POST /v1/sql HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 9\r\n"
    with serving(tmp_path, "service.request_s=0.3", lake=small_lake) as (_, url):
        port = int(url.rpartition(":")[2])
        for sent, expected in ((half, b""), (half + b"\r\n{", b"HTTP/1.1 408 ")):
            with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
                connection.sendall(sent)
                said = b""
                while data := connection.recv(2**16):
                    said += data
            assert said[: len(expected) or None] == expected


def test_the_lake_command_asks_a_service_with_a_token(
    small_lake: Path, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    """Made, shown once, used by `logitlake` from another process, listed, revoked."""
    file = tmp_path / "tokens.sqlite"
    made = json.loads(
        run_command("logitlake-teacher", "token", "create", "me", "--file", file, "--json", "--cache", "main").out
    )
    with serving(tmp_path, f"service.tokens={file}", lake=small_lake) as (_, url):
        command = [Path(sys.executable).with_name("logitlake"), "ls", f"{url}/v1/files", "-o", "json"]
        allowed = {**os.environ, TOKEN_VARIABLE: made["token"]}
        answer = subprocess.run(command, env=allowed, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout)["cache"] == "main"
        command[1:] = ["doctor", f"{url}/v1/files", "--tokens", str(file), "--json"]
        seen = subprocess.run(command, env=allowed, capture_output=True, text=True, timeout=TIMEOUT_S)
        checks = {check["name"]: check["status"] for check in json.loads(seen.stdout)["checks"]}
        assert checks["lake"] == checks["tokens"] == "ok"
        assert "write" not in checks  # a served lake is only read
        listed = run_command("logitlake-teacher", "token", "ls", "--file", file).out
        assert made["id"] in listed
        assert "read on main  valid, used" in listed
        assert made["token"] not in listed
        assert run_command("logitlake-teacher", "token", "revoke", made["id"], "--file", file).code == 0
        refused = httpx.get(f"{url}/v1/caches", headers={"authorization": f"Bearer {made['token']}"})
        assert refused.status_code == 401
    assert "revoked" in run_command("logitlake-teacher", "token", "ls", "--file", file).out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["service.host=0.0.0.0"], "is open to other machines"),
        (["lake=/nowhere/at/all"], "no such folder"),
        (["service.port=70000"], "port"),
        (["service.host=nonsense"], "expected an address"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    small_lake: Path, tmp_path: Path, overrides: list[str], message: str, run_command: Callable[..., Any]
) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(f'lake = "{small_lake}"\n')
    refused = run_command("logitlake-teacher", "serve", config, *overrides)
    assert refused.code == 2
    assert message in refused.err


def test_a_span_that_is_none_is_refused(tmp_path: Path, run_command: Callable[..., Any]) -> None:
    file = tmp_path / "t.sqlite"
    refused = run_command("logitlake-teacher", "token", "create", "me", "--file", file, "--expires", "soon")
    assert refused.code == 2
    assert "90d" in refused.err
    assert run_command("logitlake-teacher", "token", "ls", "--file", tmp_path / "none.sqlite").code == 2


def test_the_shipped_configuration_loads() -> None:
    from logitlake_teacher.config.serve import ServeConfig

    path = ROOT / "teacher_service" / "logitlake_teacher" / "configs" / "serve.toml"
    assert ServeConfig.model_validate(tomllib.loads(path.read_text())).service.port == 8321
