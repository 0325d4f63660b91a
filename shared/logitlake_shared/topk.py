"""The top-k codec: what an engine returns, what a shard holds, and what keeping less costs.

An engine captures `k_max` entries of every response token (`TeacherRows`, dense). The codec keeps, for each token,
the entries above `p_min` and at least `k_min` of them, snaps their logprobs to a grid of 256 levels and moves the
mass of what it drops into the tail (`StoredRows`, ragged). The tail mass, the label's logprob and its rank stay
exact. Parquet's own dictionary then holds the 256 levels as one-byte codes while every reader sees plain floats.

The grid spaces levels so that p·step² is constant (uniform in sqrt(p), the Hellinger metric), capped at 0.35 nats
for improbable tokens: probable tokens are held to a thousandth of a nat, improbable ones coarsely, and the KL spent
is spread evenly. What it costs is measured on every unit, not assumed (`stored_error`).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from logitlake_schemas import CodecPolicy, StoredError
from logitlake_shared.errors import EngineError

__all__ = ["StoredRows", "TeacherRows", "check_rows", "decode", "encode", "stored_error"]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

GRID_LEVELS = 256
GRID_STEP = 0.0105  # step at p = 1, in nats: 256 levels then reach below GRID_FLOOR
GRID_MAX_STEP = 0.35
# Total probability may exceed 1 by the rounding of k float32 exponentials and of a bf16 engine's logprobs.
MASS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TeacherRows:
    """What an engine knows of one sample's T response tokens, K entries each. All logprobs natural, at T=1."""

    topk_ids_TK: Int32
    topk_logprobs_TK: Float32
    """by falling probability"""
    label_logprob_T: Float32
    label_rank_T: Int32
    """1 = the teacher's first choice"""
    log_tail_mass_T: Float32
    """log probability outside the K entries; -inf where K is the vocabulary"""


@dataclass(frozen=True)
class StoredRows:
    """What a shard holds of one sample's T response tokens; token t has `k_T[t]` entries, one token after the other."""

    k_T: npt.NDArray[np.uint16]
    topk_ids: Int32
    topk_logprobs: Float32
    label_logprob_T: Float32
    label_rank_T: Int32
    log_tail_mass_T: Float32
    entropy_T: Float32


def check_rows(rows: TeacherRows, vocab_size: int) -> None:
    """Refuses what must never be written: non-finite or positive logprobs, bad order, repeated or foreign ids.

    Raises `EngineError` that begins with `teacher_nonfinite`, `teacher_invalid`.
    """
    ids_TK, logprobs_TK = rows.topk_ids_TK, rows.topk_logprobs_TK
    num_bad = int(
        (~np.isfinite(logprobs_TK)).sum()
        + (~np.isfinite(rows.label_logprob_T)).sum()
        + np.isnan(rows.log_tail_mass_T).sum()
    )
    if num_bad:
        raise EngineError(
            f"teacher_nonfinite: {num_bad} logprobs are NaN or infinite; check the teacher's weights and dtype"
        )
    if ids_TK.size and (int(ids_TK.min()) < 0 or int(ids_TK.max()) >= vocab_size):
        raise EngineError(
            f"teacher_invalid: token ids span {ids_TK.min()}..{ids_TK.max()}, expected 0..{vocab_size - 1}: the engine "
            "returned padded vocabulary slots"
        )
    if (np.diff(logprobs_TK, axis=1) > 0).any():
        raise EngineError("teacher_invalid: top-k logprobs are not in falling order")
    if (np.diff(np.sort(ids_TK, axis=1), axis=1) == 0).any():
        raise EngineError("teacher_invalid: a token id occurs twice in one top-k")
    mass_T = np.exp(logprobs_TK.astype(np.float64)).sum(1) + np.exp(rows.log_tail_mass_T.astype(np.float64))
    if mass_T.size and float(np.abs(mass_T - 1).max()) > MASS_TOLERANCE:
        worst = float(mass_T[np.abs(mass_T - 1).argmax()])
        raise EngineError(f"teacher_invalid: top-k and tail sum to {worst:.6f}, expected 1 within {MASS_TOLERANCE}")


def encode(rows: TeacherRows, policy: CodecPolicy) -> StoredRows:
    """Keeps what the policy keeps; the mass of dropped entries joins the tail. Entropy is that of the captured rows."""
    logprobs_TK = rows.topk_logprobs_TK
    num_tokens, k_captured = logprobs_TK.shape
    p_TK = np.exp(logprobs_TK.astype(np.float64))
    keep_TK = p_TK >= policy.p_min
    keep_TK[:, : policy.k_min] = True
    # Rank order makes the kept entries a prefix of each row.
    k_T = keep_TK.sum(1)
    tail_T = np.exp(rows.log_tail_mass_T.astype(np.float64))
    entropy_T = -(p_TK * logprobs_TK).sum(1) - _xlogx(tail_T)
    stored_tail_T = tail_T + np.where(keep_TK, 0.0, p_TK).sum(1)
    unchanged_T = k_T == k_captured  # keeps the engine's own log tail mass bit for bit
    with np.errstate(divide="ignore"):
        log_tail_T = np.where(unchanged_T, rows.log_tail_mass_T, np.log(stored_tail_T))
    kept = logprobs_TK[keep_TK]
    return StoredRows(
        k_T=k_T.astype(np.uint16),
        topk_ids=rows.topk_ids_TK[keep_TK].astype(np.int32),
        topk_logprobs=_snap(kept) if policy.grid == "companded256" else kept.astype(np.float32),
        label_logprob_T=rows.label_logprob_T.astype(np.float32),
        label_rank_T=rows.label_rank_T.astype(np.int32),
        log_tail_mass_T=log_tail_T.astype(np.float32),
        entropy_T=np.maximum(entropy_T, 0).astype(np.float32).reshape(num_tokens),
    )


def decode(rows: StoredRows) -> tuple[Int32, Float32, Float32]:
    """The distribution that a loss may use: `topk_ids_TK`, `topk_logprobs_TK`, `log_tail_mass_T`.

    K is the largest k of the rows; shorter rows are padded with id 0 at logprob -inf. The grid leaves head + tail a
    hair off 1; both are divided by their sum, so that a student equal to the stored teacher has loss and gradient 0.
    """
    k_T = rows.k_T.astype(np.int64)
    num_tokens, k = len(k_T), int(k_T.max(initial=0))
    kept_TK = np.arange(k) < k_T[:, None]
    ids_TK = np.zeros((num_tokens, k), np.int32)
    logprobs_TK = np.full((num_tokens, k), -np.inf, np.float64)
    ids_TK[kept_TK] = rows.topk_ids
    logprobs_TK[kept_TK] = rows.topk_logprobs
    log_tail_T = rows.log_tail_mass_T.astype(np.float64)
    log_sum_T = np.log(np.exp(logprobs_TK).sum(1) + np.exp(log_tail_T))
    return (
        ids_TK,
        (logprobs_TK - log_sum_T[:, None]).astype(np.float32),
        (log_tail_T - log_sum_T).astype(np.float32),
    )


def stored_kl(rows: TeacherRows, stored: StoredRows) -> npt.NDArray[np.float64]:
    """`kl_T`: KL(captured‖stored) of each token in nats, over the stored entries and the tail as one class.

    Merging dropped entries into the tail is not counted here: on those K+1 classes it is exact. What is counted is
    the grid. The mass that the stored entries cover is reported beside it.
    """
    _, logprobs_TK, log_tail_T = decode(stored)
    k = logprobs_TK.shape[1]
    exact_TK = np.where(np.isfinite(logprobs_TK), rows.topk_logprobs_TK[:, :k], -np.inf).astype(np.float64)
    p_TK = np.exp(exact_TK)
    tail_T = np.exp(stored.log_tail_mass_T.astype(np.float64))
    total_T = p_TK.sum(1) + tail_T
    with np.errstate(invalid="ignore"):
        head_T = np.where(p_TK > 0, p_TK * (exact_TK - logprobs_TK), 0.0).sum(1)
        rest_T = np.where(tail_T > 0, tail_T * (stored.log_tail_mass_T.astype(np.float64) - log_tail_T), 0.0)
    kl_T: npt.NDArray[np.float64] = np.maximum((head_T + rest_T) / total_T - np.log(total_T), 0.0)
    return kl_T


def stored_error(pairs: list[tuple[TeacherRows, StoredRows]]) -> StoredError:
    """What storing cost over all tokens of a unit."""
    kl = np.concatenate([stored_kl(rows, stored) for rows, stored in pairs])
    k = np.concatenate([stored.k_T for _, stored in pairs])
    tail = np.concatenate([np.exp(stored.log_tail_mass_T.astype(np.float64)) for _, stored in pairs])
    return StoredError(
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        mean_stored_mass=float(1 - tail.mean()),
        mean_k=float(k.mean()),
    )


def _xlogx(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = p * np.log(np.where(p > 0, p, 1.0))
    return result


@cache
def _grid() -> Float32:
    """The levels, ascending, from about -28 nats to 0."""
    levels, logprob = [], 0.0
    for _ in range(GRID_LEVELS):
        levels.append(logprob)
        logprob -= min(GRID_MAX_STEP, GRID_STEP * float(np.exp(-logprob / 2)))
    return np.array(levels[::-1], np.float32)


def _snap(logprobs: Float32) -> Float32:
    """The nearest level of each logprob; what lies below the lowest level is held at it."""
    grid = _grid()
    return grid[np.searchsorted((grid[1:] + grid[:-1]) / 2, logprobs)]
