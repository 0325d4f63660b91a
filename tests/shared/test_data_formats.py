"""Every format: read as it is written, refused with the place and the reason."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitlake_shared.data_formats import (
    BadRecord,
    Conversation,
    HfColumns,
    PreferencePair,
    ReadOptions,
    hf_dataset_records,
    llava_records,
    made_up_records,
    openai_records,
    read_llava,
    read_rlaif_v,
    rlaif_v_records,
)
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
TEXT: dict[str, Any] = {"id": "t", "conversations": GOOD["conversations"][2:]}
CHAT: dict[str, Any] = {
    "id": "c",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "A seven."},
    ],
}


def write_lines(path: Path, *records: Any) -> Path:
    """A file of lines; text goes in as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    return path


def options(root: Path | str = ".", **others: Any) -> ReadOptions:
    """Options of a source whose images lie in `root`."""
    return ReadOptions(image_root=root, **others)


def reasons(reads: Iterator[Any]) -> list[str]:
    """The bad ones of a stream, as sentences."""
    return [str(read) for read in reads if isinstance(read, BadRecord)]


# ---- LLaVA ----


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
    # By the record's word for it, not by a path of this machine: the message may end in a lake.
    with pytest.raises(ImageError, match=r"^image_missing: a\.png: No such file or directory$"):
        conversation.images[0].load()


def test_several_images_and_none(tmp_path: Path) -> None:
    """Two placeholders take two images in order; a record without images is text."""
    turns = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "No."}]
    several = {"id": "m", "images": ["a.png", "b.png"], "conversations": turns}
    file = write_lines(tmp_path / "data.jsonl", several, "", TEXT, TEXT | {"image": None}, TEXT | {"image": ""})
    two, *none = read_llava(file, tmp_path)
    assert [part["type"] for part in two.messages[0]["content"]] == ["image", "image", "text"]
    assert [image.key for image in two.images] == ["a.png", "b.png"]
    assert [record.images for record in none] == [(), (), ()]


BAD_LLAVA = [
    ("{", "not valid JSON"),
    ("[]", "expected an object"),
    ('"text"', "expected an object"),
    ({"id": 1}, "conversations missing"),
    (GOOD | {"image": ["a", "b"]}, "1 <image> placeholders but 2 images"),
    (GOOD | {"image": None}, "1 <image> placeholders but 0 images"),
    (GOOD | {"image": {"path": "a.png"}}, "`image` must be a path or a list"),
    (GOOD | {"image": "../secret.png"}, "leads out of image_root"),
    (GOOD | {"image": "/etc/passwd"}, "leads out of image_root"),
    (GOOD | {"image": "file:///etc/passwd"}, "no address that images are loaded from"),
    (GOOD | {"image": "a\0.png"}, "not the name of an image"),
    (GOOD | {"image": "data:image/png;base64,###"}, "not valid base64"),
    (GOOD | {"conversations": [{"from": "cat", "value": "?"}]}, "turn 0 must be"),
    (GOOD | {"conversations": [{"from": ["human"], "value": "?"}]}, "turn 0 must be"),
    (GOOD | {"conversations": [{"from": "human", "value": 3}]}, "turn 0 must be"),
    (GOOD | {"conversations": []}, "non-empty list"),
    (TEXT | {"conversations": TEXT["conversations"][:1]}, "last turn must be the assistant's"),
    (TEXT | {"id": True}, "`id` must be a string or a whole number"),
    (TEXT | {"id": 1.5}, "`id` must be a string or a whole number"),
    (TEXT | {"id": ""}, "`id` is empty"),
    (TEXT | {"id": "a\0b"}, r"`id` holds U\+0000"),
    (TEXT | {"id": "a\nb"}, r"`id` holds U\+000A"),
    (TEXT | {"id": "\ud800"}, r"`id` holds U\+D800"),
    (TEXT | {"id": "é" * 513}, "`id` has 1026 bytes, at most 1024"),
    (TEXT | {"id": "x" * 4096}, "`id` has 4096 bytes, at most 1024"),
    (TEXT | {"task": "\udc00"}, r"`task` holds U\+DC00"),
    ('{"id": 1, "conversations": [{"from": "gpt", "value": "\\udfff"}]}', r"`value` holds U\+DFFF"),
    ("[" * 100_000, "not valid JSON"),
    ('{"id": ' + "9" * 5000 + "}", "not valid JSON"),
]


@pytest.mark.parametrize(("record", "said"), BAD_LLAVA, ids=[said for _, said in BAD_LLAVA])
def test_a_bad_line_is_named_and_does_not_stop_the_stream(tmp_path: Path, record: Any, said: str) -> None:
    """Between two good records stands a bad one: its line and reason are said, the others are read."""
    file = write_lines(tmp_path / "data.jsonl", GOOD, record, TEXT)
    first, bad, last = llava_records(file, options(tmp_path))
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    assert isinstance(bad, BadRecord)
    assert bad.where == "data.jsonl: line 2"
    with pytest.raises(DataError, match=said):
        raise DataError(bad.reason)
    if "last turn" not in said:
        with pytest.raises(DataError, match=f"line 2: .*{said}"):
            list(read_llava(file, tmp_path))


@pytest.mark.parametrize("given", ["a/b/c", "🦙", "日本語", "a b", "x" * 1024, "é" * 512, "👩‍👩‍👧", 0, -5, "00"])
def test_an_id_may_be_anything_that_can_be_read_back(tmp_path: Path, given: Any) -> None:
    """Slashes, emoji, any script, a whole KiB: the id comes as it was written."""
    (record,) = read_llava(write_lines(tmp_path / "data.jsonl", TEXT | {"id": given}), tmp_path)
    assert record.sample_id == str(given)


def test_a_record_without_an_id_is_named_by_its_place(tmp_path: Path) -> None:
    """File and line, or place in the list; below a folder, with the way there, so that two files do not collide."""
    nameless = {"conversations": TEXT["conversations"]}
    write_lines(tmp_path / "in" / "a" / "x.jsonl", "", nameless)
    write_lines(tmp_path / "in" / "b" / "x.jsonl", nameless)
    (tmp_path / "in" / "y.json").write_text(json.dumps([nameless, nameless]))
    records = list(llava_records(tmp_path / "in", options()))
    assert [record.sample_id for record in records if isinstance(record, Conversation)] == [
        "a/x-2",
        "b/x-1",
        "y-0",
        "y-1",
    ]
    assert [record.where for record in records] == [
        "a/x.jsonl: line 2",
        "b/x.jsonl: line 1",
        "y.json: record 0",
        "y.json: record 1",
    ]


def test_a_pattern_takes_the_files_that_match(tmp_path: Path) -> None:
    """In order of name; ids and places begin where the pattern does."""
    for name in ("b", "a", "other"):
        write_lines(tmp_path / f"{name}.jsonl", TEXT | {"id": name})
    records = list(llava_records(tmp_path / "[ab].jsonl", options()))
    assert [record.where for record in records] == ["a.jsonl: line 1", "b.jsonl: line 1"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("data.json", "{}", r"a list of records; got an object.*\.jsonl"),
        ("data.json", "", "got an empty file"),
        ("data.json", '[{"id": 1}, {"id": ', "not valid JSON in or after record 1"),
        ("data.json", "[1, 2} 3", "not valid JSON in or after record"),
        ("data.json", "[\x80", "not valid JSON"),
    ],
)
def test_a_file_that_cannot_be_followed_is_an_error_of_the_file(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    """Where the next record begins is not known any more: that is nothing to skip."""
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=said):
        list(llava_records(tmp_path / name, options()))


def test_a_path_that_holds_nothing_is_an_error(tmp_path: Path) -> None:
    """No file, an empty folder, a pattern without a match: each says so."""
    for path, said in ((tmp_path / "no.json", "no such file"), (tmp_path, "no file"), (tmp_path / "*.json", "no file")):
        with pytest.raises(DataError, match=said):
            list(llava_records(path, options()))


def test_no_records_are_no_error(tmp_path: Path) -> None:
    """An empty list and an empty file of lines are data of no records."""
    (tmp_path / "a.json").write_text("\ufeff []", encoding="utf-8")
    write_lines(tmp_path / "b.jsonl")
    assert list(llava_records(tmp_path, options())) == []


def test_line_numbers_count_line_feeds_alone(tmp_path: Path) -> None:
    """A text may hold U+2028 and U+0085, a file may begin with a byte order mark and end lines as Windows does."""
    turns = [{"from": "human", "value": "a\u2028b\u0085c"}, {"from": "gpt", "value": "d"}]
    first = json.dumps({"id": 1, "conversations": turns}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_bytes(f"\ufeff{first}\r\n\r\nnot JSON\r\n".encode())
    good, bad = llava_records(tmp_path / "data.jsonl", options())
    assert isinstance(good, Conversation)
    assert good.messages[0]["content"][0]["text"] == "a\u2028b\u0085c"
    assert bad.where == "data.jsonl: line 3"


# ---- OpenAI ----


def test_openai_messages_and_batch_requests_say_the_same(tmp_path: Path, png: Callable[[int], bytes]) -> None:
    """The batch file's `custom_id` and `body` are the record's id and messages; parts keep their order."""
    inline = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
    messages = json.loads(json.dumps(CHAT["messages"]).replace("a.png", inline))
    batch = {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "max_tokens": 9, "messages": messages},
    }
    plain, requested = openai_records(
        write_lines(tmp_path / "b.jsonl", {"id": "c", "messages": messages}, batch), options()
    )
    assert isinstance(plain, Conversation)
    assert plain == requested
    assert plain.messages == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A seven."},
    ]
    assert plain.images[0].load() == png(1)
    assert plain.images[0].key == hashlib.sha256(png(1)).hexdigest()


def test_openai_images_are_files_addresses_or_a_list(tmp_path: Path) -> None:
    """A name below image_root, an https address, an object; or a list with `<image>` where each stands."""

    def chat(*urls: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]}

    turns = [{"role": "user", "content": "Is <image> like <image>?"}, {"role": "assistant", "content": "no"}]
    listed = {"messages": turns, "images": ["a.png", "b.png"]}
    file = write_lines(tmp_path / "b.jsonl", chat("a.png", "https://h.example/x?sig=1", "s3://b/x.png"), listed)
    first, second = (read for read in openai_records(file, options(tmp_path)) if isinstance(read, Conversation))
    assert first.images[0].path == tmp_path / "a.png"
    assert [image.uri for image in first.images[1:]] == ["https://h.example/x?sig=1", "s3://b/x.png"]
    assert [part["type"] for part in second.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert [image.key for image in second.images] == ["a.png", "b.png"]


def test_prompts_need_no_answer_when_the_caller_says_so(tmp_path: Path) -> None:
    """The same line is bad for scoring and good for generation."""
    file = write_lines(tmp_path / "p.jsonl", {"messages": CHAT["messages"][:2]})
    assert reasons(openai_records(file, options())) == [
        "p.jsonl: line 1: the last turn must be the assistant's, got 'user'; there is no response to score"
    ]
    assert reasons(openai_records(file, options(needs_response=False))) == []


def _chat(content: Any, role: str = "user", **others: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}, {"role": "assistant", "content": "ok"}], **others}


BAD_OPENAI = [
    ({"body": {}}, "body.messages"),
    ({"body": 3}, "body.messages"),
    ({"messages": "hello"}, "non-empty list of turns"),
    (_chat("hello", "tool"), "turn 0 must be from system"),
    (_chat(None), "`content` must be text or a list"),
    (_chat([{"type": "input_audio", "input_audio": {}}]), "a part must be text or image_url"),
    (_chat([{"type": "image_url", "image_url": {}}]), "`image_url` must be"),
    (_chat("what is <image>?"), "the text holds <image>"),
    (_chat([{"type": "image_url", "image_url": "a.png"}], images=["a.png"]), "write it once"),
    (_chat("<image>", images=[]), "1 <image> placeholders but 0 images"),
    (_chat("hi", tools=[{}]), "asks for tools"),
    (_chat("hi", n=2), "several choices"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]}, "calls a tool"),
]


@pytest.mark.parametrize(("record", "said"), BAD_OPENAI, ids=[said for _, said in BAD_OPENAI])
def test_what_a_teacher_cannot_be_asked_is_refused(tmp_path: Path, record: Any, said: str) -> None:
    """Nothing of a request is left out in silence."""
    (reason,) = reasons(openai_records(write_lines(tmp_path / "b.jsonl", record), options()))
    assert reason.startswith("b.jsonl: line 1: ")
    assert said in reason


# ---- RLAIF-V ----

PAIR = {
    "idx": 3,
    "ds_name": "RLAIF-V",
    "origin_split": json.dumps({"type": "caption", "model": "m"}),
    "image": {"bytes": b"png", "path": "x"},
    "question": "Q",
    "chosen": "a",
    "rejected": "b",
}


def test_rlaif_v_rows_and_their_faults(tmp_path: Path) -> None:
    """A row becomes a pair with its image at hand; equal answers and empty images are refused by row."""
    good = tmp_path / "good.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR]), good)
    (pair,) = read_rlaif_v(good)
    assert (pair.pair_id, pair.chosen, pair.rejected, pair.images[0].load()) == ("3", "a", "b", b"png")
    assert (pair.task, pair.source) == ("caption", "RLAIF-V")
    faults = (
        ({"rejected": "a"}, "row 1: chosen and rejected are the same"),
        ({"image": {"bytes": b"", "path": "x"}}, r"row 1: `image\.bytes` is empty"),
        ({"question": " "}, "row 1: `question` must be"),
    )
    for fault, said in faults:
        bad = tmp_path / "bad.parquet"
        pq.write_table(pa.Table.from_pylist([PAIR, PAIR | fault]), bad)
        with pytest.raises(DataError, match=said):
            list(read_rlaif_v(bad))


def test_rlaif_v_folders_are_read_in_order_of_name(tmp_path: Path) -> None:
    """Rows without an id get the file's name; a bad row in one file is skipped over, not the file."""
    nameless = {key: value for key, value in PAIR.items() if key not in ("idx", "origin_split", "ds_name")}
    for name, rows in (("b", [nameless]), ("a", [nameless, nameless | {"chosen": "b"}, nameless])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    reads = list(rlaif_v_records(tmp_path, options(task="preference")))
    assert [read.pair_id for read in reads if isinstance(read, PreferencePair)] == ["a-0", "a-2", "b-0"]
    assert {read.task for read in reads if isinstance(read, PreferencePair)} == {"preference"}
    assert [read.where for read in reads if isinstance(read, BadRecord)] == ["a.parquet: row 1"]


def test_a_table_that_cannot_be_read_is_an_error_of_the_file(tmp_path: Path) -> None:
    """Not Parquet, cut short, or other columns: the message names the file."""
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"x\.parquet: not a readable Parquet file"):
        list(read_rlaif_v(file))
    pq.write_table(pa.Table.from_pylist([{"question": "q"}]), file)
    with pytest.raises(DataError, match="columns chosen, image, rejected missing; it has question"):
        list(read_rlaif_v(file))
    with pytest.raises(DataError, match="column messages or conversations missing"):
        list(hf_dataset_records(file, HfColumns(), options()))


# ---- Hugging Face datasets on disk ----


def save_to_disk(folder: Path, rows: list[dict[str, Any]], num_files: int = 1) -> None:
    """What `Dataset.save_to_disk` leaves: Arrow streams, and state.json that names them."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    files = [f"data-{number:05d}-of-{num_files:05d}.arrow" for number in range(num_files)]
    size = -(-len(rows) // num_files)
    for number, name in enumerate(files):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(number * size, size))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))


HF_ROWS = [
    {
        "id": f"h{number}",
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"answer {number}"}]},
        ],
        "images": [{"bytes": b"png%d" % number, "path": None}],
    }
    for number in range(5)
]


def test_a_saved_dataset_is_read_without_its_library(tmp_path: Path) -> None:
    """All files in the order of state.json, images from their structs."""
    save_to_disk(tmp_path / "set", HF_ROWS, num_files=2)
    records = [
        read for read in hf_dataset_records(tmp_path / "set", HfColumns(), options()) if not isinstance(read, BadRecord)
    ]
    assert [record.sample_id for record in records] == [f"h{number}" for number in range(5)]
    assert [record.images[0].load() for record in records] == [b"png%d" % number for number in range(5)]
    assert records[0].messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "answer 0"},
    ]
    assert records[3].where == "data-00001-of-00002.arrow: row 0"


def test_a_saved_dictionary_of_splits_names_each_split(tmp_path: Path) -> None:
    """`dataset_dict.json` lists the folders; each is the split of its records."""
    for split in ("train", "test"):
        save_to_disk(tmp_path / split, HF_ROWS[:2])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    reads = list(hf_dataset_records(tmp_path, HfColumns(), options(split="unused")))
    assert [read.split for read in reads if isinstance(read, Conversation)] == ["train", "train", "test", "test"]


def test_other_columns_llava_turns_and_paths(tmp_path: Path) -> None:
    """Columns by name, `from`/`value` turns, one image a row as a path below image_root; Arrow file format, too."""
    rows = [
        {
            "key": 1,
            "dialog": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}],
            "photo": {"bytes": None, "path": "a.png"},
            "kind": "caption",
        }
    ]
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    columns = HfColumns(messages="dialog", images="photo", id="key", task="kind")
    (record,) = hf_dataset_records(tmp_path / "x.arrow", columns, options(tmp_path))
    assert isinstance(record, Conversation)
    assert (record.sample_id, record.task) == ("1", "caption")
    assert record.images[0].path == tmp_path / "a.png"
    with pytest.raises(DataError, match="column pictures missing"):
        list(hf_dataset_records(tmp_path / "x.arrow", HfColumns(messages="dialog", images="pictures"), options()))


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    """An image without bytes or path, a row without turns: bad records, not an end."""
    rows = [HF_ROWS[0], HF_ROWS[1] | {"images": [{"bytes": None, "path": None}]}, HF_ROWS[2] | {"messages": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert reasons(hf_dataset_records(tmp_path / "x.parquet", HfColumns(), options())) == [
        "x.parquet: row 1: an image must have `bytes` or a `path`, got {'bytes': None, 'path': None}",
        "x.parquet: row 2: `messages` must be a non-empty list of turns, got None",
    ]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"_data_files": []}, "names no data files"),
        ({"_data_files": [{"filename": "../../etc/passwd"}]}, "not in the folder"),
        ({"_data_files": [{"filename": "x.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}, "flatten_indices"),
        ([], "expected an object"),
    ],
)
def test_a_saved_dataset_that_is_not_whole_is_refused(tmp_path: Path, state: Any, said: str) -> None:
    """state.json is checked before anything is read."""
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=said):
        list(hf_dataset_records(tmp_path, HfColumns(), options()))


# ---- made up ----


def test_made_up_records_are_a_function_of_seed_and_number() -> None:
    """The same every time, other with another seed, distinct, and longer streams begin as shorter ones."""
    ten = list(made_up_records(10, images=True))
    assert ten == list(made_up_records(200, images=True))[:10]
    assert ten != list(made_up_records(10, images=True, seed=1))
    many = list(made_up_records(10_000))
    assert len({json.dumps(record.messages) for record in many}) == len({record.sample_id for record in many}) == 10_000


def test_made_up_records_have_the_words_and_images_asked_for() -> None:
    """Words by count; pictures that PIL reads, 64 of them."""
    from logitlake_shared.images import decode_image

    records = list(made_up_records(130, prompt_words=3, response_words=5, images=True))
    question = records[129].messages[0]["content"][1]["text"]
    assert question.startswith("129: ")
    assert len(question.split()) == 4
    assert len(str(records[129].messages[1]["content"]).split()) == 5
    assert decode_image(records[0].images[0].load()).size == (32, 32)
    assert len({record.images[0].load() for record in records}) == 64
    assert all(record.images == () for record in made_up_records(3))
