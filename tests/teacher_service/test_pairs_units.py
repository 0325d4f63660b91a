"""Units of pairs, given and made, by engines that really answer: what is stored is what the teacher said."""

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitlake_schemas import CaptureSpec, DatasetIdentity, UnitError
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.errors import ConfigError
from logitlake_shared.images import DecodedImage
from logitlake_shared.lake import Lake
from logitlake_shared.reader import PairDataset
from logitlake_shared.rendering import Renderer, without_images
from logitlake_shared.rows import LakePair
from logitlake_shared.tools.verify import verify_unit
from logitlake_teacher.config import (
    EngineConfig,
    FakeEngineConfig,
    HfEngineConfig,
    JudgeRanking,
    MadePairs,
    VllmEngineConfig,
)
from logitlake_teacher.engines import Engine, EngineSetup, Sampling, ScoreRequest, build_engine, identify_engine
from logitlake_teacher.engines.base import seed_of
from logitlake_teacher.items import PlannedPair, PlannedSample, Unit, single_turn
from logitlake_teacher.pairs import PAIRS_CODEC, PairMaker, PairScorer, capture_pairs_unit
from logitlake_teacher.pairs.judge import JUDGE_K, Judge, Judged
from logitlake_teacher.pairs.ranking import agreement, judge_rating, visual_advantage

TEACHER = Path(__file__).parents[2] / "examples" / "digit_scenes" / "models" / "teacher"
NUM_ITEMS = 5
# float32 sums in another order: decoding and scoring, and batches of another make-up. Seen up to 1e-5 a token.
LOGPROB_TOLERANCE = 5e-5
# A judge's rating is the difference of two of them, a visual advantage the mean of such differences.
RATING_TOLERANCE = 4 * LOGPROB_TOLERANCE

CONFIGS: dict[str, EngineConfig] = {
    "fake": FakeEngineConfig(tokens_per_image=16, mean_response=8),
    "hf": HfEngineConfig(),
    # On a CPU vLLM draws only from prompts that it computes in one piece.
    "vllm": VllmEngineConfig(batch_tokens=300, context_length=300),
}
RANKINGS: dict[str, dict[str, Any]] = {
    "judge": {"type": "judge"},
    "claims": {"type": "judge", "claims": ", | and ", "combine": "min"},
    "visual_advantage": {"type": "visual_advantage"},
    "gold": {"type": "gold", "measure": "lcs"},
}


@dataclass(frozen=True)
class Bench:
    """Prompts about pictures, an engine, and a lake to write to."""

    engine: Engine
    renderer: Renderer
    setup: EngineSetup
    engine_config: EngineConfig
    samples: tuple[PlannedSample, ...]
    decoded: dict[str, DecodedImage]

    def spec(self, *, no_image_pass: bool = False, pairs: MadePairs | None = None) -> CaptureSpec:
        """The spec of a cache of pairs."""
        return CaptureSpec(
            kind="pairs",
            tokenizer=self.renderer.identity(),
            engine=identify_engine(self.engine_config, self.setup),
            codec=PAIRS_CODEC,
            dataset=DatasetIdentity(snapshot_sha256="0" * 64, num_samples=NUM_ITEMS, unit_tokens=100),
            no_image_pass=no_image_pass,
            pair_making=None if pairs is None else pairs.model_dump(mode="json"),
        )

    def make(self, pairs: MadePairs, items: Sequence[PlannedSample] | None = None) -> list[LakePair | UnitError]:
        """The pairs of the items (default: all)."""
        spec = self.spec(no_image_pass=pairs.scores_without_images, pairs=pairs)
        return PairMaker(pairs, self.renderer).pairs_of(self.engine, items or self.samples, self.decoded, spec)

    def score(self, prompt_ids: Any, response_ids: Any, images: tuple[DecodedImage, ...]) -> Any:
        """What the engine says of one response by itself: `logprobs_T`."""
        (answer,) = self.engine.score(
            [
                ScoreRequest(
                    "alone",
                    np.asarray(prompt_ids, np.int32),
                    np.array([len(prompt_ids)], np.int32),
                    np.asarray(response_ids, np.int32),
                    np.array([len(response_ids)], np.int32),
                    images,
                )
            ]
        )
        return answer.rows.label_logprob_T  # type: ignore[union-attr]  # a problem would be the test's failure


# vLLM and torch's compiler warn about themselves while they load; that is not ours to mend.
VLLM_MARKS = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=["fake", "hf", pytest.param("vllm", marks=VLLM_MARKS)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Captions of digit scenes, two of each scene, and a conversation whose last answer is a second turn."""
    if request.param == "vllm" and importlib.util.find_spec("vllm") is None:
        if os.environ.get("LOGITLAKE_REQUIRE_VLLM") == "1":
            pytest.fail("LOGITLAKE_REQUIRE_VLLM=1, but vLLM is not installed")
        pytest.skip("vLLM is not installed (logitlake[teacher-cpu])")
    from examples.digit_scenes.make import png_bytes
    from examples.digit_scenes.questions import caption_of
    from examples.digit_scenes.world import draw_scene

    renderer = Renderer(TEACHER)
    setup = EngineSetup(TEACHER, renderer.vocab_size, renderer.eos_id, renderer.image_token_id, JUDGE_K, num_threads=1)
    samples, decoded = [], {}
    for number in range(NUM_ITEMS):
        scene = draw_scene("test", np.random.default_rng(number // 2))
        data = png_bytes(scene)
        image = DecodedImage.of(data)
        decoded[image.image_sha256] = image
        question = ("Describe the picture.", "What is in the picture?")[number % 2]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": caption_of(scene.objects)},
        ]
        if number == NUM_ITEMS - 1:
            again = {"role": "user", "content": [{"type": "text", "text": "List the digits that you see."}]}
            messages += [again, messages[1]]
        rendered = renderer.render(messages)
        samples.append(
            PlannedSample(
                sample_id=f"s{number}",
                task="caption",
                source="digit_scenes",
                split="test",
                messages=messages,
                prompt_ids=rendered.prompt_ids,
                prompt_lengths=rendered.prompt_lengths,
                response_ids=rendered.response_ids,
                response_lengths=rendered.response_lengths,
                images=(ImageRef(data=data),),
                image_sha256=(image.image_sha256,),
            )
        )
    config = CONFIGS[request.param]
    engine = build_engine(config, setup)
    yield Bench(engine, renderer, setup, config, tuple(samples), decoded)
    engine.close()


def options(ranking: str, margin: float = 1e-3, **changes: Any) -> MadePairs:
    """Options under which either teacher makes a pair of nearly every prompt."""
    usual = {
        "num_candidates": 5,
        "max_new_tokens": 40,
        "temperature": 2.0,
        "top_p": 1.0,
        "max_length_ratio": 1e6,
    }
    section = {**RANKINGS[ranking], "min_margin": margin}
    return MadePairs.model_validate({"type": "made", "ranking": section, **usual, **changes})


def pairs_among(answers: Sequence[LakePair | UnitError]) -> list[LakePair]:
    """The pairs; there must be some, or the test says nothing."""
    pairs = [answer for answer in answers if isinstance(answer, LakePair)]
    assert pairs, answers
    return pairs


def item_of(bench: Bench, pair: LakePair) -> tuple[PlannedSample, tuple[DecodedImage, ...]]:
    """The prompt of a pair, as a single turn, and its images."""
    (sample,) = [sample for sample in bench.samples if sample.sample_id == pair.pair_id]
    return single_turn(sample), tuple(bench.decoded[sha256] for sha256 in sample.image_sha256)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_made_pair_scores_as_a_given_one(bench: Bench, ranking: str) -> None:
    """Logprobs that came with decoding, and those without the images, are those of scoring the same two responses."""
    pairs = pairs_among(bench.make(options(ranking, no_image_pass=True)))
    given = [
        PlannedPair(
            pair.pair_id,
            pair.task,
            pair.source,
            pair.split,
            pair.messages,
            pair.prompt_ids,
            pair.chosen_ids,
            pair.rejected_ids,
            (),
            pair.image_sha256,
        )
        for pair in pairs
    ]
    scored = PairScorer(bench.renderer).pairs_of(bench.engine, given, bench.decoded, bench.spec(no_image_pass=True))
    for pair, other in zip(pairs, scored, strict=True):
        assert isinstance(other, LakePair)
        for name in ("chosen_logprobs", "rejected_logprobs", "chosen_logprobs_no_image", "rejected_logprobs_no_image"):
            np.testing.assert_allclose(getattr(pair, name), getattr(other, name), atol=LOGPROB_TOLERANCE, err_msg=name)
        assert other.made_by == "dataset"
        assert other.chosen_rating is None


@pytest.mark.parametrize("ranking", RANKINGS)
def test_what_a_made_pair_says_of_itself_is_true(bench: Bench, ranking: str) -> None:
    """Margin, ratings, ranks and drawing are those of the pair; both responses end; the prompt is the data's."""
    made = options(ranking)
    for pair in pairs_among(bench.make(made)):
        said = json.loads(pair.made_by)
        assert ": " not in pair.made_by
        assert pair.chosen_rating is not None
        assert pair.rejected_rating is not None
        assert pair.chosen_rating - pair.rejected_rating >= made.ranking.min_margin
        assert np.float32(said["margin"]) == np.float32(pair.chosen_rating - pair.rejected_rating)
        assert (said["method"], said["n"], said["temperature"], said["top_p"]) == (made.ranking.type, 5, 2.0, 1.0)
        ratings = [np.float32(rating) for rating in said["ratings"]]
        assert ratings == sorted(ratings, reverse=True)
        chosen_rank, rejected_rank = said["ranks"]
        assert ratings[chosen_rank - 1] == np.float32(pair.chosen_rating)
        assert ratings[rejected_rank - 1] == np.float32(pair.rejected_rating)
        item, _ = item_of(bench, pair)
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == bench.renderer.eos_id
        assert pair.prompt_ids.tolist() == bench.renderer.render_prompt(pair.messages).tolist()
        assert pair.messages == item.messages
        assert pair.messages[-1]["role"] == "user"


def test_ratings_of_gold_are_agreement_with_the_data(bench: Bench) -> None:
    """Recomputed from the stored texts."""
    for pair in pairs_among(bench.make(options("gold"))):
        item, _ = item_of(bench, pair)
        gold = bench.renderer.decode(item.response_ids)
        assert pair.chosen_rating == agreement(bench.renderer.decode(pair.chosen_ids), gold, "lcs")
        assert pair.rejected_rating == agreement(bench.renderer.decode(pair.rejected_ids), gold, "lcs")


def test_ratings_of_visual_advantage_are_what_the_image_adds(bench: Bench) -> None:
    """Recomputed by scoring each response by itself, with the image and after a prompt of text alone."""
    for pair in pairs_among(bench.make(options("visual_advantage"))):
        _, images = item_of(bench, pair)
        blind_ids = bench.renderer.render_prompt(without_images(pair.messages))
        assert bench.renderer.image_token_id not in blind_ids
        for ids, rating in ((pair.chosen_ids, pair.chosen_rating), (pair.rejected_ids, pair.rejected_rating)):
            seen_T, blind_T = bench.score(pair.prompt_ids, ids, images), bench.score(blind_ids, ids, ())
            assert rating == pytest.approx(visual_advantage(seen_T, blind_T, "mean"), abs=RATING_TOLERANCE)


def test_ratings_of_the_judge_are_its_next_token(bench: Bench) -> None:
    """Recomputed by forcing each yes and each no after the filled template, one request a token."""
    made = options("judge")
    assert isinstance(made.ranking, JudgeRanking)
    judge = Judge(made.ranking, bench.renderer)
    for pair in pairs_among(bench.make(made)):
        _, images = item_of(bench, pair)
        *history, last = pair.messages
        question = next(part["text"] for part in last["content"] if part["type"] == "text")
        for ids, rating in ((pair.chosen_ids, pair.chosen_rating), (pair.rejected_ids, pair.rejected_rating)):
            asked = made.ranking.template.replace("{question}", question)
            asked = asked.replace("{answer}", bench.renderer.decode(ids))
            pictures = [part for part in last["content"] if part["type"] == "image"]
            prompt = bench.renderer.render_prompt(
                [*history, {"role": "user", "content": [*pictures, {"type": "text", "text": asked}]}]
            )
            yes, no = (
                [float(bench.score(prompt, [token], images)[0]) for token in tokens]
                for tokens in (judge.yes_ids, judge.no_ids)
            )
            assert rating == pytest.approx(judge_rating(yes, no, "log_odds"), abs=RATING_TOLERANCE)


def test_a_judge_with_exchanged_words_turns_its_ratings(bench: Bench) -> None:
    """Yes for no: every rating is its negative, exactly, so best and worst change places."""
    texts = ["a red seven at the top left", "nothing", "a blue two at the bottom right"]
    item, images = single_turn(bench.samples[0]), tuple(bench.decoded[sha] for sha in bench.samples[0].image_sha256)
    judged = [Judged(item, number, text, images) for number, text in enumerate(texts)]
    there = Judge(JudgeRanking(yes=("yes",), no=("no",)), bench.renderer).ratings(bench.engine, judged, bench.spec())
    back = Judge(JudgeRanking(yes=("no",), no=("yes",)), bench.renderer).ratings(bench.engine, judged, bench.spec())
    for one, other in zip(there, back, strict=True):
        assert isinstance(one, float)
        assert isinstance(other, float)
        # The two are asked with another first token; the row that answers is the same.
        assert one == pytest.approx(-other, abs=RATING_TOLERANCE)


def test_gold_as_chosen(bench: Bench) -> None:
    """The chosen response is the data's answer, with the teacher's logprobs of it; the rejected one is not it."""
    made = options("gold", chosen="gold", num_candidates=3)
    for pair in pairs_among(bench.make(made)):
        item, images = item_of(bench, pair)
        assert pair.chosen_ids.tolist() == item.response_ids.tolist()
        np.testing.assert_allclose(
            pair.chosen_logprobs, bench.score(pair.prompt_ids, pair.chosen_ids, images), atol=LOGPROB_TOLERANCE
        )
        assert pair.chosen_rating == 1
        assert bench.renderer.decode(pair.rejected_ids) != bench.renderer.decode(pair.chosen_ids)
        assert json.loads(pair.made_by)["chosen"] == "gold"


def test_a_prompt_is_a_function_of_its_id_and_not_of_its_neighbours(bench: Bench) -> None:
    """Alone or beside others, first or last, a prompt gives the same two responses; another id draws others."""
    made = options("gold")
    together = {pair.pair_id: pair for pair in pairs_among(bench.make(made))}
    backwards = {pair.pair_id: pair for pair in pairs_among(bench.make(made, bench.samples[::-1]))}
    assert together.keys() == backwards.keys()
    for name, pair in together.items():
        (sample,) = [sample for sample in bench.samples if sample.sample_id == name]
        (alone,) = pairs_among(bench.make(made, [sample]))
        for other in (backwards[name], alone):
            assert other.chosen_ids.tolist() == pair.chosen_ids.tolist()
            assert other.rejected_ids.tolist() == pair.rejected_ids.tolist()
        renamed = bench.make(made, [replace(sample, sample_id="another")])
        if isinstance(renamed[0], LakePair):
            assert json.loads(renamed[0].made_by)["seed"] != json.loads(pair.made_by)["seed"]


def test_requests_of_one_call_draw_apart(bench: Bench) -> None:
    """The same prompt under two ids gives other candidates: no two requests share their random numbers."""
    item, images = single_turn(bench.samples[0]), tuple(bench.decoded[sha] for sha in bench.samples[0].image_sha256)
    nothing, zero = np.zeros(0, np.int32), np.zeros(1, np.int32)
    asked = [ScoreRequest(name, item.prompt_ids, item.prompt_lengths, nothing, zero, images) for name in ("a", "b")]
    sampling = Sampling(max_new_tokens=20, n=3, temperature=2.0, seed=1)
    one, other = bench.engine.generate(asked, sampling)
    assert not isinstance(one, UnitError)
    assert [candidate.response_ids.tolist() for candidate in one] != [  # type: ignore[union-attr]  # as asserted
        candidate.response_ids.tolist()
        for candidate in other  # type: ignore[union-attr]  # as above
    ]
    assert seed_of(sampling, asked[0]) != seed_of(sampling, asked[1])


def test_why_prompts_give_no_pair(bench: Bench) -> None:
    """Each reason is an error row with its own code; none is silent, and the rows stand in the order of the items."""
    sample = bench.samples[0]
    textual = single_turn(sample)
    text_only = replace(
        textual,
        messages=without_images(textual.messages),
        prompt_ids=bench.renderer.render_prompt(without_images(textual.messages)),
        prompt_lengths=np.array([len(bench.renderer.render_prompt(without_images(textual.messages)))], np.int32),
        image_sha256=(),
    )
    open_end = replace(textual, response_ids=np.zeros(0, np.int32), response_lengths=np.zeros(1, np.int32))
    for made, item, code in (
        (options("visual_advantage"), text_only, "pair_no_image"),
        (options("gold"), open_end, "pair_no_gold"),
        (options("judge", chosen="gold"), open_end, "pair_no_gold"),
        (options("gold", max_new_tokens=2), sample, "pair_one_candidate"),
        (options("judge", margin=1e3), sample, "pair_no_margin"),
    ):
        (answer,) = bench.make(made, [item])
        assert isinstance(answer, UnitError), made
        assert (answer.sample_id, answer.code) == (item.sample_id, code)
    equal_lengths = options("judge", margin=1e-6, num_candidates=2, max_length_difference=0)
    answers = bench.make(equal_lengths)
    assert [answer.code for answer in answers if isinstance(answer, UnitError)].count("pair_unbalanced") > 1


def test_a_unit_of_made_pairs_round_trips(bench: Bench, tmp_path: Path) -> None:
    """Committed, verified, read back: prompts with a pair and prompts without add up to the unit."""
    made = options("visual_advantage")
    spec = bench.spec(no_image_pass=True, pairs=made)
    cache = Lake.create(tmp_path / "lake").create_cache("pairs", spec)
    unit = Unit("000000-test", bench.samples)
    record = capture_pairs_unit(
        PairMaker(made, bench.renderer), bench.engine, unit, cache, {"s1": "teacher_crashed: x"}
    )
    assert capture_pairs_unit(PairMaker(made, bench.renderer), bench.engine, unit, cache, {}) == record
    assert verify_unit(cache, record) == []
    cache.snapshot()
    dataset = PairDataset(tmp_path / "lake", "pairs")
    stored = {pair.pair_id: pair for pair in (dataset[place] for place in range(len(dataset)))}
    assert len(stored) + len(record.errors) == NUM_ITEMS
    assert "s1" in {error.sample_id for error in record.errors}
    for pair in pairs_among(bench.make(made, [sample for sample in bench.samples if sample.sample_id != "s1"])):
        other = stored[pair.pair_id]
        assert isinstance(other, LakePair)
        assert other.made_by == pair.made_by
        np.testing.assert_array_equal(other.chosen_logprobs_no_image, pair.chosen_logprobs_no_image)
        assert (other.chosen_rating, other.rejected_rating) == (pair.chosen_rating, pair.rejected_rating)


def test_words_that_are_no_single_token_are_refused(bench: Bench) -> None:
    """A word of several tokens, or one token for yes and no, is said before anything is captured."""
    with pytest.raises(ConfigError, match="single token"):
        Judge(JudgeRanking(yes=("certainly so",)), bench.renderer)
    with pytest.raises(ConfigError, match="both yes and no"):
        Judge(JudgeRanking(yes=("yes",), no=("no", "yes")), bench.renderer)


def test_every_option_is_part_of_the_fingerprint(bench: Bench) -> None:
    """Another seed, template, margin or number of candidates is another cache; pairs of the data have none of it."""
    base = options("judge")
    others = [
        options("judge", seed=1),
        options("judge", num_candidates=6),
        options("judge", max_length_difference=3),
        options("judge", margin=0.002),
        options("claims"),
        options("gold"),
    ]
    prints = {bench.spec(pairs=made).fingerprint for made in (base, *others)}
    assert len(prints) == 1 + len(others)
    assert "pair_making" not in bench.spec().document()
