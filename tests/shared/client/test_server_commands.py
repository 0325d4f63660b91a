"""The command lines against `--server URL` say what they say of the lake itself."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.shared.conftest import small_lake
from tests.teacher_service.api.conftest import Api, api, capture, teacher, tokens
from tests.teacher_service.conftest import teacher_world

__all__ = ["api", "capture", "small_lake", "teacher", "teacher_world", "tokens"]

Command = Callable[..., Any]

QUESTION = "SELECT task, count(*) AS n FROM tokens GROUP BY task ORDER BY task"


@pytest.mark.parametrize("output", ["table", "json", "csv"])
def test_a_question_to_a_service_prints_as_one_to_its_lake(
    teacher: Callable[..., tuple[Any, str]], small_lake: Path, run_command: Command, output: str
) -> None:
    """Byte for byte; so does `ls`."""
    _, url = teacher()
    of_lake = run_command("logitlake", "sql", str(small_lake), QUESTION, "-o", output)
    of_service = run_command("logitlake", "sql", "--server", url, QUESTION, "-o", output)
    assert (of_service.code, of_service.out) == (0, of_lake.out)
    assert run_command("logitlake", "ls", "--server", url).out == run_command("logitlake", "ls", str(small_lake)).out


def test_what_a_service_refuses_is_an_error_of_the_command(
    teacher: Callable[..., tuple[Any, str]], small_lake: Path, run_command: Command
) -> None:
    """Its words, and the exit code of an error; a cut answer is said."""
    _, url = teacher()
    refused = run_command("logitlake", "sql", "--server", url, "DROP TABLE tokens")
    assert refused.code == 2
    assert "not answered" in refused.err
    cut = run_command("logitlake", "sql", "--server", url, "SELECT * FROM range(1000000)", "-o", "csv")
    assert cut.code == 0
    assert "cut short" in cut.err
    for arguments in (("ls",), ("ls", str(small_lake), "--server", url), ("sql", "--server", url)):
        assert run_command("logitlake", *arguments).code == 2


def test_jobs_of_a_service(
    api: Api, capture: Callable[..., dict[str, Any]], teacher_world: Any, run_command: Command
) -> None:
    """Submit and follow, list, look, read the log, cancel what ended."""
    import tomli_w

    teacher = partial(run_command, "logitlake-teacher")
    url = str(api().base_url)
    path = teacher_world.folder / "job.toml"
    path.write_text(tomli_w.dumps(capture("main")["config"]))
    jobs = ("jobs", "--server", url)
    planned = teacher(*jobs, "plan", str(path))
    assert planned.code == 0, planned.err
    assert "samples in" in planned.out
    digest = json.loads(teacher(*jobs, "plan", str(path), "--json").out)["plan_digest"]
    assert teacher(*jobs, "submit", str(path), "--plan-digest", "0" * 12, "--follow").code != 0
    followed = run_command(
        "logitlake-teacher", *jobs, "submit", str(path), "--plan-digest", digest, "--name", "nightly",
        "--label", "team=a", "--follow",
    )  # fmt: skip
    assert followed.code == 0, followed.err
    job = followed.out.strip()
    assert "succeeded" in followed.err
    assert job in teacher(*jobs, "ls", "--label", "team=a").out
    assert '"state": "succeeded"' in teacher(*jobs, "get", job).out
    assert "samples" in teacher(*jobs, "logs", job).out
    assert teacher(*jobs, "wait", job).code == 0
    labelled = teacher(*jobs, "label", job, "tier=1", "team=b", "--name", "daily")
    assert json.loads(labelled.out)["labels"] == {"team": "b", "tier": "1"}
    assert json.loads(teacher(*jobs, "label", job, "--remove", "team").out)["labels"] == {"tier": "1"}
    assert "daily" in teacher(*jobs, "ls", "--label", "tier=1").out
    assert "expected NAME=VALUE" in teacher(*jobs, "label", job, "tier").err
    ended = teacher(*jobs, "cancel", job)
    assert ended.code == 2
    assert "nothing to cancel" in ended.err
    bad = teacher(*jobs, "submit", str(path), "data.0.path=/etc/passwd")
    assert bad.code == 2
    assert "data.0.path" in bad.err
