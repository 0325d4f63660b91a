"""A plan is a function of the data: same data, same units, same digest; other data, another digest."""

from collections.abc import Callable
from typing import Any

import pytest

from logitlake_shared.errors import DataError
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import FakeSource, LlavaSource, RlaifVSource
from logitlake_teacher.planning import Plan, check_plan
from logitlake_teacher.planning import intake as intake_module

# Sixteen of the fake teacher's four-token images and their questions fit about three to a unit.
UNIT_TOKENS = 100

Records = Callable[[], list[dict[str, Any]]]
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan_of(teacher_world: Any) -> MakePlan:
    """`plan_of("samples", source, ..., unit_tokens=...)`: the plan of sources as they are now."""
    make: MakePlan = teacher_world.plan
    return make


@pytest.fixture
def source(teacher_world: Any) -> LlavaSource:
    """The LLaVA file."""
    return LlavaSource(path=teacher_world.folder / "train.json", image_root=str(teacher_world.folder))


@pytest.fixture
def plan(plan_of: MakePlan, source: LlavaSource) -> Callable[..., Plan]:
    """`plan(unit_tokens)`: the plan of the LLaVA file as it is now."""
    return lambda unit_tokens=UNIT_TOKENS: plan_of("samples", source, unit_tokens=unit_tokens)


def ids_of(plan: Plan) -> list[list[str]]:
    """The ids of each unit."""
    return [[item.item_id for item in unit.items] for unit in plan.units]


def test_every_sample_is_in_one_unit_within_the_budget(plan: Callable[..., Plan]) -> None:
    """None missing, none twice; a unit over the budget holds a single sample."""
    made = plan()
    assert sorted(item_id for ids in ids_of(made) for item_id in ids) == [f"s{number:03d}" for number in range(24)]
    for unit in made.units:
        # Three tokens more for each sample's picture, of which its ids hold one.
        assert sum(item.num_tokens + 3 for item in unit.items) <= UNIT_TOKENS or len(unit.items) == 1
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


def test_pairs_keep_prompt_and_both_responses(teacher_world: Any, plan_of: MakePlan) -> None:
    """Chosen and rejected end with EOS and share one prompt with one placeholder."""
    renderer = Renderer(teacher_world.model_dir)
    made = plan_of("pairs", RlaifVSource(path=teacher_world.folder / "preference.parquet"), unit_tokens=1000)
    (unit,) = made.units
    assert len(unit.items) == 6
    for pair in unit.items:
        assert renderer.decode(pair.chosen_ids) == f"a red {pair.pair_id}"
        assert renderer.decode(pair.rejected_ids) == f"two blue {pair.pair_id}"
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == renderer.eos_id
        assert pair.prompt_ids.tolist().count(renderer.image_token_id) == 1
        assert [image.load() for image in pair.images]


def test_two_sources_may_not_share_an_id(plan_of: MakePlan, source: LlavaSource) -> None:
    """The message names both places."""
    with pytest.raises(DataError, match=r"train\.json: record 0: the id 's000' is taken by train\.json: record 0"):
        plan_of("samples", source, source)


@pytest.mark.parametrize("options", [{"limit": 3}, {}])
def test_limit_takes_the_top_of_the_data(plan_of: MakePlan, source: LlavaSource, options: dict[str, int]) -> None:
    """For trials: the first records, not a draw; of a source, or of all sources together."""
    own = source if options else source.model_copy(update={"limit": 3})
    ids = [item_id for unit in ids_of(plan_of("samples", own, **options)) for item_id in unit]
    assert sorted(ids) == ["s000", "s001", "s002"]


def test_a_limit_counts_over_all_sources(plan_of: MakePlan) -> None:
    """Two sources of five, seven records: five and two."""
    sources = [FakeSource(num_samples=5, source=name) for name in ("one", "other")]
    ids = [item_id for unit in ids_of(plan_of("samples", *sources, limit=7)) for item_id in unit]
    assert sorted(ids) == [*(f"one-{number}" for number in range(5)), "other-0", "other-1"]


def test_a_plan_is_used_again_until_something_changes(
    plan: Callable[..., Plan], teacher_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second plan reads no record; another image behind a name, and nothing else changed, makes a new one."""
    before = plan()

    def read(*_: Any) -> Any:
        pytest.fail("records were read again")

    with monkeypatch.context() as patch:
        patch.setattr(LlavaSource, "read", read)
        again = plan()
    assert again.dataset == before.dataset
    assert ids_of(again) == ids_of(before)
    assert again.figures == before.figures
    _pixel(teacher_world, [])
    assert plan().dataset != before.dataset


def test_processes_change_no_plan(plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered here or by workers: the same units, with the same names, in the same order."""
    monkeypatch.setattr(intake_module, "_BATCH", 8)
    monkeypatch.setattr(intake_module, "_BATCHES_HERE", 1)
    source = FakeSource(num_samples=100, images=True)
    here = plan_of("samples", source, processes=1)
    there = plan_of("samples", source, processes=2)
    assert here.dataset == there.dataset
    assert list(here.unit_ids) == list(there.unit_ids)


def test_units_are_read_when_they_are_asked_for(plan_of: MakePlan) -> None:
    """Any unit alone is what it is in the whole; numbers of items and tokens are known without reading it."""
    made = plan_of("samples", FakeSource(num_samples=60))
    whole = list(made.units)
    for place in (len(whole) - 1, 0, len(whole) // 2):
        assert made.units[place].unit_id == whole[place].unit_id == made.unit_ids[place]
        assert len(whole[place].items) == made.num_items[place]
        assert sum(item.num_tokens for item in whole[place].items) == made.num_tokens[place]
    assert sum(made.num_tokens) == made.figures.tokens


def test_parts_share_out_the_units(plan_of: MakePlan) -> None:
    """Every unit is in exactly one part, and those that are committed are in none."""
    made = plan_of("samples", FakeSource(num_samples=60))
    committed = set(made.unit_ids[:2])
    parts = [made.remaining(committed, (number, 3)) for number in (1, 2, 3)]
    ids = [unit.unit_id for part in parts for unit in part]
    assert sorted(ids) == sorted(set(made.unit_ids) - committed)
    assert sum(part.num_items for part in parts) == 60 - sum(made.num_items[:2])


def test_percentiles_of_lengths(plan_of: MakePlan, teacher_world: Any) -> None:
    """Exact, from the lengths of all items."""
    made = plan_of("samples", FakeSource(num_samples=500))
    lengths = sorted(item.num_tokens for unit in made.units for item in unit.items)
    assert made.figures.lengths == {"p50": lengths[249], "p95": lengths[474], "max": lengths[-1]}


def test_all_faults_are_said_at_once(plan: Callable[..., Plan], teacher_world: Any, records: Records) -> None:
    """A record without an answer and a missing picture: one plan, both counted, one error that shows both."""
    changed = records()
    changed[0]["conversations"].pop()
    teacher_world.write_records(changed)
    (teacher_world.folder / "images" / "5.png").unlink()
    made = plan()
    assert made.figures.problems == {"image_missing": 4, "record_invalid": 1}
    assert made.figures.fatal == 5
    with pytest.raises(DataError, match=r"(?s)5 of 24 items.*record 0: record_invalid.*5\.png"):
        check_plan(made)


def test_each_source_judges_its_own_problems(plan_of: MakePlan, source: LlavaSource, teacher_world: Any) -> None:
    """A missing picture of a source that lets it pass is counted and ends nothing; of a strict one it does."""
    (teacher_world.folder / "images" / "5.png").unlink()
    strict = FakeSource(num_samples=3)
    lenient = source.model_copy(update={"on_bad_record": "skip"})
    tolerated = plan_of("samples", lenient, strict)
    assert tolerated.figures.problems == {"image_missing": 4}
    check_plan(tolerated)
    refused = plan_of("samples", source, strict)
    assert refused.figures.problems == {"image_missing": 4}
    with pytest.raises(DataError, match="4 of 27 items"):
        check_plan(refused)
