"""`logitlake doctor`: every check both ways, with the real fault where one can be made."""

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from logitlake_shared.cli import cli
from logitlake_shared.doctor.examine import as_json, as_line, worst
from logitlake_shared.doctor.network import (
    Listener,
    check_ports,
    check_ray,
    listeners,
    parse_listeners,
)
from logitlake_shared.doctor.records import Check, blocked, ok, warn
from logitlake_shared.doctor.safety import check_open_files, check_sandbox, check_tokens, safety_checks
from logitlake_shared.doctor.software import (
    GpuFacts,
    Wanted,
    check_duckdb,
    check_gpu,
    check_library,
    check_package,
    check_python,
    check_system,
    software_checks,
)
from logitlake_shared.doctor.storage import (
    check_clock,
    check_create_once,
    check_durable,
    check_file_system,
    check_replace,
    check_space,
    check_write,
    storage_checks,
)
from logitlake_shared.errors import LakeError, QueryCrashedError
from logitlake_shared.sql_service import Layer
from logitlake_shared.sql_service.grammar import ENGINE_VERSION
from logitlake_shared.store import ObjectStore, memory_store, open_store
from logitlake_shared.web.tokens import TokenStore

NOBODY = 65534
NOW = 1_800_000_000.0
# As the driver of an H100 answers, and torch's CUDA beside it.
H100 = GpuFacts(("NVIDIA H100 80GB HBM3, 81559 MiB, 580.159.04, 9.0",), "13.0", None, "NVRM", "13.0")
RAYLET = "/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/y"
DRIVER = f"""case "$1" in
    --query*) echo "{H100.devices[0]}";;
    *) echo "| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |";;
esac"""
TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:2049 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0 0 10 0
   1: 0100007F:2049 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1 0 100 0 0 10 0
   2: 0100007F:2049 0100007F:E08A 06 00000000:00000000 03:00000E88 00000000     0        0 0 3 0
"""
TABLE_6 = """  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:2711 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 13 1 0
   1: 00000000000000000000000001000000:2711 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 14 1 0
   2: 0000000000000000FFFF00000100007F:2711 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 15 1 0
"""


def statuses(checks: Any) -> dict[str, str]:
    return {check.name: check.status for check in checks}


# ---- software ----


@pytest.mark.parametrize(
    ("check", "status", "said"),
    [
        (check_python((3, 11, 7)), "ok", "3.11.7"),
        (check_python((3, 10, 1)), "blocked", "3.11"),
        (check_system("Linux", "x86_64"), "ok", "Linux"),
        (check_system("Darwin", "arm64"), "warn", "Linux"),
        (check_system("Linux", "riscv64"), "warn", "seccomp"),
        (check_package("0.1.0"), "ok", "0.1.0"),
        (check_package(None), "warn", "not compared"),
        (check_duckdb(ENGINE_VERSION), "ok", ENGINE_VERSION),
        (check_duckdb("2.0.1"), "blocked", f"duckdb=={ENGINE_VERSION}"),
        (check_duckdb(None), "blocked", f"duckdb=={ENGINE_VERSION}"),
    ],
)
def test_python_system_and_duckdb(check: Check, status: str, said: str) -> None:
    assert check.status == status
    assert said in as_line(check)


@pytest.mark.parametrize(
    ("bounds", "installed", "fits"),
    [
        (">=2.13", "2.13.0+cpu", True),
        (">=2.13", "2.9.1", False),
        ("<3,>=2.55", "3.0", False),
        ("==0.32.0", "0.32", True),
        ("<0.34,>=0.32", "0.33.1rc1", True),
        ("", "1", True),
    ],
)
def test_versions_are_compared_as_numbers(bounds: str, installed: str, fits: bool) -> None:
    """2.9 is older than 2.13, and what follows the numbers is not looked at."""
    assert Wanted(None, bounds).takes(installed) is fits


def test_a_library_is_held_against_what_the_package_wants_of_it() -> None:
    """What fits no extra is of no use; what fits one of two is said; what only an extra wants may be missing."""
    wanted = [Wanted("teacher", ">=5.19,<6"), Wanted("student", ">=5.16,<6")]
    assert check_library("transformers", "5.20", wanted).status == "ok"
    some = check_library("transformers", "5.17", wanted)
    assert (some.status, some.advice) == ("warn", "pip install 'transformers>=5.19,<6'")
    assert "teacher wants" in some.detail
    assert check_library("transformers", "4.57", wanted).status == "blocked"
    assert check_library("transformers", None, wanted).status == "ok"
    assert check_library("pillow", None, [Wanted(None, ">=12.3")]).status == "blocked"
    assert check_library("pillow", "11.0", [Wanted(None, ">=12.3"), Wanted("x", ">=1")]).status == "blocked"


def test_this_environment_is_what_the_package_wants() -> None:
    """The suite runs in one: the bounds are read from the package's own metadata."""
    found = {check.name: check for check in software_checks()}
    assert {"python", "system", "duckdb", "pyarrow", "pillow", "torch", "transformers", "ray", "gpu"} <= found.keys()
    assert [check for check in found.values() if check.status == "blocked" and check.name != "gpu"] == []


@pytest.mark.parametrize(
    ("facts", "needs_gpu", "status", "said"),
    [
        (H100, True, "ok", "H100 80GB HBM3, 81559 MiB, 580.159.04, 9.0; CUDA to 13.0"),
        (GpuFacts(H100.devices, "12.8", None, None, "13.0"), False, "blocked", "torch is built for CUDA 13.0"),
        (GpuFacts(H100.devices, "13.0", None, None, "12.8"), False, "ok", "13.0"),
        (GpuFacts(), False, "ok", "none"),
        (GpuFacts(), True, "blocked", "vllm runs on GPUs"),
        (GpuFacts(error="Driver/library version mismatch"), False, "blocked", "mismatch"),
        (GpuFacts(kernel_module="580.1"), False, "warn", "nvidia-smi is not here"),
    ],
)
def test_gpus(facts: GpuFacts, needs_gpu: bool, status: str, said: str) -> None:
    check = check_gpu(facts, needs_gpu=needs_gpu)
    assert check.status == status
    assert said in check.detail


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        (
            'case "$1" in --q*) echo "A, 10 MiB, 1.0, 9.0";; *) echo "CUDA Version: 13.0";; esac',
            "ok",
            "CUDA to 13.0",
        ),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "blocked", "has failed"),
        ("exit 0", "blocked", "ended with 0"),
    ],
)
def test_what_the_driver_says_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: str, said: str
) -> None:
    """A program in the place of `nvidia-smi`, that answers as it does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (check,) = (check for check in software_checks() if check.name == "gpu")
    assert check.status == status
    assert said in check.detail


def test_nothing_heavy_is_imported() -> None:
    """A broken torch must not take the doctor with it."""
    code = (
        "import sys; from logitlake_shared.doctor.software import software_checks; list(software_checks());"
        "import logitlake_shared.doctor.examine;"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'duckdb') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- storage ----


def test_a_lake_in_a_folder_is_fine_and_left_as_it_was(small_lake: Path) -> None:
    before = sorted(small_lake.rglob("*"))
    found = list(storage_checks(str(small_lake)))
    names = ["lake", "write", "create once", "replace", "fsync", "file system", "space", "clock"]
    assert [check.name for check in found] == names
    assert [check for check in found if check.status == "blocked"] == []
    assert "2 caches" in found[0].detail
    assert "agrees with the storage and the newest commit" in found[-1].detail
    assert sorted(small_lake.rglob("*")) == before


def test_where_no_lake_is_yet_nothing_is_made(tmp_path: Path) -> None:
    """The nearest folder is tried; neither the lake nor a probe stays."""
    found = statuses(storage_checks(str(tmp_path / "some" / "lake")))
    assert found["write"] == found["create once"] == "ok"
    assert list(tmp_path.iterdir()) == []
    assert statuses(storage_checks(str(tmp_path)))["lake"] == "ok"


def test_a_file_is_no_place_for_a_lake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert statuses(storage_checks(str(tmp_path / "file")))["lake"] == "blocked"
    assert statuses(storage_checks(str(tmp_path / "file" / "lake")))["lake"] == "blocked"


def test_a_lake_of_another_format_is_refused(small_lake: Path) -> None:
    (small_lake / "lake.json").write_text('{"format_version": 99}')
    assert statuses(storage_checks(str(small_lake)))["lake"] == "blocked"


def test_a_folder_that_this_user_may_not_write_to() -> None:
    """Nothing stops root, so it becomes somebody else for a moment."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o555)
        with as_nobody():
            found = check_write(str(folder / "probe"), "probe")
        folder.chmod(0o755)
        assert check_write(str(folder / "probe"), "probe").status == "ok"
    assert found.status == "blocked"
    assert "Permission denied" in found.detail


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, where this process has them."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


class TwiceStore(ObjectStore):
    """A store that ignores conditional writes, as some S3 look-alikes do."""

    def __init__(self, *, in_turn: bool) -> None:
        self._of, self._in_turn = memory_store(), in_turn
        self.uri = "memory://twice"

    def put_new(self, name: str, data: bytes) -> bool:
        if self._in_turn or name.endswith("race"):
            self._of.overwrite(name, data)
            return True
        return self._of.put_new(name, data)

    def get(self, name: str) -> bytes | None:
        return self._of.get(name)


def test_a_store_that_gives_a_name_twice_is_blocked() -> None:
    assert check_create_once(memory_store(), "probe").status == "ok"
    assert "created twice" in check_create_once(TwiceStore(in_turn=True), "probe").detail
    found = check_create_once(TwiceStore(in_turn=False), "probe")
    assert (found.status, "8 writers at once 8 won" in found.detail) == ("blocked", True)


def refusing(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_file_system_without_hard_links_is_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT is, and some that are mounted over the network."""
    store = open_store(tmp_path)
    monkeypatch.setattr(os, "link", refusing)
    found = check_create_once(store, "probe")
    assert (found.status, "hard links" in found.advice) == ("blocked", True)


def test_renames_syncs_and_deletes_that_fail_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    assert check_replace(store, "probe").status == "ok"
    assert check_durable(tmp_path).status == "ok"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refusing)
        assert check_replace(store, "probe").status == "blocked"
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "delete", lambda *_: None)
        assert check_replace(store, "probe").status == "blocked"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refusing)
        assert check_durable(tmp_path).status == "blocked"
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", iter((0.0, 5.0)).__next__)
        assert check_durable(tmp_path).status == "warn"


def test_an_object_store_that_does_not_answer_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would try for minutes."""
    storage = import_module("logitlake_shared.doctor.storage")
    monkeypatch.setattr(storage, "_ANSWER_S", 0.1)
    monkeypatch.setattr(storage, "open_store", lambda _: time.sleep(2))
    found = check_write("s3://bucket/lake", "probe")
    assert (found.status, "no answer within" in found.detail) == ("blocked", True)


def test_a_served_lake_is_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens there: that is said, and nothing else is tried."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = statuses(storage_checks(f"http://127.0.0.1:{taken.getsockname()[1]}/v1/files"))
    assert found == {"lake": "blocked", "clock": "ok"}


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (check_file_system("ext4"), "ok"),
        (check_file_system("tmpfs"), "warn"),
        (check_file_system("overlay"), "warn"),
        (check_file_system(None), "warn"),
        (check_space(2**40), "ok"),
        (check_space(2**30), "warn"),
        (check_space(2**20), "blocked"),
        (check_clock(NOW), "ok"),
        (check_clock(NOW, NOW + 5, NOW - 1e6), "ok"),
        (check_clock(NOW, NOW - 120), "warn"),
        (check_clock(NOW, NOW + 3600), "blocked"),
        (check_clock(NOW, NOW, NOW + 120), "warn"),
        (check_clock(NOW, NOW, NOW + 86400), "blocked"),
        (check_clock(0.0), "blocked"),
    ],
)
def test_file_system_space_and_clock(check: Check, status: str) -> None:
    assert check.status == status


def test_a_commit_of_tomorrow_is_seen(small_lake: Path) -> None:
    """The newest commit record's own time, as the file system has it."""
    record = next(small_lake.glob("caches/main/commits/*"))
    tomorrow = time.time() + 86400
    os.utime(record, (tomorrow, tomorrow))
    (check,) = (check for check in storage_checks(str(small_lake)) if check.name == "clock")
    assert (check.status, "before the newest commit" in check.detail) == ("blocked", True)


def test_the_file_system_of_a_folder_is_the_innermost_mount() -> None:
    file_system = import_module("logitlake_shared.doctor.storage")._file_system
    mounts = [
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
        "28 27 0:25 / /mnt rw - tmpfs none rw",
        "29 27 0:26 / /mnt/mein\\040Gerät rw shared:1 - xfs /dev/vdb rw",
    ]
    for folder, kind in (("/a", "ext4"), ("/mnt/x", "tmpfs"), ("/mnt/mein Gerät/lake", "xfs"), ("/mnts", "ext4")):
        assert file_system(Path(folder), mounts) == kind
    assert file_system(Path("/a"), []) is None


# ---- network ----


def test_the_kernels_tables_are_read() -> None:
    """Listening sockets alone; words are in the machine's order."""
    found = [(str(address), port, inode) for address, port, inode in parse_listeners(TABLE)]
    assert found == [("0.0.0.0", 8265, "11"), ("127.0.0.1", 8265, "12")]
    found = [(address, port) for address, port, _ in parse_listeners(TABLE_6)]
    assert [address for address, _ in found] == [ip_address(text) for text in ("::", "::1", "::ffff:127.0.0.1")]
    assert {port for _, port in found} == {10001}
    reachable = [Listener(address, port).is_reachable for address, port, _ in parse_listeners(TABLE_6)]
    assert reachable == [True, False, False]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_a_socket_of_this_process_is_found(host: str) -> None:
    """A real one; open to others or not, and known by its port or its process."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        try:
            listening.bind((host, 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        listening.listen()
        port = listening.getsockname()[1]
        (mine,) = (one for one in listeners() or [] if one.port == port)
    assert mine.address == ip_address(host)
    assert mine.is_reachable is (host in ("0.0.0.0", "::"))
    # A process may call itself what it likes, and under pytest-xdist this one does.
    assert (mine.command or "").split() == Path("/proc/self/cmdline").read_text().replace("\0", " ").split()
    status = "blocked" if mine.is_reachable else "ok"
    assert check_ports([mine], {}, {port: "Ray's dashboard"}).status == status
    assert check_ports([mine], {}, {}).status == "ok"


def listener(address: str, port: int, command: str | None = None, asks: bool | None = None) -> Listener:
    return Listener(ip_address(address), port, command, asks)


@pytest.mark.parametrize(
    ("found", "mode", "status", "said"),
    [
        (listener("0.0.0.0", 8265), "", "blocked", "Ray's dashboard on 0.0.0.0:8265"),
        (listener("0.0.0.0", 8265), "token", "warn", "Ray's dashboard"),
        (listener("::", 10001), "disabled", "blocked", "Ray's client port on [::]:10001"),
        (listener("10.0.0.5", 44444, "/x/ray/core/src/ray/gcs/gcs_server --port=1"), "", "blocked", "Ray's head"),
        (listener("::", 44531, f"{RAYLET} --x=/ray/dashboard/y"), "", "blocked", "a node of Ray on [::]:44531"),
        (listener("::", 44531, RAYLET, asks=True), "", "warn", "Ray asks for a token"),
        (listener("::", 44531, RAYLET, asks=False), "token", "blocked", "Ray asks for no token"),
        (listener("::", 36463, "vi -n notes.txt gcs_server"), "", "ok", "neither"),
        (listener("127.0.0.1", 8265), "", "ok", "neither"),
        (listener("0.0.0.0", 8321), "", "warn", "a LogitLake service"),
        (listener("0.0.0.0", 9000, "python logitlake-teacher serve x.toml"), "", "warn", "a LogitLake service"),
        (listener("0.0.0.0", 9000, "python -m logitlake_teacher.cli serve x.toml"), "", "warn", "a LogitLake service"),
        (listener("0.0.0.0", 22), "", "ok", "neither"),
    ],
)
def test_ports_that_are_open_to_others(found: Listener, mode: str, status: str, said: str) -> None:
    check = check_ports([found], {"RAY_AUTH_MODE": mode})
    assert check.status == status
    assert said in check.detail


def test_of_many_ports_one_is_named() -> None:
    found = [listener("::", port, RAYLET) for port in (1, 2, 3)]
    assert "a node of Ray on [::]:1 and 2 more;" in check_ports(found, {}).detail


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_what_a_process_was_told_is_seen(mode: str) -> None:
    """A real one, that listens; and that of its child, which has no word of it left."""
    code = (
        "import os, socket, subprocess, sys\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "c = 'import socket; s = socket.socket(); s.bind((\"127.0.0.1\", 0)); s.listen();'\n"
        "c += 'print(s.getsockname()[1], flush=True); input()'\n"
        "print(s.getsockname()[1], flush=True)\n"
        "subprocess.run([sys.executable, '-c', c], env={}, check=False)\n"
    )
    environment = os.environ | {"RAY_AUTH_MODE": mode}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        assert process.stdout is not None
        ports = {int(process.stdout.readline()) for _ in range(2)}
        found = [one for one in listeners() or [] if one.port in ports]
        process.communicate("\n")
    assert [one.asks_for_token for one in found] == [mode == "token"] * 2


@pytest.mark.parametrize(
    ("installed", "environment", "status"),
    [
        (None, {}, "ok"),
        (None, {"RAY_ADDRESS": "head:6379"}, "blocked"),
        ("2.60.0", {}, "ok"),
        ("2.40.0", {"RAY_ADDRESS": "127.0.0.1:6379"}, "ok"),
        ("2.60.0", {"RAY_ADDRESS": "ray://localhost:10001"}, "ok"),
        ("2.60.0", {"RAY_ADDRESS": "[::1]:6379"}, "ok"),
        ("2.51.2", {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, "blocked"),
        ("2.60.0", {"RAY_ADDRESS": "10.0.0.1:6379"}, "warn"),
        ("2.60.0", {"RAY_ADDRESS": "http://head:8265", "RAY_AUTH_MODE": "disabled"}, "warn"),
        ("2.60.0", {"RAY_ADDRESS": "ray://head:10001", "RAY_AUTH_MODE": "token", "HOME": "/nowhere"}, "blocked"),
        ("2.60.0", {"RAY_ADDRESS": "head:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, "ok"),
        ("2.60.0", {"RAY_ADDRESS": "head:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": __file__}, "ok"),
    ],
)
def test_a_cluster_elsewhere_should_ask_for_a_token(
    installed: str | None, environment: dict[str, str], status: str
) -> None:
    check = check_ray(installed, environment)
    assert check.status == status
    assert "secret" not in as_line(check)


# ---- safety ----


def test_layers_that_are_not_there_are_named() -> None:
    there, missing = Layer("calls", True, "141"), Layer("files", False, "this kernel is older than 5.13")
    assert check_sandbox([there]).status == "ok"
    found = check_sandbox([there, missing])
    assert (found.status, found.detail) == ("warn", "1 of 2 layers; without `files`: this kernel is older than 5.13")


@pytest.mark.parametrize("lake", [None, "a folder", "s3://bucket/lake"])
def test_the_sandbox_is_that_of_a_real_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lake: str | None
) -> None:
    """A lake in an object store is read through the network, and that is said."""
    monkeypatch.setenv("AWS_REGION", "nowhere")
    found = {check.name: check for check in safety_checks(str(tmp_path) if lake == "a folder" else lake, None)}
    assert found["sandbox"].status != "blocked"
    assert ("without `network`: the lake lies in an object store" in found["sandbox"].detail) == (
        lake == "s3://bucket/lake"
    )


def test_where_no_worker_starts_that_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_starts(_: object) -> list[Layer]:
        raise QueryCrashedError("no worker could be started")

    monkeypatch.setattr(import_module("logitlake_shared.doctor.safety"), "layers", none_starts)
    assert statuses(safety_checks(None, None))["sandbox"] == "blocked"


def test_what_a_client_adds_for_its_makers_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> None:
        raise LakeError("s3://b/l: reading lake.json failed: no route\n\nDebug source:\nGeneric { store: 1 }")

    monkeypatch.setattr(import_module("logitlake_shared.doctor.storage"), "open_store", failing)
    assert check_write("s3://b/l", "probe").detail == "s3://b/l: reading lake.json failed: no route"


def test_a_file_of_tokens_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens.sqlite"
    assert check_tokens(path).status == "warn"
    TokenStore(path).create("ada", "read")
    assert check_tokens(path).status == "ok"
    for mode in (0o644, 0o620, 0o606):
        path.chmod(mode)
        found = check_tokens(path)
        assert (found.status, found.advice) == ("blocked", f"chmod 600 {path}")
    path.chmod(0o600)
    tmp_path.chmod(0o777)
    assert "anybody may replace it" in check_tokens(path).detail
    tmp_path.chmod(0o755)
    other = tmp_path / "notes"
    other.write_text("not tokens")
    other.chmod(0o600)
    assert "not a file of tokens" in check_tokens(other).detail
    assert check_tokens(tmp_path).status == "blocked"


@pytest.mark.parametrize(
    ("soft", "status"),
    [(128, "blocked"), (512, "warn"), (1024, "ok"), (resource.RLIM_INFINITY, "ok")],
)
def test_open_files(soft: int, status: str) -> None:
    assert check_open_files(soft, resource.RLIM_INFINITY).status == status


# ---- the report ----


def test_the_worst_decides() -> None:
    assert worst([]) == worst([ok("a", "")]) == "ok"
    assert worst([ok("a", ""), warn("b", "", "")]) == "warn"
    assert worst([blocked("c", "", ""), ok("a", ""), warn("b", "", "")]) == "blocked"
    report = json.loads(as_json([ok("a", "fine"), blocked("c", "bad", "mend it")], None))
    assert (report["status"], report["counts"]) == ("blocked", {"ok": 1, "warn": 0, "blocked": 1})
    assert report["checks"][1] == {"name": "c", "status": "blocked", "detail": "bad", "advice": "mend it"}
    assert as_line(blocked("c", "bad\nnews", "mend it")) == "blocked  c             bad news → mend it"


def test_the_command_ends_with_3_when_something_blocks(small_lake: Path, tmp_path: Path) -> None:
    """Text and JSON say the same; what only warns is no failure."""
    tokens = tmp_path / "tokens.sqlite"
    TokenStore(tokens)
    run = CliRunner().invoke
    fine = run(cli, ["doctor", str(small_lake), "--tokens", str(tokens), "--json"])
    report = json.loads(fine.stdout)
    # This machine's own Ray, should there be one, is none of this test's doing.
    others = {check["name"] for check in report["checks"] if check["status"] == "blocked"}
    assert others <= {"ports", "ray cluster"}
    assert fine.exit_code == (3 if others else 0)
    tokens.chmod(0o644)
    text = run(cli, ["doctor", str(small_lake), "--tokens", str(tokens)])
    assert text.exit_code == 3
    lines = {line[9:21].strip(): line.split()[0] for line in text.stdout.splitlines()}
    assert lines["tokens"] == "blocked"
    assert lines.keys() == {check["name"] for check in report["checks"]}


def test_a_check_that_cannot_be_made_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are made all the same."""
    examine = import_module("logitlake_shared.doctor.examine")

    def failing() -> list[Check]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(examine, "network_checks", failing)
    found = statuses(examine.examine(None, None))
    assert found["network"] == "warn"
    assert "open files" in found


def test_every_check_is_on_its_page(small_lake: Path) -> None:
    """docs/doctor.md has a row for each name that a report shows."""
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    examine = import_module("logitlake_shared.doctor.examine")
    names = [check.name for check in examine.examine(str(small_lake), Path("tokens.sqlite"))]
    assert [name for name in names if f"`{name}`" not in page] == []
