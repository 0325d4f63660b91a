"""`logitlake-student pope`: POPE's files, by hand and through a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitlake_student.pope import read_questions, score

QUESTIONS = [
    {"question_id": 1, "image": "0.png", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "1.png", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "2.png", "text": "Is there a car in the image?", "label": "yes"},
    {"question_id": 4, "image": "3.png", "text": "Is there a tree in the image?", "label": "no"},
    {"question_id": 5, "image": "0.png", "text": "Is there a boat in the image?", "label": "no"},
]
ANSWERS = [
    "Yes, there is.",
    "Yes.",
    "No, there is not. Yes it is a truck.",
    "There is no tree",
    "A picture of a harbour",
]


def jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "coco_pope_random.json", QUESTIONS)


def test_figures_by_hand(questions: Path) -> None:
    """Said: yes yes no no (unclear); true: yes no yes no no.

    unclear as no: hits 1, false alarms 1, misses 1, right rejections 2: accuracy 3/5, precision, recall and F1 1/2
    as POPE's script, unclear is yes: false alarms 2, right rejections 1: accuracy 2/5, precision 1/3, yes 3/5
    """
    asked = read_questions(questions, None)
    ours, theirs = (score(asked, ANSWERS, unclear_is_yes=flag) for flag in (False, True))
    assert (ours.accuracy, ours.precision, ours.recall, ours.hallucination_f1) == (0.6, 0.5, 0.5, 0.5)
    assert (ours.yes_ratio, ours.num_unclear) == (0.4, 1)
    assert theirs.accuracy == pytest.approx(0.4)
    assert theirs.precision == pytest.approx(1 / 3)
    assert theirs.hallucination_f1 == pytest.approx(0.4)
    assert theirs.yes_ratio == pytest.approx(0.6)


def pope_script(label_of_answer: str) -> str:
    """How POPE's script reads an answer: the first sentence, without commas, split at blanks; no, No or not is no."""
    words = label_of_answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def test_unclear_is_yes_reads_answers_as_popes_script(questions: Path) -> None:
    """On plain answers and on odd ones: the same yes or no from each."""
    asked = read_questions(questions, None)
    for answer in [*ANSWERS, "No", "yes", "", "I cannot see it", "It is not. Yes", "Yes, not one but two"]:
        figures = score(asked[:1], [answer], unclear_is_yes=True)
        assert figures.yes_ratio == (pope_script(answer) == "yes")


def test_answer_files_are_counted(questions: Path, student_command: Callable[..., Any], tmp_path: Path) -> None:
    """In any order, under either name of the text; a table, a mean over files, and pope.json."""
    lines = [{"question_id": n, "text": text} for n, text in enumerate(ANSWERS, start=1)]
    answers = jsonl(tmp_path / "answers.jsonl", lines[::-1])
    other = jsonl(tmp_path / "coco_pope_popular.json", QUESTIONS[:2])
    out = tmp_path / "out"
    result = student_command(
        *("pope", "--questions", questions, "--questions", other, "--answers", answers, "--answers", answers),
        *("--out", out),
    )
    assert result.code == 0, result.err
    assert "coco_pope_random" in result.out
    assert "mean F1" in result.out
    written = json.loads((out / "pope.json").read_text())
    assert written["coco_pope_random"]["accuracy"] == 0.6
    assert written["coco_pope_popular"]["num_questions"] == 2


def test_a_model_is_asked(
    questions: Path, student_command: Callable[..., Any], student_checkpoint: Path, student_data: Path, tmp_path: Path
) -> None:
    """Its greedy answers lie in an answer file, which counts to the same figures."""
    out, images = tmp_path / "out", student_data / "images"
    asked = ("pope", student_checkpoint, "--questions", questions, "--images", images, "--out", out)
    result = student_command(*asked, "--max-new-tokens", 4)
    assert result.code == 0, result.err
    written = (out / "pope.json").read_text()
    answers = out / "coco_pope_random.answers.jsonl"
    assert [json.loads(line)["question_id"] for line in answers.read_text().splitlines()] == ["1", "2", "3", "4", "5"]
    again = student_command("pope", "--questions", questions, "--answers", answers, "--out", out)
    assert again.code == 0, again.err
    assert (out / "pope.json").read_text() == written


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2: not JSON"),
        (
            '{"question_id": 2, "image": "1.png", "text": "?", "label": "maybe"}',
            "line 2: .*label yes or no, got 'maybe'",
        ),
        ('{"question_id": 2, "text": "?", "label": "no"}', "line 2: .*expected image"),
        ("[1]", "line 2: expected an object"),
    ],
)
def test_a_broken_line_is_named(
    line: str, said: str, student_command: Callable[..., Any], tmp_path: Path, questions: Path
) -> None:
    """File and line, before anything is loaded."""
    import re

    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    result = student_command("pope", "--questions", broken, "--answers", questions)
    assert result.code == 2
    assert re.search(said, result.err), result.err


def test_what_does_not_fit_together_is_refused(
    questions: Path, student_command: Callable[..., Any], tmp_path: Path
) -> None:
    """No model and no answers; a question without an answer; an image that is not there."""
    assert "give MODEL to ask it, or --answers" in student_command("pope", "--questions", questions).err
    few = jsonl(tmp_path / "few.jsonl", [{"question_id": 1, "answer": "yes"}])
    result = student_command("pope", "--questions", questions, "--answers", few)
    assert "4 of 5 questions have no answer, e.g. 2" in result.err
    asked = ("pope", tmp_path, "--questions", questions, "--images", tmp_path, "--out", tmp_path)
    assert "line 1: there is no image" in student_command(*asked).err
