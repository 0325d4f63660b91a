"""B6: whatever is wrong with a teacher's answer, it is refused with a code and never written.

The rows are those of a seeded teacher over a vocabulary of 40, whose labels lie inside and outside its top-k.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from logitlake_shared.errors import EngineError
from logitlake_shared.teacher_checks import LABEL_TOLERANCE, check_rows
from logitlake_shared.topk import TeacherRows

VOCAB_SIZE = 40
K = 8
TEMPERATURES = (2, 4)
Change = Callable[[dict[str, Any]], object]


def _set(name: str, place: Any, value: Any) -> Change:
    return lambda rows: rows[name].__setitem__(place, value)


def _all_minus_infinity(rows: dict[str, Any]) -> None:
    """What log-softmax makes of logits that are all -inf, where it does not make NaN."""
    rows["topk_logprobs_TK"][0] = -np.inf
    rows["log_tail_mass_T"][0] = -np.inf


def _another_row(rows: dict[str, Any]) -> None:
    """Off by one: the label's figures are those of the token behind."""
    rows["label_rank_T"] = np.roll(rows["label_rank_T"], 1)
    rows["label_logprob_T"] = np.roll(rows["label_logprob_T"], 1)


DAMAGE: dict[str, tuple[Change, str]] = {
    "NaN logits": (_set("topk_logprobs_TK", 0, np.nan), "teacher_nonfinite"),
    "infinite logit": (_set("topk_logprobs_TK", (0, 0), np.inf), "teacher_nonfinite"),
    "all logits -inf": (_all_minus_infinity, "teacher_nonfinite"),
    "NaN label": (_set("label_logprob_T", 1, np.nan), "teacher_nonfinite"),
    "label impossible": (_set("label_logprob_T", 1, -np.inf), "teacher_nonfinite"),
    "NaN tail": (_set("log_tail_mass_T", 1, np.nan), "teacher_nonfinite"),
    "NaN tail at 4": (_set("log_tail_mass_TX", (1, 1), np.nan), "teacher_nonfinite"),
    "infinite tail at 4": (_set("log_tail_mass_TX", (1, 1), np.inf), "teacher_nonfinite"),
    "id outside the vocabulary": (_set("topk_ids_TK", (0, 3), VOCAB_SIZE), "padded vocabulary slots"),
    "negative id": (_set("topk_ids_TK", (0, 3), -1), "padded vocabulary slots"),
    "duplicate id": (lambda rows: rows["topk_ids_TK"].__setitem__((0, 1), rows["topk_ids_TK"][0, 0]), "occurs twice"),
    "order": (lambda rows: rows["topk_logprobs_TK"][0, :2].sort(), "falling order"),
    "mass above 1": (_set("log_tail_mass_T", 0, 0.0), "sum to 1.* expected 1"),
    "mass below 1": (_set("log_tail_mass_T", 0, -30.0), "sum to 0.* expected 1"),
    "tail at 2 everything": (_set("log_tail_mass_TX", (0, 0), 0.0), "temperature 2 is everything"),
    "tail at 2 smaller than at 1": (_set("log_tail_mass_TX", (0, 0), -30.0), "less than .* at temperature 1"),
    "tail at 4 too large": (_set("log_tail_mass_TX", (0, 1), -0.01), "not the most probable"),
    "no tail at any": (lambda rows: rows.update(log_tail_mass_TX=None), r"\[2, 4\] were asked for.* returned none"),
    "a tail missing": (lambda rows: rows.update(log_tail_mass_TX=rows["log_tail_mass_TX"][:, :1]), r"shape \(3, 1\)"),
    "rank of another token": (_another_row, "another token's"),
    "rank 0": (_set("label_rank_T", 2, 0), "has rank 0"),
    "rank beyond the vocabulary": (_set("label_rank_T", 2, VOCAB_SIZE + 1), f"has rank {VOCAB_SIZE + 1}"),
    "logprob of another entry": (
        lambda rows: rows["label_logprob_T"].__setitem__(0, rows["label_logprob_T"][0] - 2 * LABEL_TOLERANCE),
        "its entry says",
    ),
    "outside but more probable": (
        lambda rows: rows["label_logprob_T"].__setitem__(2, rows["topk_logprobs_TK"][2, -1] + 2 * LABEL_TOLERANCE),
        "whose last entry has",
    ),
}


@pytest.fixture
def labels() -> np.ndarray[Any, np.dtype[np.int32]]:
    """The first choice, the third, and one outside the top-k."""
    rows = _teacher()
    outside = np.setdiff1d(np.arange(VOCAB_SIZE), rows.topk_ids_TK[2])[0]
    return np.array([rows.topk_ids_TK[0, 0], rows.topk_ids_TK[1, 2], outside], np.int32)


@pytest.mark.parametrize("name", DAMAGE)
def test_what_must_never_be_written_is_refused(labels: Any, name: str) -> None:
    """Each way in which a teacher can be wrong has its own message; the same rows undamaged pass."""
    change, message = DAMAGE[name]
    rows = _teacher(labels)
    check_rows(rows, VOCAB_SIZE, labels, TEMPERATURES)
    columns = dict(vars(rows))
    change(columns)
    with pytest.raises(EngineError, match=message) as refused:
        check_rows(replace(rows, **columns), VOCAB_SIZE, labels, TEMPERATURES)
    assert str(refused.value).partition(": ")[0] in {"teacher_nonfinite", "teacher_invalid"}


def test_more_entries_than_the_vocabulary_has(labels: Any) -> None:
    """k larger than the vocabulary: some entry is none."""
    rows = _teacher(labels)
    with pytest.raises(EngineError, match="teacher_invalid: 8 entries a token, but the vocabulary has 7"):
        check_rows(rows, K - 1, labels)


def test_a_response_token_outside_the_vocabulary(labels: Any) -> None:
    """No row can be about a token that is none."""
    wrong = labels.copy()
    wrong[1] = VOCAB_SIZE
    with pytest.raises(EngineError, match="teacher_invalid: response ids span"):
        check_rows(_teacher(labels), VOCAB_SIZE, wrong)


def test_entries_that_are_not_the_most_probable(labels: Any) -> None:
    """The best token was left out: what the rest would have to hold, tokens below the last entry cannot."""
    rows = _teacher(labels, temperatures=())
    lost = np.exp(rows.topk_logprobs_TK[:, 0].astype(np.float64))
    shifted = replace(
        rows,
        topk_ids_TK=rows.topk_ids_TK[:, 1:],
        topk_logprobs_TK=rows.topk_logprobs_TK[:, 1:],
        log_tail_mass_T=np.log(np.exp(rows.log_tail_mass_T) + lost).astype(np.float32),
    )
    with pytest.raises(EngineError, match="not the most probable"):
        check_rows(shifted, VOCAB_SIZE)


def _teacher(labels: Any = (0, 0, 0), temperatures: tuple[int, ...] = TEMPERATURES) -> TeacherRows:
    logits_TV = np.random.default_rng(5).normal(scale=3, size=(3, VOCAB_SIZE))
    order_TV = np.argsort(-logits_TV, axis=1)
    sorted_TV = np.take_along_axis(logits_TV, order_TV, 1)
    logprobs_TV = sorted_TV - np.log(np.exp(sorted_TV).sum(1, keepdims=True))
    tails = [
        np.log(np.exp(sorted_TV / t)[:, K:].sum(1) / np.exp(sorted_TV / t).sum(1)).astype(np.float32)
        for t in (1, *temperatures)
    ]
    rank_T = (order_TV == np.asarray(labels)[:, None]).argmax(1)
    return TeacherRows(
        topk_ids_TK=order_TV[:, :K].astype(np.int32),
        topk_logprobs_TK=logprobs_TV[:, :K].astype(np.float32),
        label_logprob_T=logprobs_TV[np.arange(3), rank_T].astype(np.float32),
        label_rank_T=rank_T.astype(np.int32) + 1,
        log_tail_mass_T=tails[0],
        log_tail_mass_TX=np.stack(tails[1:], axis=1) if temperatures else None,
    )
