"""`logitlake-teacher jobs` against a real Ray head with its dashboard and token authentication on."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from logitlake_schemas import layout
from logitlake_shared.errors import ConfigError, JobError
from logitlake_shared.reader import LakeDataset
from logitlake_teacher.config import CaptureConfig, FakeEngineConfig, LakeConfig, LlavaSource, TeacherConfig
from logitlake_teacher.ray_jobs import RayJobs, load_run, store_run

Command = Callable[..., Any]

# A head with a dashboard is up in ten to twenty seconds; a busy machine gets the rest.
PATIENCE_S = 180.0


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """The environment that finds the head: `RAY_ADDRESS` of its Jobs API and its token. One for the file."""
    with socket.socket() as one, socket.socket() as another, socket.socket() as third:
        for made in (one, another, third):
            made.bind(("127.0.0.1", 0))
        port, dashboard_port, agent_port = (made.getsockname()[1] for made in (one, another, third))
    token = secrets.token_hex(32)
    # Ray's sockets must have short names.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    binaries = str(Path(sys.executable).parent)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [f"{binaries}/ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    # The port that agents would take is that of whichever head of the machine came first; one without gets no jobs.
    command += [f"--dashboard-agent-listen-port={agent_port}", f"--temp-dir={folder}"]
    log = Path(folder, "start.log")
    with log.open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    address = f"http://127.0.0.1:{dashboard_port}"
    try:
        _wait_until_it_answers(f"{address}/api/jobs/", token, process, log)
        yield {"RAY_ADDRESS": address, "RAY_AUTH_TOKEN": token}
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(url: str, token: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE_S:
        assert process.poll() is None, log.read_text()
        try:
            request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError:
            time.sleep(0.2)  # a port that nobody listens on gives nothing to wait for
    pytest.fail(f"no Jobs API within {PATIENCE_S} s:\n{log.read_text()}")


@pytest.fixture
def cluster(head: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The head, as a user's environment names it."""
    for name, value in head.items():
        monkeypatch.setenv(name, value)
    return head


def ray_config(world: Any, **sections: Any) -> Path:
    """A capture on one actor, so that two cores are enough for it and for its driver."""
    executor = {"type": "ray", "num_actors": 1, "backoff_s": 0.1, "grace_s": 1.0}
    path: Path = world.config(executor=executor, **sections)
    return path


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_is_submitted_followed_cancelled_and_resumed(
    cluster: dict[str, str], teacher_world: Any, teacher_command: Command
) -> None:
    """From a configuration to a finished cache, over one attempt that is cancelled while a sample hangs.

    Cancelling keeps what is committed, in a snapshot; the same submission again is recognised; the lake in the end is
    that of an inline capture, and the commands' exit codes say how the jobs ended.
    """
    # A teacher that hangs is the same teacher: faults are no part of a fingerprint.
    hanging = ray_config(teacher_world, name="hanging.toml", engine={"type": "fake", "hang_on": ["s007"]})
    submitted = teacher_command("jobs", "submit", hanging, "--json")
    assert submitted.code == 0, submitted.err
    told = json.loads(submitted.out)
    assert told["new"]
    run = told["run"]
    assert told["submission_id"] == f"{run}-a1"

    again = teacher_command("jobs", "submit", hanging, "--json")
    assert again.code == 0, again.err
    assert not json.loads(again.out)["new"]
    assert json.loads(again.out)["submission_id"] == f"{run}-a1"
    with_attempt = teacher_command("jobs", "resume", run)
    assert with_attempt.code == 2
    assert "cancel it first" in with_attempt.err

    commits = teacher_world.lake / "caches" / "capture" / "commits"
    _wait_for(lambda: len(list(commits.glob("*.json"))) >= 1 if commits.exists() else False, run, teacher_command)
    assert teacher_command("jobs", "cancel", run).code == 0
    followed = teacher_command("jobs", "logs", run, "--follow")
    assert followed.code == 143, followed.err
    assert "stopped by SIGTERM" in followed.out
    assert "Run the same command to go on" in followed.out
    kept = LakeDataset(teacher_world.lake, "capture").ids()
    assert kept
    cancelled_twice = teacher_command("jobs", "cancel", run)
    assert cancelled_twice.code == 0
    assert "STOPPED" in cancelled_twice.err

    done = teacher_command("jobs", "submit", ray_config(teacher_world), "--follow")
    assert done.code == 0, done.out + done.err
    assert "24 samples" in done.out
    assert LakeDataset(teacher_world.lake, "capture").ids() == [f"s{number:03d}" for number in range(24)]
    finished = done.out.splitlines()[0].removesuffix("-a1")
    resumed = teacher_command("jobs", "resume", finished, "--follow")
    assert resumed.code == 0, resumed.err
    assert "captured already" in resumed.out

    listed = json.loads(teacher_command("jobs", "ls", "--json").out)
    assert {one["submission_id"]: one["status"] for one in listed} == {
        f"{run}-a1": "STOPPED",
        f"{finished}-a1": "SUCCEEDED",
        f"{finished}-a2": "SUCCEEDED",
    }
    ended_before = teacher_command("jobs", "submit", hanging)
    assert ended_before.code == 2
    assert f"jobs resume {run}" in ended_before.err


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_fails_ends_the_command_as_its_driver_ended(
    cluster: dict[str, str], teacher_world: Any, teacher_command: Command
) -> None:
    """The driver's own message in the log, its exit code as the command's."""
    config = ray_config(teacher_world, lake={"uri": str(teacher_world.lake), "cache": "failing"})
    failed = teacher_command("jobs", "submit", config, "engine.wrong={s003='nan'}", "--follow")
    assert failed.code == 2, failed.err
    assert "1 teacher_nonfinite" in failed.out
    assert "FAILED" in failed.err


@pytest.mark.ray
@pytest.mark.slow
def test_a_wrong_token_is_refused_and_said(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster answers 401 or 403; the message says which variable to set."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(JobError, match="refused the token"):
        RayJobs(None).attempts()


def _wait_for(condition: Callable[[], bool], run: str, command: Command) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < PATIENCE_S, command("jobs", "logs", run).out
        time.sleep(0.2)  # the driver is a process of the cluster: its files are all that is seen of it


def made_config(folder: Path, cache: str = "c") -> CaptureConfig:
    """A configuration with relative paths."""
    return CaptureConfig(
        teacher=TeacherConfig(model_dir=Path("model")),
        engine=FakeEngineConfig(),
        lake=LakeConfig(uri=str(folder / "lake"), cache=cache),
        data=(LlavaSource(path=Path("train.json")),),
    )


def test_a_run_is_named_by_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same configuration is the same run; another is another; it comes out of the lake with absolute paths."""
    monkeypatch.chdir(tmp_path)
    run = store_run("capture", made_config(tmp_path))
    assert store_run("capture", made_config(tmp_path)).name == run.name
    assert store_run("capture", made_config(tmp_path, cache="d")).name != run.name
    loaded = load_run(str(tmp_path / "lake"), run.name)
    assert loaded == run
    assert loaded.config.teacher.model_dir == tmp_path / "model"
    assert loaded.config.data[0].path == tmp_path / "train.json"
    assert loaded.config.data[0].image_root == str(tmp_path)


def test_a_run_that_was_edited_is_refused(tmp_path: Path) -> None:
    """Its name is the digest of its content, and a job must do what was submitted."""
    run = store_run("capture", made_config(tmp_path))
    path = tmp_path / "lake" / layout.job_path(run.name)
    path.write_text(path.read_text().replace('cache = "c"', 'cache = "x"'))
    with pytest.raises(JobError, match="edited"):
        load_run(str(tmp_path / "lake"), run.name)
    for name in ("capture-000000000000", "../lake"):
        with pytest.raises(JobError, match="no run"):
            load_run(str(tmp_path / "lake"), name)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://10.0.0.7:8265", "no token"),
        ("https://ray.example.com", "no token"),
        ("http://localhost.example.com:8265", "no token"),
        ("auto", "expected http"),
        ("10.0.0.7:6379", "expected http"),
        ("file:///etc/passwd", "expected http"),
        (None, "expected http"),
    ],
)
def test_an_address_that_is_none_or_not_safe_is_refused(
    address: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is sent: other machines need a token, and only http and https are spoken."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        RayJobs(address)


def test_the_token_is_found_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variable, then the file that a variable names, then `~/.ray/auth_token`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    (tmp_path / "named").write_text("from-file")
    cluster = "http://10.0.0.7:8265"
    assert RayJobs(cluster)._headers["Authorization"] == "Bearer from-home"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert RayJobs(cluster)._headers["Authorization"] == "Bearer from-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
    assert RayJobs(cluster)._headers["Authorization"] == "Bearer from-variable"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="cannot be read"):
        RayJobs(cluster)


def test_an_absent_head_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: one sentence, no traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(JobError, match="no Jobs API answers"):
            RayJobs(f"http://127.0.0.1:{taken.getsockname()[1]}").attempts()
