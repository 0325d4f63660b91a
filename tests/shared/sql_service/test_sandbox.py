"""The kernel's part, alone: a process that tries everything, with DuckDB neither gated nor locked."""

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.shared.sql_service.conftest import VISIBLE
from tests.shared.sql_service.corpus import FILES

from logitlake_shared.catalog import Catalog
from logitlake_shared.errors import ConfigError, LogitLakeError
from logitlake_shared.lake import Lake
from logitlake_shared.sql_service import SqlLimits, SqlPool, SqlRequest, layers
from logitlake_shared.sql_service.process import _environment
from logitlake_shared.sql_service.sandbox import _AUDIT_ARCH, LAYERS, _program
from logitlake_shared.sql_service.syscalls import DENIED, NUMBERS

_WORKS = {
    "look at a descriptor",
    "read the manifest",
    "read its cache",
    "list its cache",
    "start a thread",
    "ask DuckDB",
}


@pytest.fixture(scope="module")
def said(lake: Path) -> dict[str, Any]:
    """What became of the prisoner's attempts."""
    prisoner = Path(__file__).with_name("prisoner.py")
    done = subprocess.run(
        [sys.executable, "-B", "-P", str(prisoner), str(lake), str(os.getpid()), json.dumps(FILES)],
        env=_environment(remote=False),
        cwd=lake,
        start_new_session=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout, done.stderr.decode()
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.usefixtures("untouched")
def test_nothing_gets_out(said: dict[str, Any]) -> None:
    """What a worker does works; every other attempt fails, and nothing in the lake or beside it changed."""
    attempts = said["attempts"]
    assert {name for name, outcome in attempts.items() if outcome == "done"} == _WORKS
    assert attempts["take memory"] == "MemoryError"
    assert {outcome for name, outcome in attempts.items() if name not in _WORKS | {"take memory"}} <= {
        "PermissionError",
        "OSError",
        "ValueError",
    }
    assert not Path("/tmp/stolen").exists()


def test_the_kernel_holds_what_the_gate_would_not(said: dict[str, Any]) -> None:
    """Statements that read or write files, run without any gate, reach no file but those of the caller's caches."""
    for sql, answer in said["answers"].items():
        assert "root:" not in answer, sql
        assert "hidden" not in answer or "hidden" in sql, sql
        if sql.startswith(("COPY", "WITH x AS (COPY", "EXPORT")) and "FROM" not in sql.split("TO")[0]:
            assert not answer.startswith("answered"), sql


def test_each_layer_says_what_it_is(said: dict[str, Any], lake: Path) -> None:
    """Every layer is told, active or with its reason; `layers` tells the same without a question."""
    assert tuple(layer["name"] for layer in said["layers"]) == LAYERS
    assert all(layer["detail"] for layer in said["layers"])
    told = {layer.name: layer.active for layer in layers(lake)}
    assert told == {layer["name"]: layer["active"] for layer in said["layers"]}
    # On any Linux that we support these need nothing.
    for name in ("session", "environment", "descriptors", "privileges", "limits", "calls"):
        assert told[name], name


def test_an_object_store_is_read_through_the_network() -> None:
    """There the network stays, and the layers say so."""
    told = {layer.name: layer for layer in layers("s3://bucket/lake")}
    assert not told["network"].active
    assert not told["files"].active
    assert "object store" in told["files"].detail
    assert told["calls"].active


def test_a_required_layer_that_is_missing_stops_every_question(lake: Path) -> None:
    """Without a layer that the operator requires nothing is answered, and the message names it."""
    missing = [layer.name for layer in layers(lake) if not layer.active]
    for name in [*missing, "moat"]:
        limits = SqlLimits(num_warm=1, required_layers=(name,))
        with SqlPool(lake, limits) as pool, pytest.raises(ConfigError, match=name):
            pool.run(SqlRequest("SELECT 1", VISIBLE))
    active = tuple(layer.name for layer in layers(lake) if layer.active)
    with SqlPool(lake, SqlLimits(num_warm=1, required_layers=active)) as pool:
        assert pool.run(SqlRequest("SELECT 1 AS x", VISIBLE)).read_all().to_pylist() == [{"x": 1}]


@pytest.mark.usefixtures("untouched")
def test_the_engine_holds_alone(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB as a catalog locks it, without gate and sandbox, reads and writes no file either."""
    monkeypatch.chdir(lake)
    with Catalog(Lake.open(lake), caches=VISIBLE) as catalog:
        for sql in FILES:
            try:
                rows = str(catalog._connection.execute(sql).fetchall())
            except Exception as error:
                rows = str(error)
            assert "root:" not in rows, sql


def test_the_environment_is_not_the_services(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret of this process reaches a worker of a local lake; one of an object store gets the store's own."""
    monkeypatch.setenv("SECRET_TOKEN", "canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    assert "canary" not in _environment(remote=False).values()
    assert [name for name, value in _environment(remote=True).items() if value == "canary"] == ["AWS_SECRET_ACCESS_KEY"]
    with SqlPool(lake, SqlLimits(num_warm=1)) as pool:
        pool.wait_ready()
        nursery, worker = pool.pids()
        assert b"canary" not in Path(f"/proc/{nursery}/environ").read_bytes()
        assert b"canary" not in Path(f"/proc/{worker}/environ").read_bytes()
        with pool.run(SqlRequest("SELECT * FROM range(1000000)", VISIBLE, max_rows=1_000_000)):
            held = [str(link.readlink()).partition(":")[0] for link in Path(f"/proc/{worker}/fd").iterdir()]
        assert held.count("pipe") == 2
        assert "socket" not in held
        assert {place for place in held if place.startswith("/")} <= {"/dev/null", *map(str, lake.rglob("*"))}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_the_one_that_was_meant(machine: str) -> None:
    """The filter's program, run by hand for both machines: what it refuses, and what it lets through."""
    denied, judged = DENIED[machine], NUMBERS[machine]
    program = _program(machine, list(denied.values()), judged)
    allow, refuse, unknown, kill = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000

    def ask(number: int, *arguments: int, machine: str = machine) -> int:
        data = struct.pack("=iIQ6Q", number, _AUDIT_ARCH[machine], 0, *arguments, *[0] * (6 - len(arguments)))
        place, value = 0, 0
        while True:
            code, if_true, if_false, constant = program[place]
            place += 1
            match code:
                case 0x20:
                    (value,) = struct.unpack_from("=I", data, constant)
                case 0x06:
                    return constant
                case _:
                    held = {0x15: value == constant, 0x45: bool(value & constant), 0x35: value >= constant}[code]
                    place += if_true if held else if_false

    assert {ask(number) for number in denied.values()} == {refuse}
    assert not set(denied.values()) & set(judged.values())
    untouched = set(range(460)) - set(denied.values()) - set(judged.values())
    assert {ask(number, 2**64 - 1, 2**64 - 1, 2**64 - 1) for number in untouched} == {allow}
    assert {ask(judged[name]) for name in ("clone3", "openat2")} == {unknown}
    assert [ask(judged["clone"], flags) for flags in (0x10000, 0x10000 | 0x100, 17, 0)] == [
        allow,
        allow,
        refuse,
        refuse,
    ]
    for name, before in (("open", 1), ("openat", 2)):
        if name in judged:
            flags = (os.O_RDONLY, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY, os.O_RDWR, os.O_WRONLY, os.O_CREAT)
            assert [ask(judged[name], *[0] * before, flag) for flag in flags] == [allow, allow, refuse, refuse, refuse]
    assert [ask(judged["tgkill"], pid) for pid in (os.getpid(), 1)] == [allow, refuse]
    assert [ask(judged["prlimit64"], 0, 0, new) for new in (0, 1, 1 << 32)] == [allow, refuse, refuse]
    assert [ask(judged["fcntl"], 0, command) for command in (3, 4, 8, 10, 15)] == [allow, allow, refuse, refuse, refuse]
    assert [ask(judged["ioctl"], 0, command) for command in (0x5401, 0x8901)] == [allow, refuse]
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[machine]
    assert ask(0, machine=other) == kill
    if machine == "x86_64":
        assert ask(0x40000000) == refuse


def test_messages_hold_no_paths(lake: Path, pool: SqlPool) -> None:
    """Where the lake lies is nobody's business: neither a damaged file nor a wrong question says it."""
    for caches, sql in ((("nowhere",), "SELECT 1"), (VISIBLE, "SELECT '/etc/passwd'::INT"), (VISIBLE, "SELECT x")):
        with pytest.raises(LogitLakeError) as failed:
            pool.run(SqlRequest(sql, caches)).read_all()
        assert str(lake) not in str(failed.value)
        assert "/etc/passwd" not in str(failed.value)
