"""The real vLLM on a CPU: both routes, exact tails, images of every size, broken hooks, two threads, a child process.

The teacher is a tiny Qwen3-VL, whose images become as many tokens as they have pixels for; the engine `hf` is the
measure. Steps are so small (`BATCH_TOKENS`) that every longer prompt is computed in pieces.
"""

import importlib.util
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from logitlake_schemas import CaptureSpec, CodecPolicy, DatasetIdentity, sha256_hex
from logitlake_schemas.records import CaptureMode, GenerateMode, ScoreMode
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rendering import Renderer
from logitlake_shared.teacher_checks import check_rows
from logitlake_shared.tools.verify import verify_unit
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.answers import Answer, answers_of
from logitlake_teacher.capture import capture_unit
from logitlake_teacher.config import HfEngineConfig, VllmEngineConfig
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
from logitlake_teacher.engines.vllm import VllmEngine, span_hook
from logitlake_teacher.items import PlannedSample, Unit

# vLLM and torch's compiler warn about themselves while they load; that is not ours to mend.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None and os.environ.get("LOGITLAKE_REQUIRE_VLLM") != "1",
        reason="vLLM is not installed (logitlake[teacher-cpu])",
    ),
]

K = 8
TEMPERATURES = (2.0, 4.0)
BATCH_TOKENS = 48
# One model in float32, its sums in another order. Seen: 2e-6 between the routes, 2e-5 to transformers.
ROUTE_TOLERANCE = 1e-5
PARITY_TOLERANCE = 1e-4
# One minus a sum of float32 probabilities: see `LOG_TAIL_FLOOR`.
TAIL_MASS_TOLERANCE = 1e-6


def png(width: int, height: int, seed: int) -> bytes:
    """Noise of that size."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(buffer, "PNG")
    return buffer.getvalue()


def picture(width: int, height: int, seed: int) -> DecodedImage:
    """The same, decoded."""
    return DecodedImage.of(png(width, height, seed))


@pytest.fixture(scope="module")
def setup(tiny_qwen_vl: Path) -> EngineSetup:
    """The tiny Qwen3-VL, tails at three temperatures."""
    renderer = Renderer(tiny_qwen_vl)
    return EngineSetup(
        tiny_qwen_vl,
        renderer.vocab_size,
        renderer.eos_id,
        renderer.image_token_id,
        k=K,
        num_threads=1,
        temperatures=TEMPERATURES,
    )


Ask = Callable[..., ScoreRequest]


@pytest.fixture(scope="module")
def ask(tiny_qwen_vl: Path) -> Ask:
    """`ask("id", ["question", "answer", …], image, …)`: the images stand in the first question."""
    renderer = Renderer(tiny_qwen_vl)

    def make(sample_id: str, turns: list[str], *images: DecodedImage) -> ScoreRequest:
        messages = []
        for number, text in enumerate(turns):
            parts = [{"type": "image"}] * (len(images) if number == 0 else 0) + [{"type": "text", "text": text}]
            messages.append(
                {"role": "assistant", "content": text} if number % 2 else {"role": "user", "content": parts}
            )
        return ScoreRequest(sample_id, **vars(renderer.render(messages)), images=images)

    return make


@pytest.fixture(scope="module")
def requests(ask: Ask) -> list[ScoreRequest]:
    """Text and pictures of five shapes, one to three turns, shorter and much longer than a step."""
    long = "a red seven and a blue two " * 4
    return [
        ask("square", ["what is in the picture?", "a red seven"], picture(32, 32, 1)),
        ask("turns", ["how many digits?", "three", "a blue two?", "yes", "a red seven?", long], picture(50, 41, 2)),
        ask("text", ["is there a seven?", "none at all, and no picture either"]),
        ask("two", ["which is red?", "the first"], picture(64, 24, 3), picture(20, 60, 4)),
        ask("short", ["what?", "no"], picture(16, 16, 5)),
        ask("long", [long, long]),
    ]


@pytest.fixture(scope="module")
def vllm_engine(setup: EngineSetup) -> Iterator[VllmEngine]:
    """vLLM with the span hook, prompts in pieces of 48 tokens."""
    engine = build_engine(VllmEngineConfig(route="span_hook", batch_tokens=BATCH_TOKENS), setup)
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def hf_engine(setup: EngineSetup) -> Engine:
    """The same teacher under transformers."""
    return build_engine(HfEngineConfig(), setup)


def rows_of(answer: object) -> TeacherRows:
    """The rows of an answer, which must not be a problem."""
    assert isinstance(answer, ScoredSample), answer
    assert isinstance(answer.rows, TeacherRows)
    return answer.rows


def assert_close(one: TeacherRows, other: TeacherRows, tolerance: float) -> None:
    """Labels and top-k within the tolerance; entries closer than that may change places."""
    np.testing.assert_allclose(one.label_logprob_T, other.label_logprob_T, atol=tolerance, rtol=0)
    np.testing.assert_allclose(one.topk_logprobs_TK, other.topk_logprobs_TK, atol=tolerance, rtol=0)
    moved_TK = one.topk_ids_TK != other.topk_ids_TK
    assert moved_TK.mean() <= 0.02, np.argwhere(moved_TK)


def test_both_routes_agree_on_every_sample(vllm_engine: VllmEngine, requests: list[ScoreRequest]) -> None:
    """Response rows alone, or cut out of all rows: the same ids, ranks and logprobs; the tail's mass too."""
    stock = vllm_engine.score_by(requests, "prompt_logprobs")
    hook = vllm_engine.score_by(requests, "span_hook")
    for request, one, other in zip(requests, stock, hook, strict=True):
        a, c = rows_of(one), rows_of(other)
        assert len(a.label_logprob_T) == len(c.label_logprob_T) == len(request.response_ids)
        assert_close(a, c, ROUTE_TOLERANCE)
        np.testing.assert_array_equal(a.label_rank_T, c.label_rank_T)
        np.testing.assert_allclose(
            np.exp(a.log_tail_mass_T), np.exp(c.log_tail_mass_T), atol=TAIL_MASS_TOLERANCE, rtol=0
        )
        assert a.log_tail_mass_TX is None
    assert vllm_engine.route == "span_hook"


def test_rows_and_tails_are_those_of_transformers(
    vllm_engine: VllmEngine, hf_engine: Engine, requests: list[ScoreRequest], setup: EngineSetup
) -> None:
    """Every column, the exact log tail at T = 1, 2 and 4 included; images became the same number of tokens."""
    for request, one, other in zip(requests, hf_engine.score(requests), vllm_engine.score(requests), strict=True):
        expected, rows = rows_of(one), rows_of(other)
        check_rows(rows, setup.vocab_size, request.response_ids, TEMPERATURES)
        assert_close(expected, rows, PARITY_TOLERANCE)
        np.testing.assert_allclose(expected.log_tail_mass_T, rows.log_tail_mass_T, atol=PARITY_TOLERANCE, rtol=0)
        assert expected.log_tail_mass_TX is not None
        assert rows.log_tail_mass_TX is not None
        np.testing.assert_allclose(expected.log_tail_mass_TX, rows.log_tail_mass_TX, atol=PARITY_TOLERANCE, rtol=0)
        assert isinstance(one, ScoredSample)
        assert isinstance(other, ScoredSample)
        assert one.expanded_length == other.expanded_length


def test_images_never_share(vllm_engine: VllmEngine, hf_engine: Engine, ask: Ask) -> None:
    """Twelve pictures of one size under one prompt, each twice and in two calls: vLLM's caches give each its own."""
    turns = ["what is in the picture?", "a red seven"]
    asked = [ask(str(n), turns, picture(32, 32, n % 12)) for n in range(24)]
    expected = [rows_of(answer) for answer in hf_engine.score(asked)]
    first, second = vllm_engine.score(asked), vllm_engine.score(asked[::-1])[::-1]
    for n, rows in enumerate(expected):
        assert_close(rows, rows_of(first[n]), PARITY_TOLERANCE)
        assert_close(rows, rows_of(second[n]), PARITY_TOLERANCE)
    apart = [np.abs(expected[0].topk_logprobs_TK - expected[n].topk_logprobs_TK).max() for n in range(1, 12)]
    assert min(apart) > 10 * PARITY_TOLERANCE


def test_expanded_ids_are_refused(vllm_engine: VllmEngine, ask: Ask, setup: EngineSetup) -> None:
    """vLLM would expand them once more and say nothing; the neighbour is scored as ever."""
    once = ask("once", ["what?", "no"], picture(32, 32, 1))
    at = int(np.flatnonzero(once.prompt_ids == setup.image_token_id)[0])
    expanded_ids = np.insert(once.prompt_ids, at, [setup.image_token_id] * 15)
    expanded = replace(once, sample_id="expanded", prompt_ids=expanded_ids, prompt_lengths=once.prompt_lengths + 15)
    problem, answer = vllm_engine.score([expanded, once])
    assert isinstance(problem, SampleProblem)
    assert (problem.sample_id, problem.code) == ("expanded", "image_placeholders")
    rows_of(answer)


def test_another_expansion_than_ours_is_refused(
    vllm_engine: VllmEngine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If vLLM makes another number of tokens of an image than we count, no row can be placed."""
    monkeypatch.setattr(vllm_engine, "_count_image_tokens", lambda _width, _height: 15)
    for route in ("prompt_logprobs", "span_hook"):
        with pytest.raises(EngineError, match=r"'a': vLLM saw \d+ tokens .* expanded differently"):
            vllm_engine.score_by([ask("a", ["what?", "no"], picture(32, 32, 1))], route)


def test_a_refused_sample_harms_no_neighbour(vllm_engine: VllmEngine, ask: Ask) -> None:
    """A token that the model does not have: vLLM refuses that sample, with its own words, and answers the other."""
    good = ask("good", ["what?", "no"])
    bad = replace(good, sample_id="bad", prompt_ids=np.full_like(good.prompt_ids, 100_000))
    problem, answer = vllm_engine.score([bad, good])
    assert isinstance(problem, SampleProblem)
    assert (problem.sample_id, problem.code) == ("bad", "teacher_refused")
    rows_of(answer)


def test_two_units_may_be_in_flight(vllm_engine: VllmEngine, requests: list[ScoreRequest]) -> None:
    """Threads that score at once get what they get one after the other."""
    scored = vllm_engine.score(requests)
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(vllm_engine.score, requests) for _ in range(3)]:
            for one, other in zip(scored, future.result(), strict=True):
                assert_close(rows_of(one), rows_of(other), ROUTE_TOLERANCE)


def test_drawing_from_prompts_in_pieces_is_refused(vllm_engine: VllmEngine, ask: Ask) -> None:
    """vLLM on a CPU would die of it; the message says what to set. Greedy answers need no draws and are given."""
    prompt = without_response(ask("a", ["what is in the picture? " * 6, "-"]))
    with pytest.raises(
        EngineError, match=r"engine\.batch_tokens \(now 48\) to at least engine\.context_length \(256\)"
    ):
        vllm_engine.generate([prompt], Sampling(max_new_tokens=4, temperature=1.0))
    (candidates,) = vllm_engine.generate([prompt], Sampling(max_new_tokens=4))
    assert not isinstance(candidates, SampleProblem)


def without_response(request: ScoreRequest) -> ScoreRequest:
    """The first prompt segment of the request: what candidates are drawn for."""
    length = int(request.prompt_lengths[0])
    return replace(
        request,
        prompt_ids=request.prompt_ids[:length],
        prompt_lengths=np.array([length], np.int32),
        response_ids=request.response_ids[:0],
        response_lengths=np.array([0], np.int32),
    )


NUM_PADDED = 20


@pytest.fixture(scope="module")
def padded_setup(tiny_teacher: Path) -> EngineSetup:
    """The tiny LLaVA, told of fewer tokens than its lm_head has rows."""
    renderer = Renderer(tiny_teacher)
    return EngineSetup(
        tiny_teacher,
        renderer.vocab_size - NUM_PADDED,
        renderer.eos_id,
        renderer.image_token_id,
        k=K,
        num_threads=1,
        temperatures=TEMPERATURES,
    )


@pytest.fixture(scope="module")
def unit(tiny_qwen_vl: Path) -> Unit:
    """Questions about one picture, about two, and about none; one has an answer before its last."""
    renderer = Renderer(tiny_qwen_vl)
    asked: list[tuple[list[str], list[bytes]]] = [
        (["what is in the picture?", "a red seven"], [png(32, 32, 1)]),
        (["how many digits?", "three", "a blue two?", "yes"], [png(50, 41, 2)]),
        (["which is red?", "the first"], [png(64, 24, 3), png(20, 60, 4)]),
        (["is there a seven?", "none at all"], []),
    ]
    samples = []
    for number, (turns, images) in enumerate(asked):
        parts: list[dict[str, str]] = [{"type": "image"}] * len(images)
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": turns[0]}]}]
        messages += [
            {"role": "user", "content": [{"type": "text", "text": text}]}
            if place % 2
            else {"role": "assistant", "content": text}
            for place, text in enumerate(turns[1:])
        ]
        samples.append(
            PlannedSample(
                f"s{number}",
                "chat",
                "made",
                "train",
                messages,
                **vars(renderer.render(messages)),
                images=tuple(ImageRef(data=data) for data in images),
                image_sha256=tuple(map(sha256_hex, images)),
            )
        )
    return Unit("000000-test", tuple(samples))


CAPTURE_MODES: tuple[CaptureMode, ...] = (ScoreMode(), GenerateMode(type="generate", max_new_tokens=6))


@pytest.mark.parametrize("mode", CAPTURE_MODES, ids=lambda mode: mode.type)
def test_a_capture_holds_what_transformers_thinks_of_the_same_answers(
    vllm_engine: VllmEngine, hf_engine: Engine, setup: EngineSetup, unit: Unit, mode: CaptureMode, tmp_path: Path
) -> None:
    """Given or written by vLLM, with the images and once more without: the figures are those of the other engine.

    What vLLM writes at temperature 0 is its own first choice, token by token.
    """
    renderer = Renderer(setup.model_dir)
    spec = CaptureSpec(
        kind="samples",
        tokenizer=renderer.identity(),
        engine=vllm_engine.describe(),
        codec=CodecPolicy(k_max=K, k_min=K, p_min=0, grid="exact", temperatures=(2, 4)),
        dataset=DatasetIdentity(snapshot_sha256="0" * 64, num_samples=len(unit.items), unit_tokens=1000),
        mode=mode,
        no_image_pass=True,
    )
    cache = Lake.create(tmp_path / "lake").create_cache("capture", spec)
    record = capture_unit(vllm_engine, unit, cache, {}, renderer)
    assert not record.errors
    assert verify_unit(cache, record) == []
    cache.snapshot()
    dataset = LakeDataset(tmp_path / "lake", "capture")
    stored = [dataset[position] for position in range(len(dataset))]
    planned = {item.item_id: item for item in unit.items}
    assert [sample.sample_id for sample in stored] == list(planned)
    answered = []
    for sample in stored:
        own = planned[sample.sample_id]
        assert isinstance(own, PlannedSample)
        ids = {name: getattr(sample, name) for name in vars(renderer.render(own.messages))}
        answered.append(replace(own, messages=list(sample.messages), **ids))
    decoded = {image.image_sha256: image for sample in stored for image in map(DecodedImage.of, sample.images)}
    scoring = spec.model_copy(update={"mode": ScoreMode()})
    for sample, answer in zip(stored, answers_of(hf_engine, answered, decoded, scoring, renderer), strict=True):
        assert isinstance(answer, Answer), answer
        rows = answer.rows
        assert isinstance(rows, TeacherRows)
        assert sample.expanded_length == answer.expanded_length
        np.testing.assert_allclose(sample.rows.label_logprob_T, rows.label_logprob_T, atol=PARITY_TOLERANCE, rtol=0)
        np.testing.assert_allclose(
            sample.rows.topk_logprobs.reshape(-1, K), rows.topk_logprobs_TK, atol=PARITY_TOLERANCE, rtol=0
        )
        if not sample.images:
            assert sample.label_logprob_no_image_T is None
            assert answer.no_image_logprob_T is None
            continue
        assert sample.label_logprob_no_image_T is not None
        assert answer.no_image_logprob_T is not None
        np.testing.assert_allclose(
            sample.label_logprob_no_image_T, answer.no_image_logprob_T, atol=PARITY_TOLERANCE, rtol=0
        )
        # A picture changes what this teacher thinks by far more than two engines differ.
        assert np.abs(sample.label_logprob_no_image_T - sample.rows.label_logprob_T).max() > 100 * PARITY_TOLERANCE
    if mode.type == "generate":
        assert all(sample.rows.label_rank_T.tolist() == [1] * len(sample.response_ids) for sample in stored)
        assert all(1 <= len(sample.response_ids) <= 6 for sample in stored)
        # The answers before the last are the data's, and part of the prompt.
        assert [len(sample.prompt_lengths) for sample in stored] == [1] * 4


@pytest.fixture(scope="module")
def padded_engine(padded_setup: EngineSetup) -> Iterator[VllmEngine]:
    """vLLM with the padded teacher, every prompt in one piece."""
    engine = build_engine(VllmEngineConfig(), padded_setup)
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def padded_request(padded_setup: EngineSetup) -> ScoreRequest:
    """A long question, so that the prefix cache has a block of it, and a picture."""
    renderer = Renderer(padded_setup.model_dir)
    question = [{"type": "image"}, {"type": "text", "text": "is there a seven? " * 16}]
    rendered = renderer.render([{"role": "user", "content": question}, {"role": "assistant", "content": "none at all"}])
    request = ScoreRequest("padded", **vars(rendered), images=(picture(32, 32, 6),))
    return replace(
        request,
        prompt_ids=request.prompt_ids % padded_setup.vocab_size,
        response_ids=request.response_ids % padded_setup.vocab_size,
    )


def test_slots_of_a_padded_head_are_no_tokens(
    padded_engine: VllmEngine, padded_request: ScoreRequest, padded_setup: EngineSetup
) -> None:
    """Twenty rows of the lm_head without a token: neither route returns or counts them, and none is ever drawn."""
    expected = rows_of(build_engine(HfEngineConfig(), padded_setup).score([padded_request])[0])
    for route in ("prompt_logprobs", "span_hook"):
        rows = rows_of(padded_engine.score_by([padded_request], route)[0])
        check_rows(replace(rows, log_tail_mass_TX=None), padded_setup.vocab_size, padded_request.response_ids)
        assert_close(expected, rows, PARITY_TOLERANCE)
    sampling = Sampling(max_new_tokens=40, n=16, temperature=2.0)
    (candidates,) = padded_engine.generate([without_response(padded_request)], sampling)
    assert not isinstance(candidates, SampleProblem)
    drawn = np.concatenate([candidate.response_ids for candidate in candidates])
    # One in fifteen of the untrimmed head's entries: hundreds of draws would meet some of them.
    assert len(drawn) > 300
    assert int(drawn.max()) < padded_setup.vocab_size
    # Nor is a placeholder, which no response can hold.
    assert padded_setup.image_token_id not in drawn


def test_scoring_after_sampling_reads_no_cached_prefix(padded_engine: VllmEngine, padded_request: ScoreRequest) -> None:
    """Candidates fill the prefix cache with this very prompt; its rows afterwards are those from before."""
    before = rows_of(padded_engine.score([padded_request])[0])
    sampling = Sampling(max_new_tokens=4, n=3, temperature=1.0)
    padded_engine.generate([without_response(padded_request)], sampling)
    for route in ("prompt_logprobs", "span_hook"):
        assert_close(before, rows_of(padded_engine.score_by([padded_request], route)[0]), ROUTE_TOLERANCE)


def test_candidates_have_the_tail_at_every_temperature(
    padded_engine: VllmEngine, padded_request: ScoreRequest, padded_setup: EngineSetup
) -> None:
    """Decoding does not tell it, so the candidates are scored; a prompt that is too long stays a problem."""
    prompt = without_response(padded_request)
    too_long = replace(
        prompt,
        sample_id="too long",
        prompt_ids=np.full(300, padded_setup.eos_id, np.int32),
        prompt_lengths=np.array([300], np.int32),
        images=(),
    )
    sampling = Sampling(max_new_tokens=6, n=3, temperature=1.5, seed=1)
    problem, candidates = padded_engine.generate([too_long, prompt], sampling)
    assert isinstance(problem, SampleProblem)
    assert problem.code == "prompt_too_long"
    assert not isinstance(candidates, SampleProblem)
    assert len({candidate.response_ids.tobytes() for candidate in candidates}) > 1
    for candidate in candidates:
        check_rows(candidate.rows, padded_setup.vocab_size, candidate.response_ids, TEMPERATURES)


def test_scoring_and_sampling_may_be_in_flight_at_once(padded_engine: VllmEngine, padded_request: ScoreRequest) -> None:
    """Four threads, two phases: everybody gets what comes out one after the other."""
    prompt, sampling = without_response(padded_request), Sampling(max_new_tokens=5, n=2, temperature=1.0, seed=2)
    scored, drawn = padded_engine.score([padded_request]), padded_engine.generate([prompt], sampling)
    with ThreadPoolExecutor(4) as pool:
        scoring = [pool.submit(padded_engine.score, [padded_request]) for _ in range(4)]
        drawing = [pool.submit(padded_engine.generate, [prompt], sampling) for _ in range(4)]
        for future in scoring:
            assert_close(rows_of(scored[0]), rows_of(future.result()[0]), ROUTE_TOLERANCE)
        for drawn_again in drawing:
            for one, other in zip(drawn[0], drawn_again.result()[0], strict=True):
                np.testing.assert_array_equal(one.response_ids, other.response_ids)


def test_what_vllm_does_not_sample_is_an_error(padded_engine: VllmEngine, padded_request: ScoreRequest) -> None:
    """Its own limit of the temperature, in its own words."""
    with pytest.raises(EngineError, match=r"temperature must be in \[0, 2\], got 20"):
        padded_engine.generate([without_response(padded_request)], Sampling(max_new_tokens=4, temperature=20.0))


def test_options_of_the_image_processor_reach_it(setup: EngineSetup, hf_engine: Engine, ask: Ask) -> None:
    """Told of fewer pixels, vLLM makes fewer tokens of a big picture, as many as we count; a small one stays as it was.

    Another identity, too: the numbers are others.
    """
    small = VllmEngineConfig(mm_processor_kwargs={"max_pixels": 8 * 64})
    big = ask("big", ["what is in the picture?", "a red seven"], picture(64, 32, 9))
    tiny = ask("tiny", ["what is in the picture?", "a red seven"], picture(16, 16, 10))
    default, same = hf_engine.score([big, tiny])
    engine = build_engine(small, setup)
    try:
        fewer, equal = engine.score([big, tiny])
        assert isinstance(default, ScoredSample)
        assert isinstance(fewer, ScoredSample)
        # 64x32 pixels are 32 tokens of 8x8; of 8 x 64 pixels they leave 8.
        assert default.expanded_length - fewer.expanded_length == 32 - 8
        assert_close(rows_of(same), rows_of(equal), PARITY_TOLERANCE)
        assert engine.describe() != identify_engine(VllmEngineConfig(), setup)
    finally:
        engine.close()


def test_other_pixels_than_everybody_elses_are_refused(
    setup: EngineSetup, vllm_engine: VllmEngine, requests: list[ScoreRequest]
) -> None:
    """torchvision resamples differently from PIL, with which `hf` and the student read the same images.

    The refused engine was running already; that it is closed takes nothing from the other engine of this process.
    """
    with pytest.raises(EngineError, match="resamples images by torchvision"):
        build_engine(VllmEngineConfig(mm_processor_kwargs={"use_fast": True}), setup)
    for answer in vllm_engine.score(requests):
        rows_of(answer)


@pytest.fixture
def hook_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is computed from the hidden state before its own."""
    slices = span_hook._slices_v1

    def shifted(*arguments: object) -> Iterator[span_hook.PromptSlice]:
        for item in slices(*arguments):
            yield replace(item, offset=max(item.offset - 1, 0))

    monkeypatch.setattr(span_hook, "_slices_v1", shifted)


@pytest.mark.usefixtures("hook_that_is_off_by_one")
def test_a_hook_that_is_off_by_one_is_refused(
    setup: EngineSetup, requests: list[ScoreRequest], hf_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The start-up probe sees it. Asked for, it is an error; left to us, prompt logprobs take over, and a line says so.

    The engine that took over is then killed in mid-call: it says that it is dead, now and ever after.
    """
    with pytest.raises(EngineError, match=r"engine\.route is 'span_hook', but sample 'probe-\d' .* differ by up to"):
        build_engine(VllmEngineConfig(route="span_hook"), setup)
    with pytest.raises(EngineError, match=r"tail at temperatures \(2\.0, 4\.0\) is known to the span hook only"):
        build_engine(VllmEngineConfig(), setup)
    engine = build_engine(VllmEngineConfig(), replace(setup, temperatures=()))
    assert isinstance(engine, VllmEngine)
    assert engine.route == "prompt_logprobs"
    (record,) = [record for record in caplog.records if record.name.startswith("logitlake")]
    assert "vLLM scores by prompt logprobs, because sample 'probe-" in record.getMessage()
    for one, other in zip(hf_engine.score(requests), engine.score(requests), strict=True):
        assert_close(rows_of(one), rows_of(other), PARITY_TOLERANCE)

    def fail() -> None:
        raise RuntimeError("out of memory")

    core = engine._frontend._engine  # type: ignore[attr-defined]  # there is no public way to break it
    core.step = fail
    for cause in ("RuntimeError: out of memory", "RuntimeError: out of memory"):
        with pytest.raises(EngineError, match=f"the vLLM engine died .* {cause}"):
            engine.score(requests[:1])
    engine.close()


def test_a_version_that_is_not_listed_gets_no_hook(setup: EngineSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was never run there, so it is not tried; the message names the version and what is listed."""
    monkeypatch.setitem(span_hook.SPAN_HOOK_VERSIONS, "v1", frozenset({"0.1.0"}))
    with pytest.raises(EngineError, match=r"not tested with vLLM 0\.\d+.* model runner v1; listed are .*0\.1\.0"):
        build_engine(VllmEngineConfig(route="span_hook"), setup)


def test_the_child_process_gives_the_same_rows(
    vllm_engine: VllmEngine, requests: list[ScoreRequest], tmp_path: Path, setup: EngineSetup
) -> None:
    """AsyncLLM with its core in a child, asked by four threads: the rows of the core in this process.

    Then the child is killed, and the engine says so.
    """
    (tmp_path / "asked.pickle").write_bytes(pickle.dumps((setup, requests)))
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_child_process.py")), str(tmp_path)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    answered = pickle.loads((tmp_path / "answered.pickle").read_bytes())
    assert answered["route"] == "span_hook"
    expected = vllm_engine.score(requests)
    for scored in answered["scored"]:
        for one, other in zip(expected, scored, strict=True):
            assert_close(rows_of(one), rows_of(other), ROUTE_TOLERANCE)
    (candidates,) = answered["drawn"]
    assert len(candidates) == 2
    assert "the vLLM engine died and answers nothing any more" in answered["after_kill"]
