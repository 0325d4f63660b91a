"""`logitlake-student predict`: a model's answers to a whole file of questions, one line of JSON each.

    {"id": "7", "task": "reading", "answer": "seven", "gold": "seven"}

Lines stand in the order of the data and are appended whole: a run that was killed goes on after the last whole line,
and a half one is cut off. What the lines were made with stands beside them (`<out>.provenance.json`); another model,
other data or another setting is refused instead of mixed in. `gold` is there where the record ends with an answer,
which the model is not shown.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from logitlake_shared.cli_support import progress
from logitlake_shared.data_formats import Conversation, read_llava
from logitlake_shared.durable import replace_file
from logitlake_shared.errors import ConfigError, DataError
from logitlake_shared.file_locks import try_lock
from logitlake_student.evaluate import checkpoint_sha256

__all__ = ["Prediction", "write_predictions"]

# Batches answered between two writes: within them prompts are sorted by length, and a kill costs no more.
_BATCHES_A_WRITE = 8


@dataclass(frozen=True)
class Prediction:
    """What is to be answered by what, and where the answers go."""

    model: Path
    """folder of a checkpoint"""
    data: Path
    """LLaVA JSON or JSONL"""
    image_root: Path
    out: Path
    max_new_tokens: int
    batch_size: int
    device: str
    dtype: str
    """name of a torch type"""

    def identity(self) -> dict[str, Any]:
        """All that decides what a line says, besides the record that it answers."""
        return {
            "model": checkpoint_sha256(self.model),
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
        }


def write_predictions(wanted: Prediction) -> tuple[int, int]:
    """Answers what is not answered yet. Returns (answers now in the file, those that this call added).

    Imports nothing heavy when nothing is left to do. Raises `DataError` for a record or an image that cannot be used,
    before the first answer where that can be told; `ConfigError` for an `out` that holds something else.
    """
    num_records = _check_data(wanted)
    identity = wanted.identity()
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    with _owned(wanted.out) as out:
        done = _resume(wanted, out, identity)
        if done == num_records:
            return done, 0
        _answer_rest(wanted, out, done, num_records)
    return num_records, num_records - done


def _answer_rest(wanted: Prediction, out: IO[bytes], done: int, num_records: int) -> None:
    import torch

    from logitlake_student.answers import greedy_answers, load_examinee

    examinee = load_examinee(wanted.model, wanted.device, getattr(torch, wanted.dtype))
    records = islice(_records(wanted), done, None)
    with progress(f"predict {wanted.out.name}", num_records, "records") as advance:
        if done:
            advance(done)
        while chunk := list(islice(records, wanted.batch_size * _BATCHES_A_WRITE)):
            asked = [_question(record) for record in chunk]
            answers = greedy_answers(
                examinee,
                [(messages, record.images) for record, (messages, _) in zip(chunk, asked, strict=True)],
                max_new_tokens=wanted.max_new_tokens,
                batch_size=wanted.batch_size,
                advance=advance,
            )
            golds = [gold for _, gold in asked]
            out.write(b"".join(map(_line, chunk, answers, golds)))
            out.flush()
            os.fsync(out.fileno())


def _records(wanted: Prediction) -> Iterator[Conversation]:
    return read_llava(wanted.data, wanted.image_root)


def _check_data(wanted: Prediction) -> int:
    """Reads all of the data once, without its pixels. Returns the number of records."""
    num_records = 0
    missing: list[Path] = []
    for record in _records(wanted):
        num_records += 1
        missing += [path for image in record.images if (path := image.path) is not None and not path.is_file()]
    if missing:
        raise DataError(
            f"{wanted.data}: {len(missing)} images are missing, e.g. {missing[0]}; image names are relative to "
            f"--image-root, which is {wanted.image_root}"
        )
    if not num_records:
        raise DataError(f"{wanted.data}: holds no record; there is nothing to answer")
    return num_records


def _question(record: Conversation) -> tuple[list[dict[str, Any]], str | None]:
    """The turns up to the one to be answered, and the answer that the record gives, if it does."""
    if record.messages[-1]["role"] == "assistant":
        return record.messages[:-1], str(record.messages[-1]["content"])
    return record.messages, None


def _line(record: Conversation, answer: str, gold: str | None) -> bytes:
    entry = {"id": record.sample_id, "task": record.task, "answer": answer}
    if gold is not None:
        entry["gold"] = gold
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


@contextmanager
def _owned(path: Path) -> Iterator[IO[bytes]]:
    """The file, open for appending, for this process alone. Raises `ConfigError` while another has it."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; --out names the file to write, e.g. {path / 'answers.jsonl'}")
    with path.open("ab+") as file:
        if not try_lock(file):
            raise ConfigError(f"{path}: another process is writing there; wait for it, or choose another --out")
        yield file


def _resume(wanted: Prediction, out: IO[bytes], identity: dict[str, Any]) -> int:
    """How many answers are there already; a torn last line is cut off."""
    provenance = wanted.out.with_name(f"{wanted.out.name}.provenance.json")
    out.seek(0)
    content = out.read()
    whole = content.rpartition(b"\n")[0].split(b"\n") if b"\n" in content else []
    if whole:
        _require_same(wanted, provenance, identity)
    ids = [_id_of(line) for line in whole]
    expected = [record.sample_id for record in islice(_records(wanted), len(ids))]
    for place, (got, there) in enumerate(zip(ids, [*expected, *[None] * (len(ids) - len(expected))], strict=True)):
        if got != there:
            raise ConfigError(
                f"{wanted.out}: line {place + 1} answers {got!r}, record {place + 1} of {wanted.data} is {there!r}: "
                "the answers are to other data; choose another --out, or remove the file"
            )
    out.truncate(sum(len(line) + 1 for line in whole))
    document = identity | {"model_folder": str(wanted.model), "data": str(wanted.data)}
    replace_file(provenance, json.dumps(document, indent=1).encode() + b"\n")
    return len(ids)


def _id_of(line: bytes) -> str | None:
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return None


def _require_same(wanted: Prediction, provenance: Path, identity: dict[str, Any]) -> None:
    """Raises `ConfigError` unless the answers that are there were made as the next ones will be."""
    try:
        there = json.loads(provenance.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        there = {}
    for key, value in identity.items():
        if there.get(key) != value:
            raise ConfigError(
                f"{wanted.out}: its answers were made with another {key} ({there.get(key)!r} there, {value!r} here); "
                "choose another --out, or remove the file"
            )
