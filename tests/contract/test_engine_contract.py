"""One behaviour suite for every teacher engine: fake, hf and vllm pass the same laws.

The two real engines load the same tiny random LLaVA and the same tiny random Qwen3-VL. vLLM runs on the CPU where it
is installed; elsewhere its cases are skipped with the reason, or fail when LOGITLAKE_REQUIRE_VLLM=1 says that it must
be there.
"""

import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from logitlake_schemas import SampledPolicy
from logitlake_shared.draws import uniforms
from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer
from logitlake_shared.teacher_checks import check_rows
from logitlake_shared.topk import DrawnRows, TeacherRows
from logitlake_teacher.config import EngineConfig, FakeEngineConfig, HfEngineConfig, VllmEngineConfig
from logitlake_teacher.engines import (
    Engine,
    EngineSetup,
    SampleProblem,
    Sampling,
    ScoredSample,
    ScoreRequest,
    build_engine,
    identify_engine,
)

K = 8
CONTEXT = 120
# float32 sums in another order: the batch that a sample shares decides how matrices are cut. Seen up to 4e-6.
BATCH_TOLERANCE = 5e-5

CONFIGS: dict[str, EngineConfig] = {
    "fake": FakeEngineConfig(tokens_per_image=16, context_length=CONTEXT),
    "hf": HfEngineConfig(batch_tokens=256, context_length=CONTEXT),
    # vLLM counts the one token that it generates.
    "vllm": VllmEngineConfig(batch_tokens=256, context_length=CONTEXT + 1),
}

MakeEngine = Callable[[int], Engine]


# vLLM and torch's compiler warn about themselves while they load; that is not ours to mend.
VLLM_MARKS = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        if os.environ.get("LOGITLAKE_REQUIRE_VLLM") == "1":
            pytest.fail("LOGITLAKE_REQUIRE_VLLM=1, but vLLM is not installed")
        pytest.skip("vLLM is not installed (logitlake[teacher-cpu])")


@pytest.fixture(
    scope="module",
    params=[
        "fake-llava",
        "hf-llava",
        pytest.param("vllm-llava", marks=VLLM_MARKS),
        "hf-qwen",
        pytest.param("vllm-qwen", marks=VLLM_MARKS),
    ],
)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Engine and teacher of each case in turn."""
    engine, _, teacher = request.param.partition("-")
    if engine == "vllm":
        _require_vllm()
    return engine, teacher


@pytest.fixture(scope="module")
def engine_config(case: tuple[str, str]) -> EngineConfig:
    """The configuration of the case's engine."""
    return CONFIGS[case[0]]


@pytest.fixture(scope="module")
def teacher_dir(case: tuple[str, str], request: pytest.FixtureRequest) -> Path:
    """The case's checkpoint. Both make 16 tokens of a picture of 32x32 pixels."""
    folder: Path = request.getfixturevalue({"llava": "tiny_teacher", "qwen": "tiny_qwen_vl"}[case[1]])
    return folder


@pytest.fixture(scope="module")
def setup(teacher_dir: Path) -> EngineSetup:
    """What every engine is told about the tiny teacher."""
    renderer = Renderer(teacher_dir)
    return EngineSetup(teacher_dir, renderer.vocab_size, renderer.eos_id, renderer.image_token_id, k=K, num_threads=1)


@pytest.fixture(scope="module")
def make_engine(engine_config: EngineConfig, setup: EngineSetup) -> Iterator[MakeEngine]:
    """`make_engine(k)`: an engine with that k, made once."""
    made: dict[int, Engine] = {}

    def make(k: int) -> Engine:
        if k not in made:
            made[k] = build_engine(engine_config, replace(setup, k=k))
        return made[k]

    yield make
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="module")
def engine(make_engine: MakeEngine) -> Engine:
    """The engine with k = K."""
    return make_engine(K)


def noise_png(seed: int) -> bytes:
    """A 32x32 picture of noise: the size of the tower, so that no resampling takes part."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels, "RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def ask(teacher_dir: Path) -> Callable[..., ScoreRequest]:
    """`ask("id", ["question", "answer", ...], image, ...)`: the request for that conversation, images first."""
    renderer = Renderer(teacher_dir)

    def make(sample_id: str, turns: list[str], *images: bytes) -> ScoreRequest:
        messages = []
        for number, text in enumerate(turns):
            parts: list[dict[str, str]] = [{"type": "text", "text": text}]
            if number == 0:
                parts = [*({"type": "image"} for _ in images), *parts]
            messages.append(
                {"role": "user", "content": parts} if number % 2 == 0 else {"role": "assistant", "content": text}
            )
        rendered = renderer.render(messages)
        return ScoreRequest(
            sample_id,
            rendered.prompt_ids,
            rendered.prompt_lengths,
            rendered.response_ids,
            rendered.response_lengths,
            tuple(DecodedImage.of(image) for image in images),
        )

    return make


@pytest.fixture(scope="module")
def requests(ask: Callable[..., ScoreRequest]) -> list[ScoreRequest]:
    """Samples of different lengths: with and without an image, one and two turns."""
    return [
        ask("one", ["what is in the picture?", "a red seven"], noise_png(1)),
        ask("two", ["how many digits are there?", "three", "is there a blue two?", "yes"], noise_png(2)),
        ask("text", ["is there a seven?", "none at all, and no picture either"]),
        ask("short", ["what?", "no"], noise_png(1)),
    ]


def scored(answer: object) -> ScoredSample:
    """The answer, which must not be a problem."""
    assert isinstance(answer, ScoredSample), answer
    return answer


def assert_same_rows(one: ScoredSample, other: ScoredSample, tolerance: float) -> None:
    """Equal ranks of labels and equal logprobs within the tolerance."""
    np.testing.assert_array_equal(one.rows.label_rank_T, other.rows.label_rank_T)
    np.testing.assert_allclose(one.rows.label_logprob_T, other.rows.label_logprob_T, atol=tolerance, rtol=0)
    np.testing.assert_allclose(one.rows.topk_logprobs_TK, other.rows.topk_logprobs_TK, atol=tolerance, rtol=0)


def test_one_row_a_response_token_in_the_order_of_the_requests(engine: Engine, requests: list[ScoreRequest]) -> None:
    """Rows are [T, K] of the promised dtypes, and answers come in the order of the requests."""
    answers = [scored(answer) for answer in engine.score(requests)]
    assert [answer.sample_id for answer in answers] == ["one", "two", "text", "short"]
    for request, answer in zip(requests, answers, strict=True):
        num_tokens = len(request.response_ids)
        assert answer.rows.topk_ids_TK.shape == answer.rows.topk_logprobs_TK.shape == (num_tokens, K)
        assert answer.rows.label_logprob_T.shape == answer.rows.label_rank_T.shape == (num_tokens,)
        assert answer.rows.topk_ids_TK.dtype == answer.rows.label_rank_T.dtype == np.int32
        assert answer.rows.topk_logprobs_TK.dtype == answer.rows.log_tail_mass_T.dtype == np.float32


def test_an_image_is_sixteen_tokens_of_the_expanded_length(engine: Engine, requests: list[ScoreRequest]) -> None:
    """`expanded_length` counts the images' tokens; ids went in with one placeholder an image."""
    for request, answer in zip(requests, engine.score(requests), strict=True):
        unexpanded = len(request.prompt_ids) + len(request.response_ids)
        assert scored(answer).expanded_length == unexpanded + 15 * len(request.images)


def test_rows_are_distributions(engine: Engine, requests: list[ScoreRequest], setup: EngineSetup) -> None:
    """Finite, in rank order, ids unique and inside the vocabulary, top-k and tail sum to one."""
    for answer in engine.score(requests):
        check_rows(scored(answer).rows, setup.vocab_size)


def test_label_rank_and_logprob_agree_with_the_top_k(engine: Engine, requests: list[ScoreRequest]) -> None:
    """A label of rank r <= K is the r-th entry, with its logprob; any other is outside and below the last entry."""
    for request, answer in zip(requests, engine.score(requests), strict=True):
        rows = scored(answer).rows
        for t, label in enumerate(request.response_ids):
            rank = int(rows.label_rank_T[t])
            if rank <= K:
                assert rows.topk_ids_TK[t, rank - 1] == label
                assert rows.topk_logprobs_TK[t, rank - 1] == rows.label_logprob_T[t]
            else:
                assert label not in rows.topk_ids_TK[t]
                assert rows.label_logprob_T[t] <= rows.topk_logprobs_TK[t, -1]


def test_the_same_call_gives_the_same_bytes(engine: Engine, requests: list[ScoreRequest]) -> None:
    """Bit for bit."""
    for one, other in zip(engine.score(requests), engine.score(requests), strict=True):
        first, second = scored(one).rows, scored(other).rows
        for name, column in vars(first).items():
            other_column = getattr(second, name)
            assert (column is None and other_column is None) or column.tobytes() == other_column.tobytes(), name


def test_the_order_of_the_requests_does_not_matter(engine: Engine, requests: list[ScoreRequest]) -> None:
    """Reversed, or alone: the same rows within the rounding of float32."""
    forward = engine.score(requests)
    backward = engine.score(requests[::-1])[::-1]
    alone = [engine.score([request])[0] for request in requests]
    for one, other, single in zip(forward, backward, alone, strict=True):
        assert_same_rows(scored(one), scored(other), BATCH_TOLERANCE)
        assert_same_rows(scored(one), scored(single), BATCH_TOLERANCE)


def test_a_row_depends_on_its_prefix_only(engine: Engine, ask: Callable[..., ScoreRequest]) -> None:
    """A response cut short keeps the rows of what is left."""
    whole = ask("whole", ["what is in the picture?", "a red seven and a blue two"], noise_png(3))
    num_left = len(whole.response_ids) - 4
    cut = replace(
        whole, response_ids=whole.response_ids[:num_left], response_lengths=np.array([num_left], dtype=np.int32)
    )
    long, short = (scored(answer).rows for answer in engine.score([whole, cut]))
    np.testing.assert_allclose(long.topk_logprobs_TK[:num_left], short.topk_logprobs_TK, atol=BATCH_TOLERANCE, rtol=0)
    np.testing.assert_array_equal(long.label_rank_T[:num_left], short.label_rank_T)


def test_an_earlier_turn_may_as_well_be_prompt(engine: Engine, ask: Callable[..., ScoreRequest]) -> None:
    """The rows of a second turn are those of the same tokens asked for as one turn behind a longer prompt."""
    two = ask("two", ["how many digits are there?", "three", "is there a blue two?", "yes"], noise_png(2))
    first, second = (int(length) for length in two.response_lengths)
    history = np.concatenate(
        [two.prompt_ids[: two.prompt_lengths[0]], two.response_ids[:first], two.prompt_ids[two.prompt_lengths[0] :]]
    )
    one = ScoreRequest(
        "one",
        history,
        np.array([len(history)], np.int32),
        two.response_ids[first:],
        np.array([second], np.int32),
        two.images,
    )
    both, last = (scored(answer).rows for answer in engine.score([two, one]))
    np.testing.assert_allclose(both.topk_logprobs_TK[first:], last.topk_logprobs_TK, atol=BATCH_TOLERANCE, rtol=0)
    np.testing.assert_array_equal(both.label_rank_T[first:], last.label_rank_T)


def test_the_image_is_seen(engine: Engine, ask: Callable[..., ScoreRequest]) -> None:
    """Another picture, other rows; the same picture, the same rows."""
    turns = ["what is in the picture?", "a red seven"]
    pictures = [ask("a", turns, noise_png(1)), ask("b", turns, noise_png(2)), ask("c", turns, noise_png(1))]
    one, other, again = (scored(answer) for answer in engine.score(pictures))
    assert np.abs(one.rows.topk_logprobs_TK - other.rows.topk_logprobs_TK).max() > 10 * BATCH_TOLERANCE
    assert_same_rows(one, again, BATCH_TOLERANCE)


def test_images_stand_where_their_placeholders_stand(engine: Engine, ask: Callable[..., ScoreRequest]) -> None:
    """Two pictures are 32 tokens; changed over they are another sample, and each order is itself whoever is beside."""
    turns = ["what is in the pictures?", "a red seven"]
    one, other = noise_png(1), noise_png(2)
    asked = [ask("a", turns, one, other), ask("b", turns, other, one), ask("c", turns, one), ask("d", turns, one, one)]
    answers = [scored(answer) for answer in engine.score(asked)]
    unexpanded = len(asked[0].prompt_ids) + len(asked[0].response_ids)
    assert [answer.expanded_length for answer in answers[:2]] == [unexpanded + 30] * 2
    for number, first in enumerate(answers):
        for second in answers[number + 1 :]:
            assert np.abs(first.rows.label_logprob_T - second.rows.label_logprob_T).max() > 10 * BATCH_TOLERANCE
    for answer, request in zip(answers, asked, strict=True):
        assert_same_rows(answer, scored(engine.score([request])[0]), BATCH_TOLERANCE)


def test_images_that_were_expanded_already_are_refused(
    engine: Engine, ask: Callable[..., ScoreRequest], requests: list[ScoreRequest], setup: EngineSetup
) -> None:
    """Sixteen placeholders of one picture would be expanded once more, without a word: `image_placeholders` instead.

    So is a picture without a placeholder, and a placeholder in a response. The neighbours are scored as ever.
    """
    sound = ask("expanded", ["what?", "no"], noise_png(1))
    repeats = np.where(sound.prompt_ids == setup.image_token_id, 16, 1)
    expanded_ids = np.repeat(sound.prompt_ids, repeats)
    wrong = [
        replace(sound, prompt_ids=expanded_ids, prompt_lengths=np.array([len(expanded_ids)], np.int32)),
        replace(sound, images=()),
        replace(sound, images=sound.images * 2),
        replace(sound, response_ids=np.where(np.arange(len(sound.response_ids)) == 0, setup.image_token_id, 5)),
    ]
    answers = engine.score([requests[0], *wrong, requests[1]])
    for problem in answers[1:-1]:
        assert isinstance(problem, SampleProblem)
        assert (problem.sample_id, problem.code) == ("expanded", "image_placeholders")
    for request, answer in zip(requests[:2], (answers[0], answers[-1]), strict=True):
        assert_same_rows(scored(answer), scored(engine.score([request])[0]), BATCH_TOLERANCE)


def test_the_end_is_a_token_like_any_other(
    make_engine: MakeEngine, ask: Callable[..., ScoreRequest], setup: EngineSetup
) -> None:
    """EOS has its row, the last one: what the teacher expects behind the text, and that is where it was cut from."""
    whole = ask("whole", ["what is in the picture?", "a red seven"], noise_png(1))
    assert whole.response_ids[-1] == setup.eos_id
    text = len(whole.response_ids) - 1
    other = replace(whole, response_ids=np.append(whole.response_ids[:text], np.int32(7)))
    ended, went_on = (scored(answer).rows for answer in make_engine(setup.vocab_size).score([whole, other]))
    assert isinstance(ended, TeacherRows)
    assert isinstance(went_on, TeacherRows)
    for rows, label in ((ended, setup.eos_id), (went_on, 7)):
        place = rows.topk_ids_TK[-1].tolist().index(label)
        assert rows.label_logprob_T[-1] == rows.topk_logprobs_TK[-1, place]
    np.testing.assert_allclose(ended.topk_logprobs_TK, went_on.topk_logprobs_TK, atol=BATCH_TOLERANCE, rtol=0)


def test_an_answer_of_one_token_has_one_row(
    engine: Engine, ask: Callable[..., ScoreRequest], setup: EngineSetup
) -> None:
    """An empty text is EOS and nothing else; its row is the first of any answer to the same question."""
    empty, longer = ask("empty", ["what?", ""], noise_png(1)), ask("longer", ["what?", "no"], noise_png(1))
    assert empty.response_ids.tolist() == [setup.eos_id]
    one, two = (scored(answer).rows for answer in engine.score([empty, longer]))
    assert isinstance(one, TeacherRows)
    assert isinstance(two, TeacherRows)
    assert one.topk_logprobs_TK.shape == (1, K)
    np.testing.assert_allclose(one.topk_logprobs_TK[0], two.topk_logprobs_TK[0], atol=BATCH_TOLERANCE, rtol=0)


def test_nothing_asked_is_nothing_answered(engine: Engine) -> None:
    """An empty call is an empty list, of scores and of candidates."""
    assert engine.score([]) == []
    assert engine.generate([], Sampling(max_new_tokens=3)) == []


def test_tails_at_other_temperatures_are_what_the_rest_sums_to(
    engine_config: EngineConfig, make_engine: MakeEngine, setup: EngineSetup, requests: list[ScoreRequest]
) -> None:
    """Of softmax(logits / T): the mass outside the K entries, from the teacher's whole vocabulary."""
    temperatures = (2.0, 4.0)
    engine = build_engine(engine_config, replace(setup, temperatures=temperatures))
    for request, answer, full in zip(
        requests, engine.score(requests), make_engine(setup.vocab_size).score(requests), strict=True
    ):
        rows, everything = scored(answer).rows, scored(full).rows
        assert isinstance(rows, TeacherRows)
        assert isinstance(everything, TeacherRows)
        check_rows(rows, setup.vocab_size, request.response_ids, temperatures)
        assert rows.log_tail_mass_TX is not None
        for x, temperature in enumerate(temperatures):
            tempered_TV = everything.topk_logprobs_TK.astype(np.float64) / temperature
            tempered_TV -= np.logaddexp.reduce(tempered_TV, axis=1, keepdims=True)
            left_out_T = np.logaddexp.reduce(tempered_TV[:, K:], axis=1)
            np.testing.assert_allclose(rows.log_tail_mass_TX[:, x], left_out_T, atol=BATCH_TOLERANCE, rtol=0)
    engine.close()


def test_the_whole_vocabulary_leaves_no_tail(
    make_engine: MakeEngine, requests: list[ScoreRequest], setup: EngineSetup
) -> None:
    """k = vocabulary: every token once, tail -inf; and the tail at K is what the other entries sum to."""
    everything = make_engine(setup.vocab_size).score(requests)
    for full, top in zip(everything, make_engine(K).score(requests), strict=True):
        rows = scored(full).rows
        assert np.all(np.isneginf(rows.log_tail_mass_T))
        assert np.all(np.sort(rows.topk_ids_TK, axis=1) == np.arange(setup.vocab_size))
        check_rows(rows, setup.vocab_size)
        left_out_T = np.logaddexp.reduce(rows.topk_logprobs_TK[:, K:].astype(np.float64), axis=1)
        np.testing.assert_allclose(scored(top).rows.log_tail_mass_T, left_out_T, atol=BATCH_TOLERANCE, rtol=0)


def test_a_sample_over_the_context_is_a_problem_of_its_own(
    engine: Engine, ask: Callable[..., ScoreRequest], requests: list[ScoreRequest]
) -> None:
    """`prompt_too_long` with both numbers; the neighbours are scored as ever. Exactly the context still fits."""
    long = ask("long", ["what?", "x" * CONTEXT])
    long_length = len(long.prompt_ids) + len(long.response_ids)
    fits = ask("fits", ["what?", "x" * (CONTEXT - (long_length - CONTEXT))])
    assert len(fits.prompt_ids) + len(fits.response_ids) == CONTEXT
    answers = engine.score([requests[0], long, fits])
    problem = answers[1]
    assert isinstance(problem, SampleProblem)
    assert (problem.sample_id, problem.code) == ("long", "prompt_too_long")
    assert str(long_length) in problem.message
    assert str(CONTEXT) in problem.message
    assert scored(answers[2]).expanded_length == CONTEXT
    assert_same_rows(scored(answers[0]), scored(engine.score([requests[0]])[0]), BATCH_TOLERANCE)


def test_what_the_teacher_says_by_itself_is_its_first_choice(
    engine: Engine, requests: list[ScoreRequest], ask: Callable[..., ScoreRequest]
) -> None:
    """Greedy generation and scoring are one model: each generated token, scored, has rank 1."""
    asked = ask("asked", ["what is in the picture?", "-"], noise_png(4))
    prompt = replace(asked, response_ids=np.zeros(0, np.int32), response_lengths=np.array([0], np.int32))
    (candidates,) = engine.generate([prompt], Sampling(max_new_tokens=6))
    assert not isinstance(candidates, SampleProblem)
    said = candidates[0].response_ids
    assert 1 <= len(said) <= 6
    forced = replace(asked, response_ids=said, response_lengths=np.array([len(said)], np.int32))
    answer = scored(engine.score([forced])[0])
    assert answer.rows.label_rank_T.tolist() == [1] * len(said)
    assert answer.expanded_length == candidates[0].expanded_length


def test_rows_of_a_candidate_are_those_of_scoring_it(engine: Engine, ask: Callable[..., ScoreRequest]) -> None:
    """Drawn hot or from a nucleus, its rows are the teacher's own distribution at T=1, as if it had been given."""
    asked = ask("asked", ["what is in the picture?", "-"], noise_png(4))
    prompt = replace(asked, response_ids=np.zeros(0, np.int32), response_lengths=np.array([0], np.int32))
    sampling = Sampling(max_new_tokens=6, n=2, temperature=1.5, top_p=0.9, seed=3)
    (candidates,) = engine.generate([prompt], sampling)
    assert not isinstance(candidates, SampleProblem)
    for candidate in candidates:
        ids = candidate.response_ids
        forced = replace(asked, response_ids=ids, response_lengths=np.array([len(ids)], np.int32))
        rows = scored(engine.score([forced])[0]).rows
        assert isinstance(rows, TeacherRows)
        np.testing.assert_allclose(candidate.rows.label_logprob_T, rows.label_logprob_T, atol=BATCH_TOLERANCE, rtol=0)
        np.testing.assert_allclose(candidate.rows.topk_logprobs_TK, rows.topk_logprobs_TK, atol=BATCH_TOLERANCE, rtol=0)
        np.testing.assert_array_equal(candidate.rows.label_rank_T, rows.label_rank_T)


def test_candidates_follow_the_seed(engine: Engine, ask: Callable[..., ScoreRequest]) -> None:
    """The same seed draws the same candidates, another seed others; each candidate is a draw of its own."""
    asked = ask("asked", ["what is in the picture?", "-"], noise_png(4))
    prompt = replace(asked, response_ids=np.zeros(0, np.int32), response_lengths=np.array([0], np.int32))

    def draw(seed: int) -> list[list[int]]:
        (candidates,) = engine.generate([prompt], Sampling(max_new_tokens=8, n=3, temperature=1.0, seed=seed))
        assert not isinstance(candidates, SampleProblem)
        return [candidate.response_ids.tolist() for candidate in candidates]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert len({tuple(ids) for ids in draw(0)}) > 1


def test_an_engine_is_who_it_said_it_would_be(engine: Engine, engine_config: EngineConfig, setup: EngineSetup) -> None:
    """`describe()` equals what `identify_engine` says without loading anything; k and threads are no part of it."""
    assert engine.describe() == identify_engine(engine_config, replace(setup, k=1, num_threads=2))


def test_more_entries_than_the_vocabulary_are_refused(engine_config: EngineConfig, setup: EngineSetup) -> None:
    """k > vocabulary cannot be answered, and says so before anything is captured."""
    with pytest.raises(EngineError, match=r"codec\.k_max"):
        build_engine(engine_config, replace(setup, k=setup.vocab_size + 1))


@pytest.mark.parametrize("case", ["fake-llava", "hf-llava"], indirect=True)
def test_draws_come_from_the_full_distribution(
    engine_config: EngineConfig, setup: EngineSetup, make_engine: MakeEngine, requests: list[ScoreRequest]
) -> None:
    """Each id is where the cumulated truth passes its uniform; label, rank and entropy are those of the truth."""
    policy = SampledPolicy(type="sampled", draws=16, seed=5)
    engine = build_engine(engine_config, replace(setup, sampled=policy))
    for request, drawn, full in zip(
        requests, engine.score(requests), make_engine(setup.vocab_size).score(requests), strict=True
    ):
        assert isinstance(drawn, ScoredSample)
        assert isinstance(full, ScoredSample)
        assert isinstance(drawn.rows, DrawnRows)
        assert isinstance(full.rows, TeacherRows)
        logprobs_TV = np.empty(full.rows.topk_logprobs_TK.shape)
        np.put_along_axis(logprobs_TV, full.rows.topk_ids_TK.astype(np.int64), full.rows.topk_logprobs_TK, 1)
        cumulated_TV = np.exp(logprobs_TV).cumsum(1)
        uniforms_TN = uniforms(policy, request.sample_id, len(cumulated_TV))
        ids_TN = drawn.rows.drawn_ids_TN
        above_TN = np.take_along_axis(cumulated_TV, ids_TN.astype(np.int64), 1)
        below_TN = above_TN - np.exp(np.take_along_axis(logprobs_TV, ids_TN.astype(np.int64), 1))
        assert (below_TN <= uniforms_TN + BATCH_TOLERANCE).all()
        assert (uniforms_TN <= above_TN + BATCH_TOLERANCE).all()
        np.testing.assert_allclose(drawn.rows.label_logprob_T, full.rows.label_logprob_T, atol=BATCH_TOLERANCE)
        np.testing.assert_array_equal(drawn.rows.label_rank_T, full.rows.label_rank_T)
        entropy_T = -(np.exp(logprobs_TV) * logprobs_TV).sum(1)
        np.testing.assert_allclose(drawn.rows.entropy_T, entropy_T, atol=BATCH_TOLERANCE)
    engine.close()
