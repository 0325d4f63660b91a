"""POPE's own files: its questions asked, or answers to them counted (arXiv 2305.10355).

A question file is JSON lines as POPE releases them, {"question_id", "image", "text", "label"}, one file each for
random, popular and adversarial objects; an answer file has a line {"question_id", "answer"} (or "text") for each
question. The positive class is "yes". An answer that is neither yes nor no counts as no and is reported; POPE's script
takes it for yes, which `unclear_is_yes` does, too.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitlake_shared.durable import replace_file
from logitlake_shared.errors import DataError
from logitlake_student.metrics import ExistenceFigures, existence_figures

__all__ = ["Question", "answer_questions", "read_answers", "read_questions", "score"]


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    question_id: str
    image: Path
    text: str
    is_there: bool
    """whether the true answer is yes"""


def read_questions(path: Path, images: Path | None) -> list[Question]:
    """The questions of a file, their images under `images`. Raises `DataError` naming file and line."""
    questions = []
    for number, line in _lines(path):
        label = str(line.get("label", "")).strip().casefold()
        missing = [name for name in ("question_id", "image", "text") if not isinstance(line.get(name), str | int)]
        if missing or label not in ("yes", "no"):
            wanted = ", ".join(missing) or f"label yes or no, got {line.get('label')!r}"
            raise DataError(f"{path}, line {number}: not a question of POPE: expected {wanted}")
        image = (images or path.parent) / str(line["image"])
        if images is not None and not image.is_file():
            raise DataError(f"{path}, line {number}: there is no image {image}; --images names the folder they lie in")
        questions.append(Question(str(line["question_id"]), image, str(line["text"]), label == "yes"))
    if not questions:
        raise DataError(f"{path}: holds no question")
    return questions


def read_answers(path: Path, questions: Sequence[Question]) -> list[str]:
    """The answers to the questions, in their order. Raises `DataError` for one that is missing or given twice."""
    answers: dict[str, str] = {}
    for number, line in _lines(path):
        text = line.get("answer", line.get("text"))
        if "question_id" not in line or not isinstance(text, str):
            raise DataError(f"{path}, line {number}: not an answer: expected question_id, and answer or text")
        if answers.setdefault(str(line["question_id"]), text) is not text:
            raise DataError(f"{path}, line {number}: question {line['question_id']} is answered twice")
    unanswered = [question.question_id for question in questions if question.question_id not in answers]
    if unanswered:
        raise DataError(
            f"{path}: {len(unanswered)} of {len(questions)} questions have no answer, e.g. {unanswered[0]}; is it an "
            "answer file to other questions?"
        )
    return [answers[question.question_id] for question in questions]


def answer_questions(
    model_dir: Path, questions: Sequence[Question], out: Path, *, device: str, batch_size: int, max_new_tokens: int
) -> list[str]:
    """A model's greedy answers, also written to `out` as an answer file, whole or not at all."""
    from logitlake_shared.cli_support import progress
    from logitlake_shared.data_formats import ImageRef
    from logitlake_student.answers import greedy_answers, load_examinee

    examinee = load_examinee(model_dir, device)
    prompts: list[Any] = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompts.append(([{"role": "user", "content": content}], (ImageRef(path=question.image),)))
    with progress(f"pope {out.stem}", len(prompts), "questions") as advance:
        answers = greedy_answers(
            examinee, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance
        )
    lines = (
        json.dumps({"question_id": question.question_id, "answer": answer}, ensure_ascii=False)
        for question, answer in zip(questions, answers, strict=True)
    )
    replace_file(out, ("\n".join(lines) + "\n").encode())
    return answers


def score(questions: Sequence[Question], answers: Sequence[str], *, unclear_is_yes: bool) -> ExistenceFigures:
    """POPE's figures of one file."""
    said = ((answer, question.is_there) for question, answer in zip(questions, answers, strict=True))
    return existence_figures(said, unclear_is_yes=unclear_is_yes)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(line, dict):
                raise DataError(f"{path}, line {number}: expected an object, got {type(line).__name__}")
            yield number, line
