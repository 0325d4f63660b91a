"""One unit: what is written is what the teacher said, and nothing else ever is."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitlake_schemas import CaptureSpec, CodecPolicy, SampledPolicy, UnitError
from logitlake_schemas.records import CaptureMode, GenerateMode, ScoreMode
from logitlake_shared.errors import DataError
from logitlake_shared.images import DecodedImage
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rendering import Renderer
from logitlake_shared.tools.verify import verify_unit
from logitlake_teacher.capture import capture_unit
from logitlake_teacher.config import FakeEngineConfig
from logitlake_teacher.engines import EngineSetup, ScoredSample, build_engine, identify_engine
from logitlake_teacher.engines.fake import FakeEngine
from logitlake_teacher.items import PlannedSample, Unit
from logitlake_teacher.planning import Plan
from logitlake_teacher.unit_images import load_images
from logitlake_teacher.unit_work import accept, accept_all, request_of

CODEC = CodecPolicy(k_max=8, k_min=8, p_min=0.0, grid="exact")


class Bench:
    """A plan, a fake teacher and an empty cache."""

    def __init__(self, world: Any) -> None:
        self.renderer = renderer = Renderer(world.model_dir)
        self.folder: Path = world.folder
        self.plan: Plan = world.plan(unit_tokens=200)
        self.setup = EngineSetup(world.model_dir, renderer.vocab_size, renderer.eos_id, renderer.image_token_id, 8, 1)
        self.spec = CaptureSpec(
            kind="samples",
            tokenizer=renderer.identity(),
            engine=identify_engine(FakeEngineConfig(), self.setup),
            codec=CODEC,
            dataset=self.plan.dataset,
        )

    def engine(self, **faults: Any) -> FakeEngine:
        """The fake teacher, with faults."""
        engine = build_engine(FakeEngineConfig(**faults), self.setup)
        assert isinstance(engine, FakeEngine)
        return engine

    def cache(self, name: str = "capture") -> Cache:
        """The cache of that name in the bench's lake."""
        return Lake.create(self.folder / "lake").create_cache(name, self.spec)


@pytest.fixture
def bench(teacher_world: Any) -> Bench:
    """A plan, a fake teacher and an empty cache."""
    return Bench(teacher_world)


def test_the_lake_holds_what_the_teacher_said(bench: Bench) -> None:
    """With the exact grid, every stored row is the truth over the vocabulary, cut at k, with the rest as tail."""
    engine, cache = bench.engine(), bench.cache()
    for unit in bench.plan.units:
        capture_unit(engine, unit, cache, {}, bench.renderer)
    cache.snapshot()
    dataset = LakeDataset(bench.folder / "lake", "capture")
    stored = {sample.sample_id: sample for sample in (dataset[position] for position in range(len(dataset)))}
    for unit in bench.plan.units:
        for item in unit.items:
            sample = stored.pop(item.item_id)
            images = {image.image_sha256: image for image in map(DecodedImage.of, sample.images)}
            assert isinstance(item, PlannedSample)
            request = request_of(item, images)
            truth_TV = engine.truth(request)
            rows = sample.rows
            topk_ids_TK = rows.topk_ids.reshape(-1, 8)
            best_TK = np.sort(truth_TV, axis=1)[:, ::-1][:, :8]
            np.testing.assert_allclose(rows.topk_logprobs.reshape(-1, 8), best_TK, rtol=1e-6)
            np.testing.assert_allclose(np.take_along_axis(truth_TV, topk_ids_TK, 1), best_TK)
            np.testing.assert_allclose(np.exp(rows.log_tail_mass_T), 1 - np.exp(best_TK).sum(1), atol=1e-6)
            labels_T = truth_TV[np.arange(len(truth_TV)), sample.response_ids]
            np.testing.assert_allclose(rows.label_logprob_T, labels_T, rtol=1e-6)
    assert not stored


def test_the_lake_holds_the_counts_of_the_draws(bench: Bench) -> None:
    """With the codec `sampled`, a unit holds the counts of N draws, is sound, and says that it has no stored error."""
    policy = SampledPolicy(type="sampled", draws=20, seed=1)
    setup = replace(bench.setup, sampled=policy)
    lake = Lake.create(bench.folder / "lake")
    cache = lake.create_cache("draws", bench.spec.model_copy(update={"codec": policy}))
    engine = build_engine(FakeEngineConfig(), setup)
    for unit in bench.plan.units:
        record = capture_unit(engine, unit, cache, {}, bench.renderer)
        assert record.stored_error is not None
        assert record.stored_error.kl_mean is None
        assert verify_unit(cache, record) == []
    cache.snapshot()
    dataset = LakeDataset(bench.folder / "lake", "draws")
    for position in range(len(dataset)):
        rows = dataset[position].rows
        counts = np.rint(np.exp(rows.topk_logprobs.astype(np.float64)) * policy.draws)
        starts_T = np.cumsum(rows.k_T, dtype=np.int64) - rows.k_T
        assert np.add.reduceat(counts, starts_T).tolist() == [policy.draws] * len(rows.k_T)


@pytest.mark.parametrize("mode", [ScoreMode(), GenerateMode(type="generate", max_new_tokens=3)])
@pytest.mark.parametrize("crashes", [0, 1])
def test_a_plans_rows_are_written_as_its_items_are(bench: Bench, mode: CaptureMode, crashes: int) -> None:
    """Two roads to one shard, byte for byte: the unit of a plan, and one that is made of the same items.

    Also where an item is left out, and where the teacher writes answers that no plan holds.
    """
    spec = bench.spec.model_copy(update={"mode": mode})
    for unit in bench.plan.units:
        crashed = {item.item_id: "teacher_crashed: told so" for item in unit.items[:crashes]}
        records = [
            capture_unit(
                bench.engine(),
                own,
                Lake.create(bench.folder / road).create_cache("capture", spec),
                crashed,
                bench.renderer,
            )
            for road, own in (("rows", unit), ("items", Unit(unit.unit_id, unit.items)))
        ]
        assert records[0] == records[1]
        assert len(records[0].errors) == crashes


def test_a_unit_crosses_to_another_process_as_rows(bench: Bench) -> None:
    """Whether its items were made or not: the same unit, and as few bytes as its rows."""
    fresh, used = bench.plan.units[0], bench.plan.units[0]
    assert used.items
    sent, sent_used = pickle.dumps(fresh), pickle.dumps(used)
    assert sent == sent_used
    arrived = pickle.loads(sent)
    assert arrived.unit_id == fresh.unit_id
    assert arrived.rows.equals(fresh.rows)
    assert [item.item_id for item in arrived.items] == [item.item_id for item in used.items]


def test_a_committed_unit_is_not_scored_again(bench: Bench) -> None:
    """The second publisher gets the first one's record without asking the teacher."""
    cache, unit = bench.cache(), bench.plan.units[0]
    first = capture_unit(bench.engine(), unit, cache, {}, bench.renderer)
    fails = bench.engine(raise_on=tuple(item.item_id for item in unit.items))
    assert capture_unit(fails, unit, cache, {}, bench.renderer) == first


def test_images_are_stored_once_a_unit(bench: Bench) -> None:
    """Four questions about a picture, one row of image bytes."""
    for unit in bench.plan.units:
        record = capture_unit(bench.engine(), unit, bench.cache(), {}, bench.renderer)
        (images,) = [entry for entry in record.shards if entry.kind == "images"]
        assert images.rows == len({sha256 for item in unit.items for sha256 in item.image_sha256})


def test_an_image_that_changed_after_planning_stops_the_capture(bench: Bench) -> None:
    """`input_changed`: what would be written is not what the fingerprint says."""
    (bench.folder / "images" / "0.png").write_bytes((bench.folder / "images" / "1.png").read_bytes())
    changed = [
        unit
        for unit in bench.plan.units
        if any(str(image.path).endswith("0.png") for item in unit.items for image in item.images)
    ]
    with pytest.raises(DataError, match="input_changed"):
        capture_unit(bench.engine(), changed[0], bench.cache(), {}, bench.renderer)


def _nan(answer: ScoredSample) -> ScoredSample:
    answer.rows.label_logprob_T[0] = np.nan
    return answer


def _unsorted(answer: ScoredSample) -> ScoredSample:
    answer.rows.topk_logprobs_TK[0] = answer.rows.topk_logprobs_TK[0, ::-1].copy()
    return answer


def _foreign_id(answer: ScoredSample) -> ScoredSample:
    answer.rows.topk_ids_TK[0, 0] = 300
    return answer


def _twice(answer: ScoredSample) -> ScoredSample:
    answer.rows.topk_ids_TK[0, 1] = answer.rows.topk_ids_TK[0, 0]
    return answer


def _too_much_mass(answer: ScoredSample) -> ScoredSample:
    answer.rows.log_tail_mass_T[0] = 0.0
    return answer


def _row_missing(answer: ScoredSample) -> ScoredSample:
    fewer = {name: value[:-1] for name, value in vars(answer.rows).items() if value is not None}
    return replace(answer, rows=replace(answer.rows, **fewer))


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_nan, "teacher_nonfinite"),
        (_unsorted, "teacher_invalid"),
        (_foreign_id, "teacher_invalid"),
        (_twice, "teacher_invalid"),
        (_too_much_mass, "teacher_invalid"),
        (_row_missing, "teacher_invalid"),
    ],
)
def test_an_impossible_answer_is_an_error_row_never_a_row(
    bench: Bench, damage: Callable[[ScoredSample], ScoredSample], code: str
) -> None:
    """The first sample of the unit gets the error, the others are captured."""

    class Damaged(FakeEngine):
        def score(self, requests: Any) -> Any:
            answers = super().score(requests)
            assert isinstance(answers[0], ScoredSample)
            return [damage(answers[0]), *answers[1:]]

    unit = bench.plan.units[0]
    record = capture_unit(Damaged(FakeEngineConfig(), bench.setup), unit, bench.cache(), {}, bench.renderer)
    assert [(error.sample_id, error.code) for error in record.errors] == [(unit.items[0].item_id, code)]
    (rows,) = [entry for entry in record.shards if entry.kind == "samples"]
    assert rows.rows == len(unit.items) - 1


def test_a_unit_of_nothing_but_errors_is_committed_too(bench: Bench) -> None:
    """Its record has the errors and no shard, and the plan is complete."""
    unit = bench.plan.units[0]
    crashed = {item.item_id: "teacher_crashed: ended" for item in unit.items}
    record = capture_unit(bench.engine(), unit, bench.cache(), crashed, bench.renderer)
    assert record.shards == ()
    assert [error.code for error in record.errors] == ["teacher_crashed"] * len(unit.items)
    assert bench.cache().committed_units() == {unit.unit_id}


def test_one_bad_answer_among_many_is_the_only_one_refused(bench: Bench) -> None:
    """Checked all at once or one by one: the same verdict on each, and the fault is laid at its own door."""
    unit = max(bench.plan.units, key=lambda unit: len(unit.items))
    images = load_images(unit.items)
    engine = bench.engine()
    samples = [item for item in unit.items if isinstance(item, PlannedSample)]
    answers = engine.score([request_of(sample, images.decoded) for sample in samples])
    labels = [sample.response_ids for sample in samples]
    spec = bench.cache().spec
    assert accept_all(unit.items, answers, labels, spec) == answers
    bad = len(answers) // 2
    assert isinstance(answers[bad], ScoredSample)
    answers[bad] = _twice(answers[bad])
    verdicts = accept_all(unit.items, answers, labels, spec)
    assert [isinstance(verdict, UnitError) for verdict in verdicts] == [place == bad for place in range(len(answers))]
    alone = [accept(*own, spec) for own in zip(unit.items, answers, labels, strict=True)]
    assert [type(verdict) for verdict in alone] == [type(verdict) for verdict in verdicts]
    assert alone[bad] == verdicts[bad]
