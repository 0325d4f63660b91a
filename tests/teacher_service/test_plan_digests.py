"""The digests of a plan: what they are over, said once more the slow and obvious way, and pinned.

A digest that changes makes every capture that was begun before another dataset, which its cache refuses. So a change
here is a decision: of `planning.plan._RULE`, of the changelog, and of these values.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from logitlake_schemas import UnitError
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.messages import messages_text
from logitlake_teacher.config import FakeSource, LlavaSource, RlaifVSource
from logitlake_teacher.items import Item, PlannedPair, PlannedSample
from logitlake_teacher.planning import Plan
from logitlake_teacher.planning.rows import Draft, digests_of, rows_of

DIGITS = Path(__file__).parents[2] / "examples" / "digit_scenes" / "models" / "teacher"
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan_of(teacher_world: Any) -> MakePlan:
    """`plan_of("samples", source, ...)`."""
    make: MakePlan = teacher_world.plan
    return make


def digest(*parts: bytes) -> bytes:
    """Sixteen bytes over the parts, each behind its length in eight bytes."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(len(part).to_bytes(8, "little"))
        sha256.update(part)
    return sha256.digest()[:16]


def ids_of(item: Item) -> list[bytes]:
    """All lists of ids, as little-endian int32."""
    if isinstance(item, PlannedSample):
        lists = [item.prompt_ids, item.prompt_lengths, item.response_ids, item.response_lengths]
    else:
        lists = [item.prompt_ids, item.chosen_ids, item.rejected_ids]
    return [np.asarray(one, "<i4").tobytes() for one in lists]


def content_of(item: Item) -> bytes:
    """What the teacher is asked: ids, without the lengths of their pieces."""
    ids = ids_of(item)
    return digest(*(ids[::2] if isinstance(item, PlannedSample) else ids))


def order_of(item: Item) -> tuple[bytes, str]:
    """What items are sorted by: the names of their images, else what the teacher is asked; then their id."""
    keys = [image.key.encode() for image in item.images]
    return (digest(*keys) if keys else content_of(item)), item.item_id


def record_of(item: Item) -> bytes:
    """Everything of the record but the bytes of its images."""
    texts = [item.item_id, item.task, item.source, item.split, messages_text(item.messages)]
    return digest(*(text.encode() for text in texts), *ids_of(item))


def item_digest(item: Item) -> bytes:
    """Everything that reaches the lake or the teacher."""
    code = item.problem.code if item.problem else ""
    return digest(record_of(item), "".join(item.image_sha256).encode(), code.encode())


def items_of(plan: Plan) -> list[Item]:
    """All of a plan, in order."""
    return [item for unit in plan.units for item in unit.items]


def check_twin(plan: Plan) -> None:
    """Order, names of the units and the dataset's digest are what this file says they are."""
    items = items_of(plan)
    assert items
    assert items == sorted(items, key=order_of)
    assert plan.dataset.snapshot_sha256 == hashlib.sha256(b"".join(map(item_digest, items))).hexdigest()
    for number, unit in enumerate(plan.units):
        content = hashlib.sha256(b"".join(map(item_digest, unit.items))).hexdigest()
        assert unit.unit_id == f"{number:06d}-{content[:12]}"


def check_cut(plan: Plan, unit_tokens: int, more_tokens: Callable[[Item], int]) -> None:
    """Units are what a person would fill: items of one order key go in together, alone if they do not fit any unit."""
    groups: list[list[Item]] = []
    for item in items_of(plan):
        if groups and order_of(groups[-1][0])[0] == order_of(item)[0]:
            groups[-1].append(item)
        else:
            groups.append([item])

    def size(items: Sequence[Item]) -> int:
        return sum(item.num_tokens + more_tokens(item) for item in items)

    units: list[list[Item]] = []
    for group in groups:
        for piece in [group] if size(group) <= unit_tokens else [[item] for item in group]:
            if units and size(units[-1]) + size(piece) <= unit_tokens:
                units[-1] += piece
            else:
                units.append(list(piece))
    assert [[item.item_id for item in unit] for unit in units] == [
        [item.item_id for item in unit.items] for unit in plan.units
    ]


def test_text_plans_have_the_digests_of_their_twin(plan_of: MakePlan) -> None:
    """Made-up text, in many units and in one."""
    for unit_tokens in (60, 100_000):
        plan = plan_of("samples", FakeSource(num_samples=300), unit_tokens=unit_tokens)
        check_twin(plan)
        check_cut(plan, unit_tokens, lambda _: 0)


@pytest.mark.parametrize("unit_tokens", [1, 40, 100, 700])
def test_plans_with_images_have_the_digests_of_their_twin(
    plan_of: MakePlan, teacher_world: Any, unit_tokens: int
) -> None:
    """Images on disk, several turns; budgets below an item, below an image's items, and above."""
    own = LlavaSource(path=teacher_world.folder / "train.json", image_root=str(teacher_world.folder))
    plan = plan_of("samples", own, FakeSource(num_samples=20, images=True), unit_tokens=unit_tokens)
    check_twin(plan)
    # An image is one token of the ids and four of the fake teacher's.
    check_cut(plan, unit_tokens, lambda item: 3 * len(item.images))


def test_plans_of_pairs_have_the_digests_of_their_twin(plan_of: MakePlan, teacher_world: Any) -> None:
    """Two responses, one prompt."""
    check_twin(plan_of("pairs", RlaifVSource(path=teacher_world.folder / "preference.parquet"), unit_tokens=100))


def test_what_cannot_be_used_is_in_the_digest(plan_of: MakePlan, teacher_world: Any, records: Any) -> None:
    """A record that cannot be read, and an image that is gone, with the code of each."""
    changed = records()
    changed[3]["conversations"].pop()
    changed[4] = []
    teacher_world.write_records(changed)
    (teacher_world.folder / "images" / "5.png").unlink()
    plan = plan_of("samples")
    assert {item.problem.code for item in items_of(plan) if item.problem} == {"record_invalid", "image_missing"}
    check_twin(plan)


def test_frames_are_those_of_one_row_at_a_time() -> None:
    """`digests_of` columns: texts of any script, empty ones, lists, digests; whole, sliced and in chunks."""
    texts = ["", "a", "ab", "", "日本", "é" * 300]
    lists = [[], [1], [1, -2, 3], [2**31 - 1], [0] * 100, []]
    binary = [bytes([number] * 16) for number in range(6)]
    columns = (
        pa.array(texts),
        pa.array(lists, pa.list_(pa.field("element", pa.int32(), nullable=False))),
        pa.array(binary, pa.binary(16)),
    )
    expected = [
        digest(text.encode(), np.array(own, "<i4").tobytes(), data)
        for text, own, data in zip(texts, lists, binary, strict=True)
    ]
    assert digests_of(*columns).to_pylist() == expected
    assert digests_of(*(column.slice(2, 3) for column in columns)).to_pylist() == expected[2:5]
    chunked = (pa.chunked_array([column.slice(0, 4), column.slice(4)]) for column in columns)
    assert digests_of(*chunked).to_pylist() == expected
    assert digests_of(*(column.slice(0, 0) for column in columns)).to_pylist() == []


def test_nothing_moves_to_its_neighbour_unseen() -> None:
    """A letter more here and one less there is another record."""
    one, other = (digests_of(pa.array([a]), pa.array([b])) for a, b in (("ab", "c"), ("a", "bc")))
    assert one != other


SAMPLE = PlannedSample(
    "s-1",
    "caption",
    "photos",
    "train",
    [{"role": "user", "content": "Wer da? 日本"}, {"role": "assistant", "content": "Ich."}],
    np.array([3, 1, 4, 1, 5], np.int32),
    np.array([5], np.int32),
    np.array([9, 2], np.int32),
    np.array([2], np.int32),
    (),
    (),
)
PAIR = PlannedPair(
    "p-1",
    "preference",
    "photos",
    "train",
    SAMPLE.messages,
    SAMPLE.prompt_ids,
    np.array([9, 2], np.int32),
    np.array([7, 7, 2], np.int32),
    (ImageRef(path=Path("/anywhere/a.png"), name="a.png"), ImageRef(data=b"bytes")),
    (),
)
BROKEN = PlannedSample(
    "train.json: record 3",
    "",
    "",
    "",
    [],
    *(np.zeros(0, np.int32) for _ in range(4)),
    (),
    (),
    UnitError(sample_id="train.json: record 3", code="record_invalid", message="any"),
)
GOLDEN: dict[str, tuple[Any, Item, tuple[str, str, str]]] = {
    "sample": (
        "samples",
        SAMPLE,
        ("3aec33fe7a10a8f5791b94e32979a3fc", "3aec33fe7a10a8f5791b94e32979a3fc", "52744e6f213270e55dfaac288978f0ab"),
    ),
    "pair": (
        "pairs",
        PAIR,
        ("6c7a6cb892e17e2b4348cc5a0311c044", "2ba9fb3dc644ef5c4133e9de34de21ff", "a7e25df62e395d560babe9d6211e7d4e"),
    ),
    "broken": (
        "samples",
        BROKEN,
        ("374708fff7719dd5979ec875d56cd228", "374708fff7719dd5979ec875d56cd228", "2c1ad42964806033bbfcd8b80ecb10de"),
    ),
}
"""order key, content digest and record digest: `rows_of(kind, [Draft("", item)])`"""


@pytest.mark.parametrize("name", GOLDEN)
def test_digests_are_what_they_were(name: str) -> None:
    """Golden, and the twin's."""
    kind, item, expected = GOLDEN[name]
    rows = rows_of(kind, [Draft("", item)])
    got = tuple(rows.column(column)[0].as_py().hex() for column in ("order_key", "content_digest", "record_digest"))
    assert got == expected
    assert got == (order_of(item)[0].hex(), content_of(item).hex(), record_of(item).hex())


GOLDEN_PLAN = {
    False: (
        "d1bf2e292a9588fca99f5c47854d178fb829590058d1b55078ab97237776a6ca",
        ("000000-435ff2aa5901", "000099-5b38dcb9fd53"),
    ),
    True: (
        "3a3a4a18ff89e244dd6a89ef74704e964750aae6cc935cd50beda41e210c6df4",
        ("000000-ecae7c31f15b", "000099-7114d728b9b7"),
    ),
}
"""images: digest of the dataset, first and last unit of `FakeSource(num_samples=100)` for the digit scenes' teacher"""


@pytest.mark.parametrize("images", GOLDEN_PLAN)
def test_plans_are_what_they_were(teacher_world: Any, images: bool) -> None:
    """A capture that was begun by an earlier release goes on. The teacher is one whose tokenizer is committed."""
    world = replace(teacher_world, model_dir=DIGITS)
    plan = world.plan("samples", FakeSource(num_samples=100, images=images), unit_tokens=200)
    assert (plan.dataset.snapshot_sha256, (plan.unit_ids[0], plan.unit_ids[-1])) == GOLDEN_PLAN[images]
