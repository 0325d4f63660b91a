"""Examines checkpoints on held-out data: one JSON file of figures a model.

A result carries its identity: digests of the checkpoint, of the test data with its images, the lake's fingerprint and
snapshot, and every setting that can move a figure. A result with the same identity is the result; any other is made
again. Finding that out imports nothing heavy, so a second `eval` of finished models ends at once.
"""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from logitlake_schemas import canonical_json, fingerprint
from logitlake_shared.cli_support import progress
from logitlake_shared.config import write_provenance
from logitlake_shared.data_formats import Conversation, ImageRef, Messages, read_llava
from logitlake_shared.errors import ConfigError, DataError
from logitlake_shared.lake import Lake
from logitlake_student.config import EvalConfig, ModelUnderTest
from logitlake_student.metrics import accuracy, caption_figures, existence_figures, yes_or_no

__all__ = ["EvalQuestion", "checkpoint_sha256", "examine", "figures_of", "read_questions", "result_of"]

# Part of every identity: raise it when a figure's definition changes, so that old results are not taken for new ones.
EVALUATION = 1
# Settings that move no figure: where results go, who else is examined, how many samples share a forward pass.
_IDLE_SETTINGS = {"output", "models", "batch_size"}
_CHECKPOINT_FILES = ("*.json", "*.jinja", "*.safetensors")


@dataclass(frozen=True)
class EvalQuestion:
    """One record of the test data."""

    sample_id: str
    task: str
    messages: Messages
    """the turns up to the one to be answered"""
    images: tuple[ImageRef, ...]
    gold: str | None
    """None only for a caption that is judged by its mentions alone"""
    objects: tuple[str, ...]
    """what is truly in the image; empty for tasks that do not need it"""


def result_of(config: EvalConfig, model: ModelUnderTest) -> dict[str, Any] | None:
    """The finished result of `model`, or None when there is none with today's identity. Imports nothing heavy.

    Raises `ConfigError`, `DataError` or `LakeError` when model, test data or lake are not there.
    """
    path = _result_path(config, model)
    identity = _identity(config, model)
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if result.get("identity") == identity else None


def examine(config: EvalConfig, model: ModelUnderTest) -> dict[str, Any]:
    """Answers every question, measures forward_kl on the lake's held-out rows, writes the result and returns it.

    Raises as `result_of` does, and what a checkpoint that does not fit lake or data raises.
    """
    started = time.monotonic()
    path = _result_path(config, model)
    identity = _identity(config, model)
    questions = read_questions(config)
    pattern = _mention_pattern(config)

    from logitlake_shared.reader import LakeDataset
    from logitlake_student.answers import greedy_answers, held_out, load_examinee

    dataset = LakeDataset(config.lake, config.cache, split=config.split, snapshot=identity["lake"]["snapshot"])
    examinee = load_examinee(model.path, config.device)
    answers = [""] * len(questions)
    with progress(f"eval {model.name}", len(questions) + len(dataset), "samples") as advance:
        rows = held_out(examinee, dataset, batch_size=config.batch_size, advance=advance)
        # Captions are long, the other answers a token or two: in one batch the short would wait for the long.
        for captions in (False, True):
            places = [place for place, asked in enumerate(questions) if _is_caption(config, asked) == captions]
            said = greedy_answers(
                examinee,
                [(questions[place].messages, questions[place].images) for place in places],
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
                advance=advance,
            )
            for place, answer in zip(places, said, strict=True):
                answers[place] = answer
    result = {
        "name": model.name,
        "identity": identity,
        **figures_of(config, questions, answers, pattern),
        "kl_to_teacher": rows.kl,
        "experts_by_task": rows.experts_by_task,
        "examples": _examples(config, questions, answers),
        "num_records": len(questions),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_provenance(config.output / "provenance.json", config)
    building = path.with_name(f".{path.name}")
    building.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    building.replace(path)
    return result


def figures_of(
    config: EvalConfig, questions: Sequence[EvalQuestion], answers: Sequence[str], pattern: re.Pattern[str]
) -> dict[str, Any]:
    """All figures that answers alone give. `vqa_accuracy` is over every task but captions, existence included."""
    answered = list(zip(questions, answers, strict=True))
    by_task: dict[str, list[tuple[str, str]]] = {asked.task: [] for asked in questions}
    for asked, answer in answered:
        if asked.gold is not None:
            by_task[asked.task].append((answer, asked.gold))
    short_answers = [pair for task, pairs in by_task.items() if task != config.caption_task for pair in pairs]
    existence = existence_figures(
        (answer, yes_or_no(gold) is True) for answer, gold in by_task.get(config.existence_task, [])
    )
    captions = caption_figures(
        [(answer, asked.gold, asked.objects) for asked, answer in answered if _is_caption(config, asked)], pattern
    )
    return {
        "vqa_accuracy": accuracy(short_answers),
        "hallucination_f1": existence.hallucination_f1,
        "caption_hallucination_rate": captions.hallucination_rate,
        "tasks": {task: accuracy(by_task[task]) for task in sorted(by_task)},
        "existence": asdict(existence),
        "captions": asdict(captions),
    }


def read_questions(config: EvalConfig) -> list[EvalQuestion]:
    """The test data, checked: every record has what its task is scored by. Raises `DataError`."""
    questions = [_question(config, record) for record in read_llava(config.test_data, config.image_root)]
    if not questions:
        raise DataError(f"{config.test_data}: holds no record; there is nothing to examine a model with")
    return questions


def _question(config: EvalConfig, record: Conversation) -> EvalQuestion:
    where = f"{config.test_data}: record {record.sample_id}"
    has_gold = record.messages[-1]["role"] == "assistant"
    messages = record.messages[:-1] if has_gold else record.messages
    gold = str(record.messages[-1]["content"]) if has_gold else None
    objects: Any = []
    if record.task == config.caption_task:
        objects = record.extra.get(config.objects_key)
        if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
            raise DataError(
                f"{where}: a caption is judged by the objects truly in its image: expected a list of names under "
                f"`{config.objects_key}`, got {objects!r}"
            )
    elif gold is None:
        raise DataError(f"{where}: ends without an answer; expected the exact one as its last turn")
    elif record.task == config.existence_task and yes_or_no(gold) is None:
        raise DataError(f"{where}: the answer to an existence question must be yes or no, got {gold!r}")
    return EvalQuestion(record.sample_id, record.task, messages, record.images, gold, tuple(objects))


def _is_caption(config: EvalConfig, question: EvalQuestion) -> bool:
    return question.task == config.caption_task


def _examples(config: EvalConfig, questions: Sequence[EvalQuestion], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Captions spread evenly over the test data; every model is shown with the same ones."""
    captions = [(asked, answer) for asked, answer in zip(questions, answers, strict=True) if _is_caption(config, asked)]
    num_shown = min(config.num_examples, len(captions))
    shown = [captions[number * len(captions) // num_shown] for number in range(num_shown)]
    return [
        {
            "id": asked.sample_id,
            "image": _image_name(config, asked),
            "question": _text_of(asked.messages[-1]["content"]),
            "gold": asked.gold,
            "answer": answer,
            "objects": list(asked.objects),
        }
        for asked, answer in shown
    ]


def _image_name(config: EvalConfig, question: EvalQuestion) -> str | None:
    """The first image's path as the test data writes it: relative to `image_root`, or absolute."""
    path = question.images[0].path if question.images else None
    if path is None:
        return None
    return (path.relative_to(config.image_root) if path.is_relative_to(config.image_root) else path).as_posix()


def _text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _mention_pattern(config: EvalConfig) -> re.Pattern[str]:
    try:
        return re.compile(config.mention_pattern)
    except re.error as error:
        raise ConfigError(
            f"`mention_pattern`: not a regular expression: {error}, got {config.mention_pattern!r}; mend it"
        ) from None


# ---- identity ----


def _result_path(config: EvalConfig, model: ModelUnderTest) -> Path:
    if sum(other.name == model.name for other in config.models) > 1:
        raise ConfigError(f"`models`: two models are named {model.name!r}; the name is that of the result's file")
    if Path(model.name).name != model.name:
        raise ConfigError(f"`models`: {model.name!r} is not the name of a file, which a result is called after")
    return config.output / f"{model.name}.json"


def _identity(config: EvalConfig, model: ModelUnderTest) -> dict[str, Any]:
    samples = Lake.open(config.lake).cache(config.cache)
    settings = config.model_dump(mode="json", exclude=_IDLE_SETTINGS)
    identity = {
        "evaluation": EVALUATION,
        "model": checkpoint_sha256(model.path),
        "test_data": _test_data_sha256(config),
        "lake": {"fingerprint": samples.fingerprint, "snapshot": samples.open_snapshot().number},
        "settings": settings,
    }
    return dict(json.loads(canonical_json(identity)))


def checkpoint_sha256(folder: Path) -> str:
    """Digest over weights, configuration, tokenizer, template and image processor."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no checkpoint there (config.json is missing); train it first, or mend `models`")
    files = sorted(path for suffix in _CHECKPOINT_FILES for path in folder.glob(suffix))
    return fingerprint({path.name: _file_sha256(path) for path in files})


def _test_data_sha256(config: EvalConfig) -> str:
    images = {path for asked in read_questions(config) for image in asked.images if (path := image.path) is not None}
    missing = sorted(str(path) for path in images if not path.is_file())
    if missing:
        raise DataError(f"{config.test_data}: {len(missing)} of {len(images)} images are missing, e.g. {missing[0]}")
    return fingerprint({str(path): _file_sha256(path) for path in (config.test_data, *images)})


def _file_sha256(path: Path) -> str:
    stat = path.stat()
    return _file_sha256_as_of(path, stat.st_size, stat.st_mtime_ns)


@cache
def _file_sha256_as_of(path: Path, size: int, mtime_ns: int) -> str:
    """A file's digest, taken once for all models of an evaluation as long as size and time of the file stay."""
    del size, mtime_ns  # they are the key
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
