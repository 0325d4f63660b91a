"""The checks that a vLLM engine passes before it captures anything, tried on teachers that are wrong on purpose."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitlake_shared.errors import EngineError
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.config import FakeEngineConfig, VllmEngineConfig
from logitlake_teacher.engines import EngineSetup, SampleProblem, ScoredSample, ScoreRequest, build_engine
from logitlake_teacher.engines.vllm.startup import (
    ROUNDING_NATS,
    check_batch_order,
    largest_difference,
    probe_requests,
    probe_span_hook,
)

VOCAB_SIZE, EOS_ID, IMAGE_ID = 64, 1, 2
K = 4

Answers = list[ScoredSample | SampleProblem]
Score = Callable[[Sequence[ScoreRequest]], Answers]


@pytest.fixture
def setup(tmp_path: Path) -> EngineSetup:
    """A teacher of 64 tokens that sees images."""
    return EngineSetup(tmp_path, VOCAB_SIZE, EOS_ID, IMAGE_ID, k=K, num_threads=1)


@pytest.fixture
def score(setup: EngineSetup) -> Score:
    """A teacher whose rows depend on nothing but the sample."""
    return build_engine(FakeEngineConfig(), setup).score


@pytest.fixture
def requests(setup: EngineSetup) -> list[ScoreRequest]:
    """The made-up samples."""
    return probe_requests(setup, sees_images=True)


def shifted(answers: Answers) -> Answers:
    """Every row one place too late: the fault that a hook with an off-by-one has."""
    return [
        replace(answer, rows=TeacherRows(*(None if c is None else np.roll(c, 1, axis=0) for c in vars(rows).values())))
        if isinstance(answer, ScoredSample) and isinstance(rows := answer.rows, TeacherRows)
        else answer
        for answer in answers
    ]


def test_the_made_up_samples_are_scorable_and_of_every_kind(setup: EngineSetup, requests: list[ScoreRequest]) -> None:
    """Text, one and two images, one and two turns; every placeholder has its image, and no other id is one."""
    assert len(requests) == len({request.sample_id for request in requests}) == 8
    assert {len(request.images) for request in requests} == {0, 1, 2}
    assert {len(request.response_lengths) for request in requests} == {1, 2}
    for request in requests:
        assert (request.prompt_ids == IMAGE_ID).sum() == len(request.images)
        assert (request.response_ids != IMAGE_ID).all()
        assert request.prompt_lengths.sum() == len(request.prompt_ids)
        assert request.response_lengths.sum() == len(request.response_ids)
    text_only = probe_requests(replace(setup, image_token_id=None), sees_images=False)
    assert not any(request.images for request in text_only)


def test_equal_rows_pass_the_probe(score: Score, requests: list[ScoreRequest]) -> None:
    """A hook that gives what vLLM gives has no problem."""
    assert probe_span_hook(score, score, requests, "float32") is None


@pytest.mark.parametrize("dtype", sorted(ROUNDING_NATS))
def test_rows_shifted_by_one_are_refused_in_every_dtype(score: Score, requests: list[ScoreRequest], dtype: str) -> None:
    """However coarse the dtype, its tolerance is far below what an off-by-one moves."""
    problem = probe_span_hook(score, lambda asked: shifted(score(asked)), requests, dtype)
    assert problem is not None
    assert "probe-0" in problem
    assert dtype in problem


def test_one_wrong_id_is_refused_in_float32(score: Score, requests: list[ScoreRequest]) -> None:
    """Logprobs as they were, one id replaced by another token."""

    def swapped(asked: Sequence[ScoreRequest]) -> Answers:
        answers = score(asked)
        last = answers[-1]
        assert isinstance(last, ScoredSample)
        assert isinstance(last.rows, TeacherRows)
        ids_TK = last.rows.topk_ids_TK.copy()
        ids_TK[-1, 0] = next(i for i in range(VOCAB_SIZE) if i not in ids_TK[-1])
        return [*answers[:-1], replace(last, rows=replace(last.rows, topk_ids_TK=ids_TK))]

    assert probe_span_hook(score, swapped, requests, "float32") is not None


def test_nan_is_no_agreement(score: Score, requests: list[ScoreRequest]) -> None:
    """NaN compares with nothing; it must not pass for a small difference."""

    def broken(asked: Sequence[ScoreRequest]) -> Answers:
        return [
            replace(
                answer, rows=replace(answer.rows, label_logprob_T=np.full_like(answer.rows.label_logprob_T, np.nan))
            )
            if isinstance(answer, ScoredSample)
            else answer
            for answer in score(asked)
        ]

    assert probe_span_hook(score, broken, requests, "bfloat16") is not None


def test_equal_logprobs_may_change_places() -> None:
    """Ties and what falls off the end of the list are no difference; an id that moves by a nat is one."""
    one = TeacherRows(
        topk_ids_TK=np.array([[5, 6, 7]], np.int32),
        topk_logprobs_TK=np.array([[-1.0, -2.0, -2.0]], np.float32),
        label_logprob_T=np.array([-1.0], np.float32),
        label_rank_T=np.array([1], np.int32),
        log_tail_mass_T=np.array([-1.0], np.float32),
    )
    tied = replace(one, topk_ids_TK=np.array([[5, 8, 6]], np.int32))
    moved = replace(one, topk_ids_TK=np.array([[6, 5, 7]], np.int32))
    assert largest_difference(one, tied).tolist() == [0.0]
    assert largest_difference(one, moved).tolist() == [1.0]


def test_an_engine_whose_rows_depend_on_the_order_is_refused(score: Score, requests: list[ScoreRequest]) -> None:
    """The second sample of a batch gets its neighbour's memory: together it is wrong, alone it is right."""
    check_batch_order(score, requests, "float32")

    def mixing(asked: Sequence[ScoreRequest]) -> Answers:
        answers = score(asked)
        return answers if len(asked) == 1 else [answers[0], *shifted(answers[1:2]), *answers[2:]]

    with pytest.raises(EngineError, match="mixes up samples"):
        check_batch_order(mixing, requests, "float32")


def test_tails_at_other_temperatures_want_the_span_hook(tiny_teacher: Path) -> None:
    """Known before vLLM is started; the message names both ways out."""
    setup = EngineSetup(tiny_teacher, VOCAB_SIZE, EOS_ID, IMAGE_ID, k=K, num_threads=1, temperatures=(2.0,))
    with pytest.raises(EngineError, match=r"engine\.route to auto or span_hook, or capture at temperature 1"):
        build_engine(VllmEngineConfig(route="prompt_logprobs"), setup)
