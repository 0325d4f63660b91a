"""Token ids as data: what a text becomes, and the ids that it becomes, are one thing to plan and to capture."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from logitlake_shared.errors import DataError
from logitlake_shared.lake import Lake
from logitlake_shared.messages import messages_text
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import CaptureConfig, FakeSource, PairsConfig, TokensSource
from logitlake_teacher.items import PlannedSample
from logitlake_teacher.planning import Plan, check_plan

LISTS = ("prompt_ids", "prompt_lengths", "response_ids", "response_lengths")
TOPK = (*LISTS, "k", "topk_ids", "topk_logprobs", "label_logprob", "label_rank", "log_tail_mass", "entropy")


def samples_of(plan: Plan) -> list[PlannedSample]:
    """All samples of a plan, in order."""
    return [item for unit in plan.units for item in unit.items if isinstance(item, PlannedSample)]


def row_of(sample: PlannedSample, *, with_messages: bool = True, with_images: bool = False) -> dict[str, Any]:
    """The sample as a row of a token file."""
    row = {"sample_id": sample.sample_id, **{name: getattr(sample, name).tolist() for name in LISTS}}
    row |= {"task": sample.task, "source": sample.source, "split": sample.split}
    if with_messages:
        row["messages"] = messages_text(sample.messages)
    if with_images:
        row["images"] = [image.name for image in sample.images]
    return row


@pytest.fixture
def good_row(teacher_world: Any) -> dict[str, Any]:
    """Two turns of a few tokens, in the tiny teacher's ids."""
    eos = Renderer(teacher_world.model_dir).eos_id
    return {
        "sample_id": "good",
        "prompt_ids": [5, 6, 7, 8],
        "prompt_lengths": [3, 1],
        "response_ids": [9, eos, 10, 11, eos],
        "response_lengths": [2, 3],
    }


@pytest.fixture
def tokens(teacher_world: Any) -> Callable[..., TokensSource]:
    """`tokens(rows, **keys)`: a source of these rows, in a Parquet file of their own."""

    def make(rows: list[dict[str, Any]], name: str = "tokens.parquet", **keys: Any) -> TokensSource:
        path = teacher_world.folder / name
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        return TokensSource(path=path, image_root=str(teacher_world.folder), **keys)

    return make


def test_a_text_and_its_ids_are_one_plan(teacher_world: Any, tokens: Callable[..., TokensSource]) -> None:
    """Several turns, images, order of the rows: same units, same names, same digest, same items.

    `where` alone differs: it names the file that a row came from, and reaches no digest and no lake.
    """
    text = teacher_world.plan()
    rows = [row_of(sample, with_images=True) for sample in samples_of(text)][::-1]
    ids = teacher_world.plan("samples", tokens(rows))
    assert list(ids.unit_ids) == list(text.unit_ids)
    assert ids.dataset == text.dataset
    assert ids.figures == text.figures
    for one, other in zip(samples_of(ids), samples_of(text), strict=True):
        assert one.images == other.images
        assert one.messages == other.messages
        assert row_of(one) == row_of(other)


def test_a_text_and_its_ids_are_one_capture(
    teacher_world: Any, tokens: Callable[..., TokensSource], teacher_command: Callable[..., Any]
) -> None:
    """Byte for byte, fingerprint included: a capture of the ids even goes on where one of the text was stopped."""
    source = tokens([row_of(sample, with_images=True) for sample in samples_of(teacher_world.plan())])
    lakes = []
    for name, data in (
        ("text", {"type": "llava", "path": str(teacher_world.folder / "train.json")}),
        ("ids", {"type": "tokens", "path": str(source.path)}),
    ):
        lake = teacher_world.folder / name
        config = teacher_world.config(name=f"{name}.toml", lake={"uri": str(lake)})
        data |= {"image_root": str(teacher_world.folder)}
        done = teacher_command("capture", config, "data=[" + _inline(data) + "]")
        assert done.code == 0, done.err
        lakes.append(teacher_world.contents(lake=lake))
    assert lakes[0] == lakes[1]


def _inline(table: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


def test_ids_alone_give_the_same_top_k(
    teacher_world: Any, tokens: Callable[..., TokensSource], teacher_command: Callable[..., Any]
) -> None:
    """Without conversations the same samples are asked about in the same order and the same pieces.

    Names of units, digest and fingerprint differ, because a lake keeps `messages`; everything of the teacher is equal.
    """
    made = FakeSource(num_samples=40)
    source = tokens([row_of(sample, with_messages=False) for sample in samples_of(teacher_world.plan("samples", made))])
    for name, data in (("text", {"type": "fake", "num_samples": 40}), ("ids", {"type": "tokens", "path": source.path})):
        config = teacher_world.config(name=f"{name}.toml", lake={"uri": str(teacher_world.lake), "cache": name})
        (teacher_world.folder / name).mkdir()
        inline = ", ".join(f"{key} = {json.dumps(value, default=str)}" for key, value in data.items())
        done = teacher_command("capture", config, f"data=[{{{inline}}}]")
        assert done.code == 0, done.err
    text, ids = (_units(Lake.open(teacher_world.lake), name) for name in ("text", "ids"))
    assert len(text) > 1
    for one, other in zip(text, ids, strict=True):
        assert one.select(["sample_id", "task", "source", "split", *TOPK]) == other.select(
            ["sample_id", "task", "source", "split", *TOPK]
        )
        assert set(other.column("messages").to_pylist()) == {"[]"}


def _units(lake: Lake, name: str) -> list[pa.Table]:
    """The samples of each unit."""
    cache = lake.cache(name)
    return [cache.read(entry) for commit in cache.open_snapshot().commits for entry in commit.shards]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "null": ({"prompt_ids": None}, "`prompt_ids` is null"),
    "null inside": ({"response_ids": [9, None, 10, 11, 1]}, "`response_ids` holds a null"),
    "too large": ({"prompt_ids": [5, 6, 7, 2**40]}, "`prompt_ids` holds 1099511627776, which 32 bits cannot hold"),
    "vocabulary": ({"prompt_ids": [5, 6, 7, 999_999]}, r"`prompt_ids` holds 999999 at place 3, .* from 0 to \d+;"),
    "negative id": ({"response_ids": [-9, 1, 10, 11, 1]}, "`response_ids` holds -9 at place 0"),
    "prompt sum": ({"prompt_lengths": [3, 2]}, "`prompt_lengths` sum to 5, but `prompt_ids` holds 4 ids"),
    "response sum": ({"response_lengths": [2, 2]}, "`response_lengths` sum to 4, but `response_ids` holds 5 ids"),
    "negative length": ({"response_lengths": [7, -2]}, "`response_lengths` holds -2"),
    "segments": ({"prompt_lengths": [4]}, "1 prompt segments and 2 responses"),
    "no response": (
        {"response_ids": [], "response_lengths": [], "prompt_lengths": [], "prompt_ids": []},
        "no response",
    ),
    "empty response": ({"response_lengths": [5, 0]}, "response 1 is empty"),
    "no prompt": ({"prompt_lengths": [0, 4]}, "the first prompt segment is empty"),
    "no EOS": ({"response_ids": [9, 1, 10, 11, 12]}, "response 1 ends with 12 and not with the teacher's EOS, 1"),
    "no EOS inside": ({"response_ids": [9, 8, 10, 11, 1]}, "response 0 ends with 8"),
    "placeholder": ({"prompt_ids": [2, 6, 7, 8]}, "the prompt holds 1 image placeholders but 0 images were given"),
    "placeholder inside": ({"response_ids": [2, 1, 10, 11, 1]}, "an image placeholder stands inside a response"),
    "id": ({"sample_id": "a\nb"}, "`sample_id` holds U[+]000A"),
    "blank id": ({"sample_id": " "}, "`sample_id` is empty"),
    "long id": ({"sample_id": "a" * 2000}, "`sample_id` has 2000 bytes"),
    "messages": ({"messages": "[{"}, "`messages` is not JSON"),
    "turns": ({"messages": '[{"role": "cat", "content": "meow"}]'}, "`messages` must be a list of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_row_is_told_by_its_number(
    teacher_world: Any, tokens: Callable[..., TokensSource], good_row: dict[str, Any], fault: str
) -> None:
    """In the words of its fault, whatever stands around it; the others are planned as if it were not there."""
    renderer = Renderer(teacher_world.model_dir)
    assert (renderer.eos_id, renderer.image_token_id) == (1, 2)
    change, says = FAULTS[fault]
    plain = {"messages": None} if "messages" in change else {}
    rows = [good_row | plain | {"sample_id": f"s{number}"} for number in range(7)]
    rows[4] = rows[4] | change
    made = teacher_world.plan("samples", tokens(rows))
    assert made.figures.problems == {"record_invalid": 1}
    assert made.figures.fatal == 1
    with pytest.raises(DataError, match=rf"(?s)1 of 7 items.*tokens\.parquet: row 4: record_invalid: .*{says}"):
        check_plan(made)
    good = [sample for sample in samples_of(made) if sample.problem is None]
    assert sorted(sample.sample_id for sample in good) == ["s0", "s1", "s2", "s3", "s5", "s6"]
    assert all(sample.response_ids.tolist() == good_row["response_ids"] for sample in good)


def test_a_row_longer_than_the_context_is_told(
    teacher_world: Any, tokens: Callable[..., TokensSource], good_row: dict[str, Any]
) -> None:
    """With the code that an engine has for it; exactly the context's length is no fault."""
    fits = 4096 - len(good_row["response_ids"]) - 1
    rows = [
        good_row | {"sample_id": name, "prompt_ids": [5] * (length + 1), "prompt_lengths": [length, 1]}
        for name, length in (("fits", fits), ("long", fits + 1))
    ]
    made = teacher_world.plan("samples", tokens(rows, on_bad_record="skip"), unit_tokens=10_000)
    assert made.figures.problems == {"prompt_too_long": 1}
    (example,) = made.figures.examples
    assert example.startswith("tokens.parquet: row 1: prompt_too_long: the sample has 4097 tokens")
    check_plan(made)


def test_bad_rows_that_pass_become_errors_of_the_cache(
    teacher_world: Any,
    tokens: Callable[..., TokensSource],
    good_row: dict[str, Any],
    teacher_command: Callable[..., Any],
) -> None:
    """Counted, by id, and all others are captured."""
    source = tokens([good_row, good_row | {"sample_id": "bad", "prompt_lengths": [1, 1]}])
    data = {"type": "tokens", "path": str(source.path), "on_bad_record": "skip"}
    done = teacher_command("capture", teacher_world.config(), f"data=[{_inline(data)}]", "max_error_rate=0.5")
    assert done.code == 0, done.err
    (commit,) = Lake.open(teacher_world.lake).cache("capture").open_snapshot().commits
    assert [(error.sample_id, error.code) for error in commit.errors] == [("bad", "record_invalid")]
    assert [entry.rows for entry in commit.shards] == [1]


@pytest.mark.parametrize("type_", [pa.int32(), pa.int64(), pa.uint16(), pa.uint64()])
@pytest.mark.parametrize("list_", [pa.list_, pa.large_list])
def test_any_width_of_number_is_read(
    teacher_world: Any, good_row: dict[str, Any], type_: pa.DataType, list_: Callable[[pa.DataType], pa.DataType]
) -> None:
    """Tokenisers write int64, some packers uint16: the same plan."""
    schema = pa.schema([("sample_id", pa.string()), *((name, list_(type_)) for name in LISTS)])
    path = teacher_world.folder / "ids.parquet"
    pq.write_table(pa.Table.from_pylist([good_row], schema), path)
    (sample,) = samples_of(teacher_world.plan("samples", TokensSource(path=path)))
    for name in LISTS:
        assert getattr(sample, name).dtype == np.int32
        assert getattr(sample, name).tolist() == good_row[name]


def test_origin_and_names_come_from_the_row_or_the_table(
    teacher_world: Any, tokens: Callable[..., TokensSource], good_row: dict[str, Any]
) -> None:
    """A row's own word wins; one without an id is named by file and place, as in every other source."""
    other = good_row | {"sample_id": None, "task": "own", "source": None, "split": "test"}
    rows = [good_row | {"task": None, "source": "web", "split": None}, other]
    named, unnamed = sorted(
        samples_of(teacher_world.plan("samples", tokens(rows, task="table", split="dev"))),
        key=lambda sample: sample.task == "own",
    )
    assert (named.sample_id, named.task, named.source, named.split) == ("good", "table", "web", "dev")
    assert (unnamed.sample_id, unnamed.task, unnamed.source, unnamed.split) == ("tokens-1", "own", "tokens", "test")


def test_filters_and_limits_take_what_they_take_of_records(
    teacher_world: Any, tokens: Callable[..., TokensSource], good_row: dict[str, Any]
) -> None:
    """Tasks, turns, images, limits; a bad row comes along unless reading ended before it."""
    one_turn = {"prompt_ids": [5], "prompt_lengths": [1], "response_ids": [1], "response_lengths": [1]}
    rows = [
        good_row | {"sample_id": str(number), "task": "ab"[number % 2]} | (one_turn if number % 3 else {})
        for number in range(10)
    ]
    rows[8]["prompt_lengths"] = [9]

    def ids(**keys: Any) -> list[str]:
        limit = keys.pop("plan_limit", None)
        plan = teacher_world.plan("samples", tokens(rows, **keys), limit=limit)
        return sorted(sample.sample_id for sample in samples_of(plan))

    assert ids() == [str(number) for number in range(10)]
    assert ids(tasks=("a",)) == ["0", "2", "4", "6", "8"]
    assert ids(max_turns=1) == ["1", "2", "4", "5", "7", "8"]
    assert ids(max_turns=1, limit=3) == ["1", "2", "4"]
    assert ids(limit=8) == [str(number) for number in range(8)]
    assert ids(limit=9) == [str(number) for number in range(10)]
    assert ids(plan_limit=4) == ["0", "1", "2", "3"]
    assert ids(min_images=1) == ["8"]


def test_rows_of_several_batches_keep_their_numbers(
    teacher_world: Any, tokens: Callable[..., TokensSource], good_row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are read at once: the same plan, and the numbers of bad rows count from the file's first."""
    from logitlake_shared.data_formats import tokens as module

    rows = [good_row | {"sample_id": f"s{number}"} for number in range(20)]
    rows[13] |= {"prompt_lengths": [9, 9]}
    before = teacher_world.plan("samples", tokens(rows, on_bad_record="skip"))
    monkeypatch.setattr(module, "_BATCH_ROWS", 3)
    after = teacher_world.plan("samples", tokens(rows, "again.parquet", on_bad_record="skip", source="tokens"))
    assert before.dataset == after.dataset
    assert after.figures.examples[0].startswith("again.parquet: row 13: record_invalid")


def test_turns_may_be_a_column_of_turns(
    teacher_world: Any, tokens: Callable[..., TokensSource], good_row: dict[str, Any]
) -> None:
    """As in `hf_dataset`; and whether the images fit their placeholders is asked of them, too."""
    turns = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    (sample,) = samples_of(teacher_world.plan("samples", tokens([good_row | {"messages": turns}])))
    assert list(sample.messages) == [{"role": "user", "content": [{"type": "text", "text": "Sure?"}]}, turns[1]]


def test_prompts_may_wait_for_their_answer(
    teacher_world: Any,
    tokens: Callable[..., TokensSource],
    good_row: dict[str, Any],
    teacher_command: Callable[..., Any],
) -> None:
    """`mode.type = "generate"`: an empty last response is no fault, and the teacher's answer has no conversation."""
    waiting = good_row | {"response_ids": [9, 1], "response_lengths": [2, 0]}
    source = tokens([waiting])
    data = f"data=[{_inline({'type': 'tokens', 'path': str(source.path)})}]"
    done = teacher_command("capture", teacher_world.config(), data, 'mode={type="generate", max_new_tokens=4}')
    assert done.code == 0, done.err
    (table,) = _units(Lake.open(teacher_world.lake), "capture")
    assert table.column("prompt_ids").to_pylist() == [[5, 6, 7, 9, 1, 8]]
    assert table.column("messages").to_pylist() == ["[]"]
    assert 1 <= len(table.column("response_ids").to_pylist()[0]) <= 4


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("prompt_ids", ["a"], "column prompt_ids must hold lists of whole numbers, got string"),
        ("response_ids", [[0.5]], "column response_ids must hold lists of whole numbers"),
        ("sample_id", [0.5], "column sample_id must hold text or whole numbers, got double"),
        ("task", [7], "column task must hold text, got int64"),
        ("messages", [7], "column messages must hold turns"),
        ("prompt_lengths", None, "columns prompt_lengths missing"),
    ],
)
def test_a_file_of_other_columns_ends_the_command(
    teacher_world: Any, good_row: dict[str, Any], column: str, values: list[Any] | None, says: str
) -> None:
    """It is not this row or that one which is wrong."""
    table = pa.Table.from_pylist([good_row])
    if column in table.schema.names:
        table = table.drop_columns([column])
    if values is not None:
        table = table.append_column(column, pa.array(values))
    path = teacher_world.folder / "other.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=rf"other\.parquet: {says}"):
        teacher_world.plan("samples", TokensSource(path=path))


def test_text_that_is_not_utf8_ends_the_command(teacher_world: Any, good_row: dict[str, Any]) -> None:
    """Parquet does not look; here somebody does, and says where."""
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    table = pa.Table.from_pylist([good_row]).append_column("task", broken)
    path = teacher_world.folder / "latin.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=r"latin\.parquet: rows 0 to 0 are damaged: .*UTF8"):
        teacher_world.plan("samples", TokensSource(path=path))


def test_a_column_of_nothing_is_no_column(
    teacher_world: Any, tokens: Callable[..., TokensSource], good_row: dict[str, Any]
) -> None:
    """Null in every row, as writers leave it: ids by place, the table's origin, no conversation, no image."""
    nothing = dict.fromkeys(("sample_id", "task", "source", "split", "messages", "images"))
    (sample,) = samples_of(teacher_world.plan("samples", tokens([good_row | nothing])))
    assert (sample.sample_id, sample.task, sample.source) == ("tokens-0", "chat", "tokens")
    assert list(sample.messages) == []
    assert sample.images == ()


def test_what_needs_the_text_is_refused(teacher_world: Any) -> None:
    """A pass without images and pairs write prompts anew: the configuration is refused, before anything is read."""
    common = {
        "teacher": {"model_dir": "m"},
        "engine": {"type": "fake"},
        "lake": {"uri": "l", "cache": "c"},
        "data": [{"type": "tokens", "path": "ids.parquet"}],
    }
    assert CaptureConfig.model_validate(common)
    with pytest.raises(ValidationError, match="no_image_pass is true"):
        CaptureConfig.model_validate(common | {"no_image_pass": True})
    for kind in ("given", "made"):
        with pytest.raises(ValidationError, match="Input tag 'tokens' found"):
            PairsConfig.model_validate(common | {"pairs": {"type": kind}})
    with pytest.raises(DataError, match="a pairs capture cannot use this source"):
        teacher_world.plan("pairs", TokensSource(path=teacher_world.folder / "preference.parquet"))
