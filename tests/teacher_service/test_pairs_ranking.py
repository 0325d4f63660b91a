"""The three ratings: laws, and examples done by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitlake_teacher.pairs.ranking import agreement, combined, judge_rating, visual_advantage

# float32 keeps seven digits; ratings here are below 100.
FLOAT32_TOLERANCE = 1e-5

LOGPROBS = st.lists(st.floats(-30, -0.01), min_size=1, max_size=4)
WORDS = st.lists(st.sampled_from(["a", "red", "seven", "blue", "two", "and"]), max_size=6).map(" ".join)
MEASURES = st.sampled_from(["exact", "token_f1", "lcs"])


@given(LOGPROBS, LOGPROBS)
def test_the_judge_is_antisymmetric(yes: list[float], no: list[float]) -> None:
    """Yes and no exchanged turn log-odds into their negative, and a probability into the rest to 1."""
    assert judge_rating(yes, no, "log_odds") == -judge_rating(no, yes, "log_odds")
    there, back = judge_rating(yes, no, "probability"), judge_rating(no, yes, "probability")
    assert there + back == pytest.approx(1, abs=FLOAT32_TOLERANCE)
    odds = judge_rating(yes, no, "log_odds")
    assert there == pytest.approx(1 / (1 + np.exp(-odds)), abs=FLOAT32_TOLERANCE)


def test_the_judge_by_hand() -> None:
    """p(yes) = 0.3 + 0.1 in two forms, p(no) = 0.1: odds 4 to 1, log 4 = 1.386, probability 0.4 / 0.5 = 0.8."""
    yes, no = np.log([0.3, 0.1]), np.log([0.1])
    assert judge_rating(yes, no, "log_odds") == pytest.approx(1.3862944, abs=FLOAT32_TOLERANCE)
    assert judge_rating(yes, no, "probability") == pytest.approx(0.8, abs=FLOAT32_TOLERANCE)


def test_claims_by_hand() -> None:
    """Two claims of 3 and -1: mean 1, worst -1, sum 2."""
    assert [combined([3.0, -1.0], how) for how in ("mean", "min", "sum")] == [1.0, -1.0, 2.0]


def test_visual_advantage_by_hand() -> None:
    """With the image -1, -2; without -2, -4: it adds 1 + 2 = 3 nats, 1.5 a token."""
    with_T, without_T = np.array([-1, -2], np.float32), np.array([-2, -4], np.float32)
    assert visual_advantage(with_T, without_T, "sum") == 3.0
    assert visual_advantage(with_T, without_T, "mean") == 1.5
    assert visual_advantage(without_T, with_T, "sum") == -3.0


@pytest.mark.parametrize(
    ("text", "gold", "exact", "token_f1", "lcs"),
    [
        ("a red seven", "A red seven.", 1, 1, 1),
        # common words a, seven: 2 * 2 / (3 + 3)
        ("a blue seven", "a red seven", 0, 2 / 3, 2 / 3),
        # the same bag, but in order only "red seven": 2 * 2 / (3 + 3)
        ("red seven a", "a red seven", 0, 1, 2 / 3),
        # "a" three times against once: min(3, 1) = 1: 2 * 1 / (3 + 1)
        ("a a a", "a", 0, 0.5, 0.5),
        ("two", "a red seven", 0, 0, 0),
        # Han has no blanks: three signs against two, two in common
        ("\u7ea2\u8272\u4e03", "\u7ea2\u4e03", 0, 0.8, 0.8),
    ],
)
def test_agreement_by_hand(text: str, gold: str, exact: float, token_f1: float, lcs: float) -> None:
    """The sums are beside the examples."""
    assert agreement(text, gold, "exact") == exact
    assert agreement(text, gold, "token_f1") == pytest.approx(token_f1, abs=FLOAT32_TOLERANCE)
    assert agreement(text, gold, "lcs") == pytest.approx(lcs, abs=FLOAT32_TOLERANCE)


@given(WORDS, WORDS, MEASURES)
def test_agreement_is_a_symmetric_share(text: str, gold: str, measure: str) -> None:
    """Between 0 and 1, 1 at equality, the same both ways; order can only cost, so lcs is at most token_f1."""
    there = agreement(text, gold, measure)  # type: ignore[arg-type]  # hypothesis gives plain strings
    assert there == agreement(gold, text, measure)  # type: ignore[arg-type]  # as above
    assert 0 <= there <= 1
    assert agreement(text, text, measure) == 1  # type: ignore[arg-type]  # as above
    assert agreement(text, gold, "exact") <= agreement(text, gold, "lcs") <= agreement(text, gold, "token_f1")
