"""LLaVA JSON and RLAIF-V Parquet: read as they are, refused with the line and the reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitlake_shared.data_formats import read_llava, read_rlaif_v
from logitlake_shared.errors import DataError, ImageError

GOOD: dict[str, Any] = {
    "id": 7,
    "image": "a.png",
    "task": "reading",
    "objects": ["red seven"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A seven."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}


def test_a_conversation_is_read_whole(tmp_path: Path) -> None:
    """Turns, image place, ids as text, own task, and the keys that are not ours."""
    file = tmp_path / "data.json"
    file.write_text(json.dumps([GOOD]))
    (conversation,) = read_llava(file, tmp_path, split="test")
    assert conversation.sample_id == "7"
    assert (conversation.task, conversation.split, conversation.source) == ("reading", "test", "data")
    assert conversation.messages[0] == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    }
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert conversation.images[0].path == tmp_path / "a.png"
    assert conversation.extra == {"objects": ["red seven"]}
    with pytest.raises(ImageError, match=r"image_missing: .*a\.png"):
        conversation.images[0].load()


def test_several_images_and_none(tmp_path: Path) -> None:
    """Two placeholders take two images in order; a record without images is text."""
    turns = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "No."}]
    file = tmp_path / "data.jsonl"
    text_only = {"id": "t", "conversations": GOOD["conversations"][2:]}
    file.write_text(json.dumps({"id": "m", "images": ["a.png", "b.png"], "conversations": turns}) + "\n\n")
    with file.open("a") as out:
        out.write(json.dumps(text_only))
    two, none = read_llava(file, tmp_path)
    assert [part["type"] for part in two.messages[0]["content"]] == ["image", "image", "text"]
    assert len(two.images) == 2
    assert none.images == ()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "line 1: not valid JSON"),
        ([json.dumps(GOOD), "[]"], "line 2: expected an object"),
        ([json.dumps({"id": 1})], "conversations missing"),
        ([json.dumps(GOOD | {"image": ["a", "b"]})], "1 <image> placeholders but 2 images"),
        ([json.dumps(GOOD | {"conversations": [{"from": "cat", "value": "?"}]})], "turn 0 must be"),
        ([json.dumps(GOOD | {"conversations": []})], "non-empty list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[str], said: str) -> None:
    """Every fault names file, line and what was expected."""
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=said):
        list(read_llava(file, tmp_path))


def test_a_json_object_is_not_a_list(tmp_path: Path) -> None:
    """A .json file holds a list; the message says where one record a line belongs."""
    file = tmp_path / "data.json"
    file.write_text("{}")
    with pytest.raises(DataError, match=r"\.jsonl"):
        list(read_llava(file, tmp_path))


def test_rlaif_v_rows_and_their_faults(tmp_path: Path) -> None:
    """A row becomes a pair with its image at hand; equal answers and empty images are refused by row."""
    origin = json.dumps({"type": "caption", "model": "m"})
    row = {
        "idx": 3,
        "origin_split": origin,
        "image": {"bytes": b"png", "path": "x"},
        "question": "Q",
        "chosen": "a",
        "rejected": "b",
    }
    good = tmp_path / "good.parquet"
    pq.write_table(pa.Table.from_pylist([row]), good)
    (pair,) = read_rlaif_v(good)
    assert (pair.pair_id, pair.chosen, pair.rejected, pair.images[0].load()) == ("3", "a", "b", b"png")
    assert pair.task == "caption"
    for fault, said in (
        ({"rejected": "a"}, "row 1: chosen and rejected are the same"),
        ({"image": {"bytes": b"", "path": "x"}}, r"row 1: `image\.bytes` is empty"),
        ({"question": " "}, "row 1: `question` must be"),
    ):
        bad = tmp_path / "bad.parquet"
        pq.write_table(pa.Table.from_pylist([row, row | fault]), bad)
        with pytest.raises(DataError, match=said):
            list(read_rlaif_v(bad))
