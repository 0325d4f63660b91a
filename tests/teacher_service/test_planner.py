"""A plan is a function of the data: same data, same units, same digest; other data, another digest."""

from collections.abc import Callable
from typing import Any

import pytest

from logitlake_shared.errors import DataError
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import LlavaSource, RlaifVSource
from logitlake_teacher.planner import Plan, plan_pairs, plan_samples

UNIT_TOKENS = 100

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def plan(teacher_world: Any) -> Callable[..., Plan]:
    """`plan(unit_tokens)`: the plan of the LLaVA file as it is now."""
    renderer = Renderer(teacher_world.model_dir)
    source = LlavaSource(path=teacher_world.folder / "train.json", image_root=teacher_world.folder)
    return lambda unit_tokens=UNIT_TOKENS: plan_samples([source], renderer, unit_tokens)


def ids_of(plan: Plan) -> list[list[str]]:
    """The ids of each unit."""
    return [[item.item_id for item in unit.items] for unit in plan.units]


def test_every_sample_is_in_one_unit_within_the_budget(plan: Callable[..., Plan]) -> None:
    """None missing, none twice; a unit over the budget holds a single sample."""
    made = plan()
    assert sorted(item_id for ids in ids_of(made) for item_id in ids) == [f"s{number:03d}" for number in range(24)]
    for unit in made.units:
        assert sum(item.num_tokens for item in unit.items) <= UNIT_TOKENS or len(unit.items) == 1
    assert made.dataset.num_samples == 24


def test_samples_of_one_image_share_a_unit(plan: Callable[..., Plan]) -> None:
    """Where they fit the budget; then each image is stored once."""
    made = plan(1000)
    units_of_image: dict[tuple[str, ...], set[str]] = {}
    for unit in made.units:
        for item in unit.items:
            units_of_image.setdefault(item.image_sha256, set()).add(unit.unit_id)
    assert len(units_of_image) == 6
    assert all(len(units) == 1 for units in units_of_image.values())


def test_a_budget_below_one_sample_gives_a_unit_each(plan: Callable[..., Plan]) -> None:
    """A sample is never cut."""
    assert [len(ids) for ids in ids_of(plan(1))] == [1] * 24


def test_the_order_of_the_records_does_not_matter(
    plan: Callable[..., Plan], teacher_world: Any, records: Records
) -> None:
    """The same records in another order are the same dataset: same units, names and digest."""
    before = plan()
    teacher_world.write_records(records()[::-1])
    after = plan()
    assert [unit.unit_id for unit in before.units] == [unit.unit_id for unit in after.units]
    assert ids_of(before) == ids_of(after)
    assert before.dataset == after.dataset


def _answer(world: Any, records: list[dict[str, Any]]) -> None:
    records[0]["conversations"][1]["value"] += "!"


def _task(world: Any, records: list[dict[str, Any]]) -> None:
    records[0]["task"] = "reading"


def _id(world: Any, records: list[dict[str, Any]]) -> None:
    records[0]["id"] = "s999"


def _one_less(world: Any, records: list[dict[str, Any]]) -> None:
    records.pop()


def _pixel(world: Any, records: list[dict[str, Any]]) -> None:
    (world.folder / "images" / "0.png").write_bytes((world.folder / "images" / "1.png").read_bytes())


@pytest.mark.parametrize("change", [_answer, _task, _id, _one_less, _pixel])
def test_whatever_reaches_the_lake_is_in_the_digest(
    plan: Callable[..., Plan], teacher_world: Any, records: Records, change: Callable[[Any, Any], None]
) -> None:
    """An answer, a task, an id, a missing record, other bytes behind an image's name."""
    before = plan()
    changed = records()
    change(teacher_world, changed)
    teacher_world.write_records(changed)
    assert plan().dataset.snapshot_sha256 != before.dataset.snapshot_sha256


def test_pairs_keep_prompt_and_both_responses(teacher_world: Any) -> None:
    """Chosen and rejected end with EOS and share one prompt with one placeholder."""
    renderer = Renderer(teacher_world.model_dir)
    made = plan_pairs([RlaifVSource(path=teacher_world.folder / "preference.parquet")], renderer, 1000)
    (unit,) = made.units
    assert len(unit.items) == 6
    for pair in unit.items:
        assert renderer.decode(pair.chosen_ids) == f"a red {pair.pair_id}"
        assert renderer.decode(pair.rejected_ids) == f"two blue {pair.pair_id}"
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == renderer.eos_id
        assert pair.prompt_ids.tolist().count(renderer.image_token_id) == 1


def test_two_sources_may_not_share_an_id(teacher_world: Any) -> None:
    """The message names both places."""
    renderer = Renderer(teacher_world.model_dir)
    source = LlavaSource(path=teacher_world.folder / "train.json", image_root=teacher_world.folder)
    with pytest.raises(DataError, match=r"train\.json: sample 's000'.*taken by .*train\.json: sample 's000'"):
        plan_samples([source, source], renderer, UNIT_TOKENS)


def test_limit_takes_the_top_of_the_file(teacher_world: Any) -> None:
    """For trials: the first records, not a draw."""
    renderer = Renderer(teacher_world.model_dir)
    source = LlavaSource(path=teacher_world.folder / "train.json", image_root=teacher_world.folder, limit=3)
    ids = [item_id for unit in ids_of(plan_samples([source], renderer, UNIT_TOKENS)) for item_id in unit]
    assert sorted(ids) == ["s000", "s001", "s002"]
