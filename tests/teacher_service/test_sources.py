"""Sources: their keys do what they say, and nonsense is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from logitlake_shared.data_formats import BadRecord, Conversation, InputLog
from logitlake_teacher.config import ConversationSource, FakeSource, LlavaSource, RlaifVSource

TURNS = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]


def write(folder: Path, *records: Any) -> Path:
    """A file of lines."""
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_source_names_what_its_records_do_not(tmp_path: Path) -> None:
    """Task, split and source of the table, unless a record has its own; images become absolute places."""
    seen = {"id": "b", "image": "a.png", "task": "own", "conversations": [TURNS[0] | {"value": "<image>"}, TURNS[1]]}
    file = write(tmp_path, {"id": "a", "conversations": TURNS}, seen)
    source = LlavaSource(path=file, image_root="photos", task="table", split="test", source="mine")
    plain, own = (read for read in source.read() if isinstance(read, Conversation))
    assert (plain.task, plain.split, plain.source) == ("table", "test", "mine")
    assert own.task == "own"
    assert own.images[0].path == Path("photos/a.png").absolute()
    assert own.images[0].key == "a.png"


def test_a_source_reads_only_what_it_wants(tmp_path: Path) -> None:
    """The filters of the table; a bad record comes along whatever they say, and a prompt without an answer is good."""
    records = [{"id": str(n), "task": "ab"[n % 2], "conversations": TURNS * (1 + n % 3)} for n in range(6)]
    file = write(tmp_path, *records, {"id": "prompt", "task": "a", "conversations": TURNS[:1]}, [])

    def ids(**keys: Any) -> list[str]:
        reads = LlavaSource(path=file, **keys).read()
        return ["bad" if isinstance(read, BadRecord) else read.sample_id for read in reads]

    assert ids() == ["0", "1", "2", "3", "4", "5", "prompt", "bad"]
    assert ids(tasks=("a",), max_turns=2) == ["0", "4", "prompt", "bad"]
    assert ids(limit=2, max_turns=1) == ["0", "3"]
    assert ids(min_images=1) == ["bad"]


def test_a_source_notes_the_files_it_read(tmp_path: Path) -> None:
    """The log of a whole read has the digest; of one that a limit ended there is none to have."""
    file = write(tmp_path, *({"id": n, "conversations": TURNS} for n in range(3)))
    whole, part = InputLog(), InputLog()
    list(LlavaSource(path=file).read(whole))
    list(LlavaSource(path=file, limit=1).read(part))
    assert [state.path for state in whole.files] == [file]
    assert whole.files[0].sha256 is not None
    assert [(state.path, state.sha256) for state in part.files] == [(file, None)]


def test_a_made_up_source_needs_no_file() -> None:
    """As many as asked for; none is allowed, too."""
    assert sum(1 for _ in FakeSource(num_samples=7, images=True).read()) == 7
    assert list(FakeSource(num_samples=0).read()) == []


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"type": "llava"}, "path"),
        ({"type": "llava", "path": "a", "limit": 0}, "limit"),
        ({"type": "llava", "path": "a", "tasks": []}, "tasks"),
        ({"type": "llava", "path": "a", "max_turns": 0}, "max_turns"),
        ({"type": "llava", "path": "a", "min_images": 2, "max_images": 1}, "max_images is 1 and min_images 2"),
        ({"type": "llava", "path": "a", "on_bad_record": "ignore"}, "on_bad_record"),
        ({"type": "llava", "path": "a", "columns": "x"}, "columns"),
        ({"type": "fake", "path": "a"}, "path"),
        ({"type": "rlaif_v", "path": "a"}, "rlaif_v"),
        ({"type": "csv", "path": "a"}, "csv"),
    ],
)
def test_a_table_that_means_nothing_is_refused(table: dict[str, Any], key: str) -> None:
    """The error names the key."""
    with pytest.raises(ValidationError, match=key):
        TypeAdapter(ConversationSource).validate_python(table)


def test_an_address_as_image_root_stays_one(tmp_path: Path) -> None:
    """`s3://` keeps its two slashes."""
    seen = {"id": "b", "image": "a.png", "conversations": [TURNS[0] | {"value": "<image>"}, TURNS[1]]}
    (read,) = LlavaSource(path=write(tmp_path, seen), image_root="s3://bucket/set").read()
    assert isinstance(read, Conversation)
    assert read.images[0].uri == "s3://bucket/set/a.png"
    assert RlaifVSource(path=Path("x")).task == "preference"
