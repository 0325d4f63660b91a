"""What an engine returned, checked before any of it may be written.

A teacher can be wrong in ways that no later stage would notice: NaN weights, slots of a padded vocabulary, a top-k that
is none, a label that belongs to the row beside. Each check is a sentence about distributions that holds for every
teacher, so a row that fails one is never written. Messages begin with a code: `teacher_nonfinite`, `teacher_invalid`.

Axes: T tokens, K entries, X temperatures.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from logitlake_shared.errors import EngineError
from logitlake_shared.topk import MASS_TOLERANCE, TeacherRows

__all__ = ["LABEL_TOLERANCE", "check_rows"]

# An engine may compute a token's own logprob apart from its top-k: two float32 results for one number.
LABEL_TOLERANCE = 1e-3

Int32 = npt.NDArray[np.int32]


def check_rows(
    rows: TeacherRows, vocab_size: int, label_ids_T: Int32 | None = None, temperatures: Sequence[float] = ()
) -> None:
    """Refuses rows that are not the most probable entries, the tail and the label of a distribution.

    `label_ids_T` are the response tokens, where they are known; `temperatures` those at which the tail was asked for,
    in the order of `log_tail_mass_TX`. Raises `EngineError` that begins with `teacher_nonfinite`, `teacher_invalid`.
    """
    if rows.topk_logprobs_TK.shape[1] > vocab_size:
        raise EngineError(
            f"teacher_invalid: {rows.topk_logprobs_TK.shape[1]} entries a token, but the vocabulary has {vocab_size}"
        )
    _check_finite(rows)
    _check_entries(rows, vocab_size)
    _check_tail(rows, vocab_size)
    _check_temperatures(rows, vocab_size, temperatures)
    if label_ids_T is not None:
        _check_labels(rows, vocab_size, label_ids_T)


def _check_finite(rows: TeacherRows) -> None:
    tails = [rows.log_tail_mass_T, *([] if rows.log_tail_mass_TX is None else [rows.log_tail_mass_TX])]
    num_bad = int(
        (~np.isfinite(rows.topk_logprobs_TK)).sum()
        + (~np.isfinite(rows.label_logprob_T)).sum()
        + sum(int((np.isnan(tail) | np.isposinf(tail)).sum()) for tail in tails)
    )
    if num_bad:
        raise EngineError(
            f"teacher_nonfinite: {num_bad} logprobs are NaN or infinite; check the teacher's weights and dtype"
        )


def _check_entries(rows: TeacherRows, vocab_size: int) -> None:
    ids_TK = rows.topk_ids_TK
    if ids_TK.size and (int(ids_TK.min()) < 0 or int(ids_TK.max()) >= vocab_size):
        raise EngineError(
            f"teacher_invalid: token ids span {ids_TK.min()}..{ids_TK.max()}, expected 0..{vocab_size - 1}: the engine "
            "returned padded vocabulary slots"
        )
    if (np.diff(rows.topk_logprobs_TK, axis=1) > 0).any():
        raise EngineError("teacher_invalid: top-k logprobs are not in falling order")
    if (np.diff(np.sort(ids_TK, axis=1), axis=1) == 0).any():
        raise EngineError("teacher_invalid: a token id occurs twice in one top-k")


def _check_tail(rows: TeacherRows, vocab_size: int) -> None:
    tail_T = np.exp(rows.log_tail_mass_T.astype(np.float64))
    mass_T = np.exp(rows.topk_logprobs_TK.astype(np.float64)).sum(1) + tail_T
    if mass_T.size and float(np.abs(mass_T - 1).max()) > MASS_TOLERANCE:
        worst = float(mass_T[np.abs(mass_T - 1).argmax()])
        raise EngineError(f"teacher_invalid: top-k and tail sum to {worst:.6f}, expected 1 within {MASS_TOLERANCE}")
    _check_tail_can_be(tail_T, rows.topk_logprobs_TK, vocab_size, 1)


def _check_temperatures(rows: TeacherRows, vocab_size: int, temperatures: Sequence[float]) -> None:
    if not temperatures:
        return
    expected = (len(rows.log_tail_mass_T), len(temperatures))
    if rows.log_tail_mass_TX is None or rows.log_tail_mass_TX.shape != expected:
        got = "none" if rows.log_tail_mass_TX is None else f"shape {rows.log_tail_mass_TX.shape}"
        raise EngineError(
            f"teacher_invalid: the tail masses at temperatures {list(temperatures)} were asked for, the engine "
            f"returned {got}; use an engine that sees all of the distribution, or codec.temperatures=[]"
        )
    least_T = np.exp(rows.log_tail_mass_T.astype(np.float64))
    for temperature, log_tail_T in zip(temperatures, rows.log_tail_mass_TX.T, strict=True):
        if (log_tail_T >= 0).any():
            raise EngineError(
                f"teacher_invalid: the tail at temperature {temperature} is everything; the top-k has a share, too"
            )
        tail_T = np.exp(log_tail_T.astype(np.float64))
        # Heat moves mass from the more probable tokens to the less probable ones, never back.
        if (tail_T < least_T - MASS_TOLERANCE).any():
            worst = int((least_T - tail_T).argmax())
            raise EngineError(
                f"teacher_invalid: the tail at temperature {temperature} is {tail_T[worst]:.6f}, less than the "
                f"{least_T[worst]:.6f} at temperature 1; the two are not of one distribution"
            )
        _check_tail_can_be(tail_T, rows.topk_logprobs_TK, vocab_size, temperature)


def _check_tail_can_be(
    tail_T: npt.NDArray[np.float64], logprobs_TK: npt.NDArray[np.float32], vocab_size: int, temperature: float
) -> None:
    """No token outside the top-k is more probable than its last entry, so there is a most that all of them can have."""
    if not tail_T.size or not logprobs_TK.shape[1]:
        return
    weights_TK = np.exp(logprobs_TK.astype(np.float64) / temperature)
    outside_T = (vocab_size - logprobs_TK.shape[1]) * weights_TK[:, -1]
    most_T = outside_T / (weights_TK.sum(1) + outside_T)
    if (tail_T > most_T + MASS_TOLERANCE).any():
        worst = int((tail_T - most_T).argmax())
        raise EngineError(
            f"teacher_invalid: the tail at temperature {temperature} is {tail_T[worst]:.6f}, tokens less probable than "
            f"the entries can have {most_T[worst]:.6f} at most; the entries are not the most probable ones"
        )


def _check_labels(rows: TeacherRows, vocab_size: int, label_ids_T: Int32) -> None:
    """The label's rank and logprob are what the entries say, or below the last of them."""
    rank_T, k = rows.label_rank_T, rows.topk_ids_TK.shape[1]
    if label_ids_T.size and (int(label_ids_T.min()) < 0 or int(label_ids_T.max()) >= vocab_size):
        raise EngineError(
            f"teacher_invalid: response ids span {label_ids_T.min()}..{label_ids_T.max()}, expected 0..{vocab_size - 1}"
        )
    is_label_TK = rows.topk_ids_TK == label_ids_T[:, None]
    inside_T = is_label_TK.any(axis=1)
    expected_T = np.where(inside_T, is_label_TK.argmax(axis=1) + 1, np.clip(rank_T, k + 1, vocab_size))
    for t in np.flatnonzero(rank_T != expected_T)[:1].tolist():
        where = f"its rank in the top-k is {expected_T[t]}" if inside_T[t] else f"it is outside the top-{k}"
        raise EngineError(
            f"teacher_invalid: token {t}: label {label_ids_T[t]} has rank {rank_T[t]}, but {where}: the row is another "
            "token's"
        )
    # What is outside is at most as probable as the last entry.
    at_T = np.where(inside_T, rank_T, k) - 1
    entry_T = np.take_along_axis(rows.topk_logprobs_TK, at_T[:, None], axis=1)[:, 0]
    apart_T = rows.label_logprob_T - entry_T
    for t in np.flatnonzero(np.where(inside_T, np.abs(apart_T), apart_T) > LABEL_TOLERANCE)[:1].tolist():
        entry = "its entry says" if inside_T[t] else "it is outside the top-k, whose last entry has"
        raise EngineError(
            f"teacher_invalid: token {t}: label {label_ids_T[t]} has logprob {rows.label_logprob_T[t]:.6f}, {entry} "
            f"{entry_T[t]:.6f}"
        )
