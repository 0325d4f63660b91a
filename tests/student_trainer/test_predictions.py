"""`logitlake-student predict`: a file of answers that can be stopped anywhere and holds each answer once."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from logitlake_shared.data_formats import read_llava
from logitlake_student.answers import greedy_answers, load_examinee

Command = Callable[..., Any]
MAX_NEW_TOKENS = 6


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Models this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def arguments(student_checkpoint: Path, student_data: Path, tmp_path: Path) -> list[object]:
    """The command's, on the session's dense student and its seventeen records."""
    data = ["--data", student_data / "train.json", "--out", tmp_path / "out" / "answers.jsonl"]
    return ["predict", student_checkpoint, *data, "--batch-size", 2, "--max-new-tokens", MAX_NEW_TOKENS]


def test_each_record_has_its_greedy_answer(
    arguments: list[object], student_command: Command, student_checkpoint: Path, student_data: Path, tmp_path: Path
) -> None:
    """In the order of the data, with gold and task; the gold answer is not part of the question."""
    result = student_command(*arguments)
    assert result.code == 0, result.err
    out = tmp_path / "out" / "answers.jsonl"
    assert f"{out}: 17 answers, 17 of them new" in result.out
    records = list(read_llava(student_data / "train.json", student_data))
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    answers = greedy_answers(
        load_examinee(student_checkpoint, "cpu"),
        [(record.messages[:-1], record.images) for record in records],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=5,
        advance=lambda _: None,
    )
    assert lines == [
        {"id": record.sample_id, "task": record.task, "answer": answer, "gold": record.messages[-1]["content"]}
        for record, answer in zip(records, answers, strict=True)
    ]


def test_a_stopped_file_is_gone_on_with(arguments: list[object], student_command: Command, tmp_path: Path) -> None:
    """Cut anywhere, also inside a line or before the first: the end is the file of a run that was not stopped."""
    student_command(*arguments)
    out = tmp_path / "out" / "answers.jsonl"
    whole = out.read_bytes()
    for kept in (0, 10, whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:kept])
        result = student_command(*arguments)
        assert result.code == 0, result.err
        num_there = whole[:kept].count(b"\n")
        assert f"17 answers, {17 - num_there} of them new" in result.out
        assert out.read_bytes() == whole


def test_a_finished_file_is_recognised_without_torch(arguments: list[object], student_command: Command) -> None:
    """With torch and transformers made impossible to import, the command still says that all is there."""
    student_command(*arguments)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from logitlake_student.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "17 answers, all there already" in done.stdout


def test_answers_are_never_mixed(
    arguments: list[object], student_command: Command, student_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Another setting, another model, other data, a file of somebody else's: refused by name, nothing changed."""
    student_command(*arguments)
    out = tmp_path / "out" / "answers.jsonl"
    whole = out.read_bytes()
    other_data = tmp_path / "other.json"
    records = json.loads((student_data / "train.json").read_text())
    other_data.write_text(json.dumps(records[1:]))
    image_root = ["--image-root", student_data]
    mistakes: list[tuple[list[object], str]] = [
        ([*arguments, "--max-new-tokens", 7], "another max_new_tokens (6 there, 7 here)"),
        (["predict", tiny_teacher, *arguments[2:]], "another model"),
        ([*arguments, "--data", other_data, *image_root], "line 1 answers 's000', record 1 of"),
    ]
    for given, said in mistakes:
        result = student_command(*given)
        assert result.code == 2, result.err
        assert said in result.err
        assert "choose another --out, or remove the file" in result.err
        assert out.read_bytes() == whole
    with out.open("ab") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        result = student_command(*arguments)
    assert result.code == 2
    assert "another process is writing there" in result.err
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine\n")
    result = student_command(*arguments, "--out", foreign)
    assert result.code == 2
    assert foreign.read_text() == "mine\n"


def test_bad_data_is_found_before_the_first_answer(
    arguments: list[object], student_command: Command, student_data: Path, tmp_path: Path
) -> None:
    """A picture that is not there, a record that is none, no record at all; nothing is written."""
    records = json.loads((student_data / "train.json").read_text())
    cases: dict[str, tuple[list[Any], str]] = {
        "missing": ([*records[:2], records[2] | {"image": "images/none.png"}], "1 images are missing, e.g."),
        "malformed": ([*records[:2], {"id": "x"}], "conversations missing"),
        "empty": ([], "holds no record"),
    }
    for name, (content, said) in cases.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        result = student_command(*arguments, "--data", path, "--image-root", student_data)
        assert result.code == 2, result.err
        assert said in result.err
    assert not (tmp_path / "out").exists()
