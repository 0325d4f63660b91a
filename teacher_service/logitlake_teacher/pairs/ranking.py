"""The three ratings of a candidate, as functions of texts and logprobs.

    gold              agreement with the data's answer, 0 to 1
    visual_advantage  nats that the image adds to the candidate's logprob
    judge             how much more the teacher says yes than no, when asked whether the candidate is faithful

A rating is rounded to float32 once, here, so that what is compared with a margin is what is stored.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from logitlake_teacher.pairs.candidates import normalised

__all__ = ["agreement", "combined", "judge_rating", "visual_advantage"]

# Kana and Han are written without blanks between words: each sign counts as a word.
_SIGNS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SIGNS}]|[^\s{_SIGNS}]+")


def agreement(text: str, gold: str, measure: Literal["exact", "token_f1", "lcs"]) -> float:
    """How well `text` agrees with `gold`, 0 to 1: see `GoldRanking.measure`. Symmetric; two empty texts agree."""
    ours, theirs = normalised(text), normalised(gold)
    if measure == "exact":
        return float(ours == theirs)
    words, gold_words = _WORD.findall(ours), _WORD.findall(theirs)
    if not words and not gold_words:
        return 1.0
    if measure == "token_f1":
        common = (Counter(words) & Counter(gold_words)).total()
    else:
        common = _longest_common_subsequence(words, gold_words)
    return _float32(2 * common / (len(words) + len(gold_words)))


def visual_advantage(
    logprobs_T: NDArray[np.float32], no_image_logprobs_T: NDArray[np.float32], reduce: Literal["mean", "sum"]
) -> float:
    """Nats, or nats a token, by which the image makes these tokens more probable."""
    advantage_T = logprobs_T.astype(np.float64) - no_image_logprobs_T.astype(np.float64)
    return _float32(advantage_T.sum() if reduce == "sum" else advantage_T.mean())


def judge_rating(yes_logprobs: ArrayLike, no_logprobs: ArrayLike, rating: Literal["log_odds", "probability"]) -> float:
    """From the logprobs of all tokens that say yes and all that say no. Swapping the two turns the rating around."""
    yes = float(np.logaddexp.reduce(np.asarray(yes_logprobs, np.float64)))
    no = float(np.logaddexp.reduce(np.asarray(no_logprobs, np.float64)))
    return _float32(yes - no if rating == "log_odds" else np.exp(yes - np.logaddexp(yes, no)))


def combined(ratings: Sequence[float], combine: Literal["mean", "min", "sum"]) -> float:
    """One rating from those of a candidate's claims."""
    if combine == "min":
        return min(ratings)
    total = sum(ratings)
    return _float32(total if combine == "sum" else total / len(ratings))


def _longest_common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0  # what stood diagonally above
        for at, other in enumerate(theirs, start=1):
            above = row[at]
            row[at] = before + 1 if word == other else max(above, row[at - 1])
            before = above
    return row[-1]


def _float32(value: float | np.floating) -> float:
    return float(np.float32(value))
