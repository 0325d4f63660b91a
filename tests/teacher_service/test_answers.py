"""Modes of a capture: responses of the data or of the teacher, and what the images add to them.

The fake teacher knows the whole truth for any prompt and any response, so every stored number is compared with it.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tests.teacher_service.conftest import noise_png

from logitlake_schemas import (
    CaptureSpec,
    CodecPolicy,
    DatasetIdentity,
    GenerateMode,
    SampledPolicy,
    Temperature,
    sha256_hex,
)
from logitlake_shared.alignment import interleave
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.errors import LakeError
from logitlake_shared.images import DecodedImage
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rendering import Renderer, without_images
from logitlake_shared.rows import LakeSample
from logitlake_shared.tools.verify import verify_unit
from logitlake_shared.topk import TeacherRows, decode
from logitlake_teacher import worker as worker_module
from logitlake_teacher.capture import capture_unit
from logitlake_teacher.config import EngineConfig, FakeEngineConfig, HfEngineConfig
from logitlake_teacher.config.images import ImagesConfig
from logitlake_teacher.engines import Engine, EngineSetup, ScoredSample, ScoreRequest, build_engine, identify_engine
from logitlake_teacher.engines.base import Generation, Sampling
from logitlake_teacher.engines.fake import FakeEngine
from logitlake_teacher.executors import Committed
from logitlake_teacher.items import PlannedSample, Unit
from logitlake_teacher.worker import CaptureJob, UnitWorker

K = 8
EXACT = CodecPolicy(k_max=K, k_min=K, p_min=0.0, grid="exact")
TEMPERATURES: tuple[Literal[1] | Temperature, ...] = (1, 2, 4)
# float32 on one side, float64 on the other.
ROUNDING = 1e-5
# Two passes of one float32 network over the same sequence, padded differently or not.
TWO_PASSES = 1e-4

Message = dict[str, Any]


@dataclass
class Bench:
    """Four conversations: an image, two images and two turns, text alone, and one that waits for its answer."""

    folder: Path
    model_dir: Path

    def __post_init__(self) -> None:
        self.renderer = Renderer(self.model_dir)
        self.items = tuple(
            self.item(sample_id, images, messages)
            for sample_id, images, messages in (
                ("one", (0,), [_user("what?", 1), _assistant("a red one")]),
                ("two", (0, 1), [_user("what?", 2), _assistant("two"), _user("sure?"), _assistant("yes")]),
                ("text", (), [_user("how many?"), _assistant("three")]),
                ("open", (1,), [_user("what is it?", 1)]),
            )
        )

    def item(self, sample_id: str, images: Sequence[int], messages: list[Message]) -> PlannedSample:
        """A planned sample, as a planner renders it."""
        (rendered,) = self.renderer.render_batch([messages], open_end=True)
        assert not isinstance(rendered, Exception)
        data = [noise_png(number) for number in images]
        return PlannedSample(
            sample_id=sample_id,
            task="caption",
            source="made",
            split="train",
            messages=messages,
            **vars(rendered),
            images=tuple(ImageRef(data=one) for one in data),
            image_sha256=tuple(map(sha256_hex, data)),
        )

    def unit(self, *sample_ids: str) -> Unit:
        """A unit of these samples."""
        return Unit("000000-made", tuple(item for item in self.items if item.sample_id in sample_ids))

    def setup(self, spec: CaptureSpec) -> EngineSetup:
        """What the service would tell an engine."""
        return _setup(self.model_dir, self.renderer, spec.codec)

    def spec(self, engine: EngineConfig | None = None, **options: Any) -> CaptureSpec:
        """The spec of a capture with these options."""
        codec = options.pop("codec", EXACT)
        return CaptureSpec(
            kind="samples",
            tokenizer=self.renderer.identity(),
            engine=identify_engine(engine or FakeEngineConfig(), _setup(self.model_dir, self.renderer, codec)),
            codec=codec,
            dataset=DatasetIdentity(snapshot_sha256="d" * 64, num_samples=4, unit_tokens=100),
            **options,
        )

    def capture(self, engine: Engine, unit: Unit, spec: CaptureSpec) -> dict[str, LakeSample]:
        """Captures the unit, finds its shards sound, and reads what is in them."""
        cache = Lake.create(self.folder / "lake").create_cache("capture", spec)
        record = capture_unit(engine, unit, cache, {}, self.renderer)
        assert record.errors == ()
        assert verify_unit(cache, record) == []
        return read(cache)


@pytest.fixture
def bench(tmp_path: Path, tiny_teacher: Path) -> Bench:
    """Four conversations and a fake teacher."""
    return Bench(tmp_path, tiny_teacher)


def read(cache: Cache) -> dict[str, LakeSample]:
    """Everything in a cache by its id."""
    cache.snapshot()
    dataset = LakeDataset(Lake(cache.store), cache.name)
    return {sample.sample_id: sample for sample in (dataset[position] for position in range(len(dataset)))}


# ---- generate ----


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_lake_holds_what_the_teacher_wrote(bench: Bench, temperature: float) -> None:
    """Ids of the teacher's own answer, the distribution that it wrote each token from, and its text as last turn."""
    spec = bench.spec(mode=GenerateMode(type="generate", max_new_tokens=12, temperature=temperature, seed=3))
    engine = fake(bench, spec)
    unit = bench.unit("one", "two", "text", "open")
    stored = bench.capture(engine, unit, spec)
    assert stored.keys() == {"one", "two", "text", "open"}
    for item in unit.items:
        assert isinstance(item, PlannedSample)
        sample = stored[item.item_id]
        history = item.messages[:-1] if item.messages[-1]["role"] == "assistant" else item.messages
        assert sample.messages == [
            *history,
            {"role": "assistant", "content": bench.renderer.decode(sample.response_ids)},
        ]
        truth_TV = engine.truth(request_of(sample))
        assert sample.prompt_lengths.tolist() == [len(sample.prompt_ids)]
        assert_rows_are_the_truth(sample, truth_TV)
        if temperature == 0:
            truth_TV[:, bench.renderer.image_token_id] = -np.inf  # the teacher speaks no placeholders
            # The greatest of what can be said: an answer holds no image.
            truth_TV[:, bench.renderer.image_token_id] = -np.inf
            assert sample.response_ids.tolist() == truth_TV.argmax(1).tolist()
        assert sample.expanded_length == len(sample.prompt_ids) + len(sample.response_ids) + 3 * len(item.images)


def test_earlier_answers_are_part_of_the_prompt(bench: Bench) -> None:
    """Of two turns the first answer is the data's, as ids in the prompt; the teacher writes the second."""
    spec = bench.spec(mode=GenerateMode(type="generate", max_new_tokens=4))
    item = bench.unit("two").items[0]
    assert isinstance(item, PlannedSample)
    sample = bench.capture(fake(bench, spec), bench.unit("two"), spec)["two"]
    ids_S, _ = interleave(item.prompt_ids, item.prompt_lengths, item.response_ids, item.response_lengths)
    assert sample.prompt_ids.tolist() == ids_S[: -int(item.response_lengths[-1])].tolist()


def test_why_the_teacher_stopped_is_stored(bench: Bench) -> None:
    """`length` where the room was used up, without EOS; `stop` where EOS came. Both are sound rows."""

    class Ends(FakeEngine):
        def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> Any:
            longer = [super(Ends, self).generate([request], sampling)[0] for request in requests[:1]]
            return [*longer, *(self._ended(request) for request in requests[1:])]

        def _ended(self, request: ScoreRequest) -> list[Generation]:
            """An empty text: EOS and nothing else."""
            ids = np.array([bench.renderer.eos_id], np.int32)
            answered = replace(request, response_ids=ids, response_lengths=np.array([1], np.int32))
            return [Generation(ids, "stop", rows_of(self, answered), len(self._expand(answered)[0]))]

    spec = bench.spec(mode=GenerateMode(type="generate", max_new_tokens=3))
    stored = bench.capture(Ends(FakeEngineConfig(), bench.setup(spec)), bench.unit("one", "text"), spec)
    assert stored["one"].finish_reason == "length"
    assert len(stored["one"].response_ids) == 3
    assert bench.renderer.eos_id not in stored["one"].response_ids
    assert stored["text"].finish_reason == "stop"
    assert stored["text"].response_ids.tolist() == [bench.renderer.eos_id]
    assert stored["text"].messages[-1] == {"role": "assistant", "content": ""}


def test_a_teacher_that_writes_nothing_is_an_error_row(bench: Bench) -> None:
    """Not even EOS: there is no token to learn from, and no row is made up."""

    class Mute(FakeEngine):
        def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> Any:
            (first, *others) = super().generate(requests, sampling)
            assert isinstance(first, list)
            rows = {name: value[:0] for name, value in vars(first[0].rows).items() if value is not None}
            nothing = replace(first[0], response_ids=first[0].response_ids[:0], rows=replace(first[0].rows, **rows))
            return [[nothing], *others]

    spec = bench.spec(mode=GenerateMode(type="generate", max_new_tokens=3))
    cache = Lake.create(bench.folder / "lake").create_cache("capture", spec)
    engine = Mute(FakeEngineConfig(), bench.setup(spec))
    record = capture_unit(engine, bench.unit("one", "text"), cache, {}, bench.renderer)
    assert [(error.sample_id, error.code) for error in record.errors] == [("one", "teacher_invalid")]
    assert read(cache).keys() == {"text"}


def test_an_answer_that_does_not_fit_is_an_error_row(bench: Bench) -> None:
    """`prompt_too_long` counts the room for the answer."""
    spec = bench.spec(mode=GenerateMode(type="generate", max_new_tokens=5000))
    cache = Lake.create(bench.folder / "lake").create_cache("capture", spec)
    record = capture_unit(fake(bench, spec), bench.unit("text"), cache, {}, bench.renderer)
    assert [error.code for error in record.errors] == ["prompt_too_long"]


# ---- the second pass without images ----


@pytest.mark.parametrize("mode", ["score", "generate"])
@pytest.mark.parametrize("codec", [EXACT, CodecPolicy(k_max=K, k_min=1)], ids=["exact", "grid"])
def test_the_second_pass_is_the_truth_without_the_images(bench: Bench, mode: str, codec: CodecPolicy) -> None:
    """The logprob of the same tokens after a prompt that never held an image; null where there was none."""
    options: dict[str, Any] = {"mode": GenerateMode(type="generate", max_new_tokens=6)} if mode == "generate" else {}
    spec = bench.spec(no_image_pass=True, codec=codec, **options)
    engine = fake(bench, spec)
    for sample in bench.capture(engine, bench.unit("one", "two", "text"), spec).values():
        if sample.sample_id == "text":
            assert sample.label_logprob_no_image_T is None
            continue
        rendered = bench.renderer.render(without_images(sample.messages))
        ids_S, _ = interleave(
            rendered.prompt_ids, rendered.prompt_lengths, rendered.response_ids, rendered.response_lengths
        )
        assert bench.renderer.image_token_id not in ids_S
        prompt_ids, prompt_lengths = rendered.prompt_ids, rendered.prompt_lengths
        if mode == "generate":
            prompt_ids = ids_S[: len(ids_S) - int(rendered.response_lengths[-1])].astype(np.int32)
            prompt_lengths = np.array([len(prompt_ids)], np.int32)
        truth_TV = engine.truth(
            ScoreRequest("", prompt_ids, prompt_lengths, sample.response_ids, sample.response_lengths)
        )
        expected_T = truth_TV[np.arange(len(truth_TV)), sample.response_ids]
        assert sample.label_logprob_no_image_T is not None
        tolerance = ROUNDING if codec is EXACT else 2.0**-11 + ROUNDING
        np.testing.assert_allclose(sample.label_logprob_no_image_T, expected_T, rtol=tolerance)
        assert not np.allclose(sample.label_logprob_no_image_T, sample.rows.label_logprob_T, rtol=1e-2)


def test_a_response_that_cannot_be_scored_without_its_images_is_lost_as_a_whole(bench: Bench) -> None:
    """No row says that it was captured without an image when it was not."""
    spec = bench.spec(no_image_pass=True)
    cache = Lake.create(bench.folder / "lake").create_cache("capture", spec)
    engine = fake(bench, spec, wrong={"one/no_image": "nan"})
    record = capture_unit(engine, bench.unit("one", "text"), cache, {}, bench.renderer)
    assert [(error.sample_id, error.code) for error in record.errors] == [("one", "teacher_nonfinite")]
    assert read(cache).keys() == {"text"}


def test_draws_have_a_second_pass_too(bench: Bench) -> None:
    """The codec of the distribution does not matter to the label's logprob."""
    policy = SampledPolicy(type="sampled", draws=4)
    spec = bench.spec(no_image_pass=True, codec=policy)
    sample = bench.capture(fake(bench, spec), bench.unit("one"), spec)["one"]
    assert sample.label_logprob_no_image_T is not None


# ---- other temperatures ----


@pytest.mark.parametrize("options", [{}, {"mode": GenerateMode(type="generate", max_new_tokens=6)}])
def test_the_tail_at_other_temperatures_is_stored(bench: Bench, options: dict[str, Any]) -> None:
    """What comes back at T = 2 and 4 is softmax(logits / T) of the teacher's truth."""
    spec = bench.spec(codec=EXACT.model_copy(update={"temperatures": (2, 4), "k_min": 1, "p_min": 0.02}), **options)
    engine = fake(bench, spec)
    for sample in bench.capture(engine, bench.unit("one", "two"), spec).values():
        truth_TV = engine.truth(request_of(sample))
        for temperature in TEMPERATURES:
            ids_TK, logprobs_TK, _ = decode(sample.rows, temperature)
            at_TV = truth_TV / temperature
            at_TV -= np.logaddexp.reduce(at_TV, axis=1, keepdims=True)
            there_TK = np.isfinite(logprobs_TK)
            expected_TK = np.take_along_axis(at_TV, ids_TK.astype(np.int64), axis=1)
            np.testing.assert_allclose(logprobs_TK[there_TK], expected_TK[there_TK], atol=ROUNDING)


def test_a_teacher_that_does_not_tell_the_tail_is_never_believed(bench: Bench) -> None:
    """Asked for temperatures, an engine that returns none gets error rows, not rows without them."""
    spec = bench.spec(codec=EXACT.model_copy(update={"temperatures": (2,)}))
    cache = Lake.create(bench.folder / "lake").create_cache("capture", spec)
    engine = FakeEngine(FakeEngineConfig(), replace(bench.setup(spec), temperatures=()))
    record = capture_unit(engine, bench.unit("one"), cache, {}, bench.renderer)
    assert [error.code for error in record.errors] == ["teacher_invalid"]
    assert "temperatures [2] were asked for" in record.errors[0].message


# ---- a real network ----


def test_a_network_writes_and_looks_away(bench: Bench) -> None:
    """transformers: the rows of a written answer are those of scoring it, and so are the ones without its images."""
    config = HfEngineConfig()
    codec = EXACT.model_copy(update={"temperatures": (2,)})
    spec = bench.spec(
        config, codec=codec, no_image_pass=True, mode=GenerateMode(type="generate", max_new_tokens=5, temperature=0.8)
    )
    engine = build_engine(config, bench.setup(spec))
    stored = bench.capture(engine, bench.unit("one", "two", "text"), spec)
    assert len(stored) == 3
    for sample in stored.values():
        blind = bench.renderer.render_prompt(without_images(sample.messages[:-1]))
        request = request_of(sample)
        seen = rows_of(engine, request)
        unseen = rows_of(
            engine,
            replace(request, prompt_ids=blind, prompt_lengths=np.array([len(blind)], np.int32), images=()),
        )
        assert seen.log_tail_mass_TX is not None
        np.testing.assert_allclose(sample.rows.label_logprob_T, seen.label_logprob_T, atol=TWO_PASSES)
        np.testing.assert_allclose(sample.rows.log_tails_T[2], seen.log_tail_mass_TX[:, 0], atol=TWO_PASSES)
        # Of two turns the history was tokenised turn by turn, here as one text.
        if sample.sample_id == "one":
            assert sample.label_logprob_no_image_T is not None
            np.testing.assert_allclose(sample.label_logprob_no_image_T, unseen.label_logprob_T, atol=TWO_PASSES)
    engine.close()


# ---- two publishers ----


def test_the_second_publisher_of_a_unit_takes_what_is_committed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A teacher that does not repeat itself bit for bit: the loser discards its rows, says so, and goes on."""
    spec = bench.spec()
    lake = Lake.create(bench.folder / "lake")
    cache = lake.create_cache("capture", spec)
    unit = bench.unit("one", "text")

    class Overtaken(FakeEngine):
        def score(self, requests: Sequence[ScoreRequest]) -> Any:
            answers = super().score(requests)
            if not cache.committed_units():
                other = build_engine(FakeEngineConfig(seed=1), bench.setup(spec))
                capture_unit(other, unit, cache, {}, bench.renderer)
            return answers

    monkeypatch.setattr(worker_module, "build_engine", Overtaken)
    job = CaptureJob(
        "samples", str(bench.folder / "lake"), "capture", FakeEngineConfig(), bench.setup(spec), ImagesConfig()
    )
    with closing(UnitWorker(job)) as worker:
        done = worker.run(unit, {})
        assert done == Committed(cache.commit(unit.unit_id), cost=None)
        assert "this publisher's result is discarded" in caplog.text
        assert worker.run(unit, {}) == done
    first = fake(bench, spec, seed=1)
    for sample in read(cache).values():
        assert_rows_are_the_truth(sample, first.truth(request_of(sample)))


def test_another_fault_of_the_lake_ends_the_run(bench: Bench) -> None:
    """Only losing the race is forgiven."""
    spec = bench.spec(codec=CodecPolicy(k_max=K, k_min=1, max_mean_kl=1e-12))
    Lake.create(bench.folder / "lake").create_cache("capture", spec)
    job = CaptureJob(
        "samples", str(bench.folder / "lake"), "capture", FakeEngineConfig(), bench.setup(spec), ImagesConfig()
    )
    with closing(UnitWorker(job)) as worker, pytest.raises(LakeError, match="over the budget"):
        worker.run(bench.unit("one"), {})


# ---- helpers ----


def fake(bench: Bench, spec: CaptureSpec, **options: Any) -> FakeEngine:
    """The fake teacher for this spec, with faults."""
    return FakeEngine(FakeEngineConfig(**options), bench.setup(spec))


def request_of(sample: LakeSample) -> ScoreRequest:
    """A stored sample as a request."""
    return ScoreRequest(
        sample.sample_id,
        sample.prompt_ids,
        sample.prompt_lengths,
        sample.response_ids,
        sample.response_lengths,
        tuple(DecodedImage.of(data) for data in sample.images),
    )


def rows_of(engine: Engine, request: ScoreRequest) -> TeacherRows:
    """What the engine says of one request."""
    (answer,) = engine.score([request])
    assert isinstance(answer, ScoredSample)
    assert isinstance(answer.rows, TeacherRows)
    return answer.rows


def assert_rows_are_the_truth(sample: LakeSample, truth_TV: Any) -> None:
    """With the exact grid, what is stored is the truth cut at k."""
    best_TK = np.sort(truth_TV, axis=1)[:, ::-1][:, :K]
    np.testing.assert_allclose(sample.rows.topk_logprobs.reshape(-1, K), best_TK, rtol=ROUNDING)
    labels_T = truth_TV[np.arange(len(truth_TV)), sample.response_ids]
    np.testing.assert_allclose(sample.rows.label_logprob_T, labels_T, rtol=ROUNDING)


def _setup(model_dir: Path, renderer: Renderer, codec: Any) -> EngineSetup:
    drawn = codec if isinstance(codec, SampledPolicy) else None
    return EngineSetup(
        model_dir=model_dir,
        vocab_size=renderer.vocab_size,
        eos_id=renderer.eos_id,
        image_token_id=renderer.image_token_id,
        k=K,
        num_threads=1,
        sampled=drawn,
        temperatures=() if drawn else codec.temperatures,
    )


def _user(text: str, num_images: int = 0) -> Message:
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
