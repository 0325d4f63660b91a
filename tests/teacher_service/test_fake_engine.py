"""The fake teacher: fast rows that are its whole truth, cut; and faults that come when they are called."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitlake_schemas import SampledPolicy
from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage
from logitlake_shared.teacher_checks import check_rows
from logitlake_shared.topk import DrawnRows, TeacherRows
from logitlake_teacher.config import FakeEngineConfig
from logitlake_teacher.config.engines import WrongAnswer
from logitlake_teacher.engines import EngineSetup, SampleProblem, Sampling, ScoredSample, ScoreRequest
from logitlake_teacher.engines.fake import FakeEngine

EOS, IMAGE = 1, 2
# Rows are float32 of float64 figures.
TOLERANCE = 3e-6
# Five standard errors of the mean of 20,000 draws from the exponential distribution of mean 1.
MEAN_TOLERANCE = 0.04


def setup_of(vocab_size: int = 40, k: int = 8, **told: Any) -> EngineSetup:
    """A teacher that needs no folder."""
    return EngineSetup(Path("teacher"), vocab_size, EOS, IMAGE, k, 1, **told)


def ask(sample_id: str, prompt: list[int], response: list[int], *images: DecodedImage) -> ScoreRequest:
    """A sample of one turn."""
    return ScoreRequest(
        sample_id,
        np.array(prompt, np.int32),
        np.array([len(prompt)], np.int32),
        np.array(response, np.int32),
        np.array([len(response)], np.int32),
        images,
    )


def rows_of(answer: object) -> TeacherRows:
    """The rows of an answer that is one."""
    assert isinstance(answer, ScoredSample), answer
    assert isinstance(answer.rows, TeacherRows)
    return answer.rows


@given(
    vocab_size=st.integers(4, 60),
    share=st.floats(0, 1),
    sharpness=st.sampled_from([0.3, 1.0, 2.0, 6.0]),
    mean_response=st.sampled_from([None, 2, 5, 1000]),
    seed=st.integers(0, 2**63),
)
def test_rows_are_the_truth_cut(
    vocab_size: int, share: float, sharpness: float, mean_response: int | None, seed: int
) -> None:
    """Whatever k, vocabulary and sharpness: top-k, labels, ranks and all tails are those of the whole distribution."""
    k = 1 + round(share * (vocab_size - 1))
    config = FakeEngineConfig(sharpness=sharpness, mean_response=mean_response, seed=seed)
    engine = FakeEngine(config, setup_of(vocab_size, k, temperatures=(2.0, 0.5)))
    tokens = [token for token in range(vocab_size) if token != IMAGE]
    request = ask("one", [0], tokens)
    rows = rows_of(engine.score([request])[0])
    check_rows(rows, vocab_size, request.response_ids)
    truth_TV = engine.truth(request)
    np.testing.assert_allclose(np.exp(truth_TV).sum(1), 1, atol=1e-9)
    best_TV = -np.sort(-truth_TV, axis=1)
    np.testing.assert_allclose(rows.topk_logprobs_TK, best_TV[:, :k], rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(
        np.take_along_axis(truth_TV, rows.topk_ids_TK.astype(np.int64), 1), best_TV[:, :k], rtol=1e-9
    )
    labels_T = truth_TV[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(rows.label_logprob_T, labels_T, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(rows.label_rank_T, (truth_TV > labels_T[:, None] + 1e-12).sum(1) + 1)
    assert rows.log_tail_mass_TX is not None
    tails = {1.0: rows.log_tail_mass_T, 2.0: rows.log_tail_mass_TX[:, 0], 0.5: rows.log_tail_mass_TX[:, 1]}
    for temperature, log_tail_T in tails.items():
        tempered_TV = best_TV / temperature
        tempered_TV -= np.logaddexp.reduce(tempered_TV, axis=1, keepdims=True)
        expected_T = np.logaddexp.reduce(tempered_TV[:, k:], axis=1, initial=-np.inf)
        np.testing.assert_allclose(log_tail_T, expected_T, rtol=1e-5, atol=TOLERANCE)


def test_probabilities_fall_by_zipfs_law() -> None:
    """The mean step from rank r to r + 1 is sharpness / r, and the first token is any of the vocabulary."""
    engine = FakeEngine(FakeEngineConfig(sharpness=1.5), setup_of(50, 40))
    draw = np.random.default_rng(0)
    requests = [ask(str(n), [1000 + n], draw.integers(3, 50, 20).tolist()) for n in range(1000)]
    rows = [rows_of(answer) for answer in engine.score(requests)]
    logprobs_TK = np.concatenate([part.topk_logprobs_TK for part in rows])
    steps_K = -np.diff(logprobs_TK, axis=1).mean(0)
    np.testing.assert_allclose(steps_K * np.arange(1, 40), 1.5, atol=1.5 * MEAN_TOLERANCE)
    first = np.bincount(np.concatenate([part.topk_ids_TK[:, 0] for part in rows]), minlength=50) / len(logprobs_TK)
    # Five standard errors of a share of 1 / 50 in 20,000.
    np.testing.assert_allclose(first, 1 / 50, atol=0.005)


def test_answers_have_the_mean_length_that_was_asked_for() -> None:
    """EOS has one chance in six at every token, so that 2,000 answers have six tokens on average."""
    engine = FakeEngine(FakeEngineConfig(mean_response=6), setup_of())
    (candidates,) = engine.generate([ask("one", [5], [])], Sampling(max_new_tokens=500, n=2000, temperature=1.0))
    assert not isinstance(candidates, SampleProblem)
    # The standard error of the mean of a geometric distribution of mean 6 over 2,000 draws is 0.12.
    assert abs(np.mean([len(candidate.response_ids) for candidate in candidates]) - 6) < 0.5
    assert {candidate.finish_reason for candidate in candidates} == {"stop"}
    assert all(candidate.response_ids[-1] == EOS for candidate in candidates)


def test_an_answer_that_is_cut_says_so_and_an_empty_one_is_eos() -> None:
    """Three tokens of room: whoever says EOS stops, maybe at once; whoever does not is stopped by length."""
    engine = FakeEngine(FakeEngineConfig(mean_response=3), setup_of())
    (candidates,) = engine.generate([ask("one", [5], [])], Sampling(max_new_tokens=3, n=60, temperature=1.0))
    assert not isinstance(candidates, SampleProblem)
    for candidate in candidates:
        assert (candidate.finish_reason == "stop") == (candidate.response_ids[-1] == EOS)
        assert candidate.finish_reason == "stop" or len(candidate.response_ids) == 3
    assert {candidate.finish_reason for candidate in candidates} == {"stop", "length"}
    assert [EOS] in [candidate.response_ids.tolist() for candidate in candidates]


def test_what_comes_before_counts_with_its_place(png: Callable[[int], bytes]) -> None:
    """Another seed, token, order, image, or order of images is another distribution; what comes behind is none."""
    one, two = DecodedImage.of(png(1)), DecodedImage.of(png(2))
    response = [7, 8]
    asked = [
        ask("a", [5, IMAGE, 6, IMAGE], response, one, two),
        ask("b", [5, IMAGE, 6, IMAGE], response, two, one),
        ask("c", [6, IMAGE, 5, IMAGE], response, one, two),
        ask("d", [IMAGE, 5, 6, IMAGE], response, one, two),
        ask("e", [5, 6], response),
        ask("f", [5, 6, 0], response),
        ask("g", [0, 5, 6], response),
    ]
    firsts = [
        rows_of(answer).topk_logprobs_TK[0].tobytes()
        for seed in (0, 1)
        for answer in FakeEngine(FakeEngineConfig(seed=seed), setup_of()).score(asked)
    ]
    assert len(set(firsts)) == len(firsts)
    engine = FakeEngine(FakeEngineConfig(), setup_of())
    behind = rows_of(engine.score([ask("h", [5, 6], [7, 9])])[0])
    whole = rows_of(engine.score([ask("e", [5, 6], response)])[0])
    assert behind.topk_logprobs_TK.tobytes() == whole.topk_logprobs_TK.tobytes()


def test_neighbours_change_no_bit() -> None:
    """A thousand samples at once, or each alone, problems between them."""
    engine = FakeEngine(FakeEngineConfig(context_length=12), setup_of(k=5, temperatures=(2.0,)))
    draw = np.random.default_rng(0)
    lengths = draw.integers((1, 0), 8, size=(300, 2))
    requests = [
        ask(str(n), draw.integers(3, 40, prompt).tolist(), draw.integers(3, 40, response).tolist())
        for n, (prompt, response) in enumerate(lengths.tolist())
    ]
    for together, request in zip(engine.score(requests), requests, strict=True):
        (alone,) = engine.score([request])
        if isinstance(together, SampleProblem):
            assert together == alone
            continue
        for name, column in vars(rows_of(alone)).items():
            assert column.tobytes() == getattr(together.rows, name).tobytes()


def test_draws_are_drawn_from_the_truth() -> None:
    """With N draws a token, counts come as near to the truth as N draws do."""
    policy = SampledPolicy(type="sampled", draws=255, seed=3)
    engine = FakeEngine(FakeEngineConfig(sharpness=1.0), setup_of(sampled=policy))
    request = ask("one", [5], [7, 8, 9])
    (answer,) = engine.score([request])
    assert isinstance(answer, ScoredSample)
    assert isinstance(answer.rows, DrawnRows)
    for drawn_N, logprobs_V in zip(answer.rows.drawn_ids_TN, engine.truth(request), strict=True):
        counts_V = np.bincount(drawn_N, minlength=40) / policy.draws
        # Five standard errors of a share at its widest, p = 1/2.
        np.testing.assert_allclose(counts_V, np.exp(logprobs_V), atol=5 * 0.5 / np.sqrt(policy.draws))


# ---- faults ----


@pytest.mark.parametrize("wrong", get_args(WrongAnswer))
def test_every_wrong_answer_is_refused_and_only_where_asked_for(wrong: Any) -> None:
    """No such row would be written: it fails the check of rows, or lacks one. The neighbour's is as ever."""
    request, other = ask("one", [5], [7, 8, EOS]), ask("other", [5], [7, 8, EOS])
    engine = FakeEngine(FakeEngineConfig(wrong={"one": wrong}), setup_of())
    damaged, sound = (rows_of(answer) for answer in engine.score([request, other]))
    if wrong == "missing_row":
        assert len(damaged.label_logprob_T) == 2
    else:
        with pytest.raises(EngineError, match=r"^teacher_(nonfinite|invalid)"):
            check_rows(damaged, 40, request.response_ids)
    (expected,) = FakeEngine(FakeEngineConfig(), setup_of()).score([other])
    for name, column in vars(rows_of(expected)).items():
        assert column is None or column.tobytes() == getattr(sound, name).tobytes()


def test_faults_change_no_identity() -> None:
    """A cache that was begun with faults goes on without them."""
    faulty = FakeEngineConfig(die_on=("x",), wrong={"y": "nan"}, slow_s=1.0, die_chance=0.5, ignore_sigterm=True)
    assert (
        FakeEngine(replace_signal(faulty), setup_of()).describe()
        == FakeEngine(FakeEngineConfig(), setup_of()).describe()
    )


def replace_signal(config: FakeEngineConfig) -> FakeEngineConfig:
    """Without the one fault that would stay behind in this process."""
    return config.model_copy(update={"ignore_sigterm": False})


_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from logitlake_teacher.config import FakeEngineConfig
from logitlake_teacher.engines import EngineSetup, ScoreRequest
from logitlake_teacher.engines.fake import FakeEngine
one = np.array([5], np.int32)
length = np.array([1], np.int32)
engine = FakeEngine(FakeEngineConfig.model_validate_json(sys.argv[1]), EngineSetup(Path("t"), 40, 1, 2, 8, 1))
print("made", flush=True)
for number in range(200):
    engine.score([ScoreRequest(f"s{number}", one, length, one, length)])
    print("scored", flush=True)
"""


def run(**faults: Any) -> "subprocess.Popen[str]":
    """A process that scores samples s0 to s199, one a call."""
    config = FakeEngineConfig(**faults).model_dump_json()
    return subprocess.Popen([sys.executable, "-c", _SCRIPT, config], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("faults", "code", "num_scored"),
    [
        ({"die_at_start": True}, 1, None),
        ({"die_on": ("s3",)}, 1, 3),
        ({"die_on": ("s3",), "die_by": "kill"}, -signal.SIGKILL, 3),
        ({"die_on": ("s3",), "die_by": "memory"}, -signal.SIGKILL, 3),
        ({"die_after_calls": 2}, -signal.SIGKILL, 2),
        ({"die_chance": 1.0}, -signal.SIGKILL, 0),
    ],
)
def test_a_process_dies_as_it_was_told(faults: dict[str, Any], code: int, num_scored: int | None) -> None:
    """With that exit status, and not before."""
    process = run(**faults)
    out, _ = process.communicate()
    assert process.returncode == code
    assert out.splitlines() == ([] if num_scored is None else ["made", *["scored"] * num_scored])


def test_a_process_that_ignores_sigterm_ends_at_sigkill() -> None:
    """It hangs on its first sample; SIGTERM is not heard, SIGKILL is."""
    process = run(ignore_sigterm=True, hang_on=("s0",))
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    os.kill(process.pid, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_a_slow_teacher_takes_its_time_a_call() -> None:
    """Two calls of a tenth of a second each, whatever they hold."""
    engine = FakeEngine(FakeEngineConfig(slow_s=0.1), setup_of())
    start = time.monotonic()
    engine.score([ask(str(n), [5], [7]) for n in range(50)])
    engine.score([])
    assert time.monotonic() - start >= 0.2
