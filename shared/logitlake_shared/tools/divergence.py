"""The divergence of two truncated distributions.

Two rows of stored entries are comparable only where both are known. So each token's classes are the ids that both
rows store, and one bucket for everything else. The divergence over these classes is exact for them, never negative,
zero for equal rows, and by the data-processing inequality a lower bound of the divergence over the whole vocabulary.
Nothing is assumed about how the mass in the bucket is spread.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitlake_shared.topk import StoredRows

__all__ = ["RowDivergence", "first_ids", "row_divergence"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowDivergence:
    """`kl_T` in nats, and what of A's mass lies on the ids that both rows store."""

    kl_T: Float64
    shared_mass_T: Float64


def row_divergence(a: StoredRows, b: StoredRows) -> RowDivergence:
    """KL(A‖B) of each of T tokens over the ids that both store and one bucket for the rest.

    Head and tail are divided by their sum first: the grid leaves them a hair off 1. Infinite where A has mass in the
    bucket and B has none.
    """
    token_a, token_b = _token_of(a), _token_of(b)
    p, q = _probabilities(a, token_a), _probabilities(b, token_b)
    # A token's number above, an id's below: equal keys are the same id of the same token.
    shared, in_a, in_b = np.intersect1d(
        token_a << 32 | a.topk_ids.astype(np.int64),
        token_b << 32 | b.topk_ids.astype(np.int64),
        assume_unique=True,
        return_indices=True,
    )
    token, num_tokens = shared >> 32, len(a.k_T)
    p_shared, q_shared = p[in_a], q[in_b]
    mass_T = np.bincount(token, p_shared, num_tokens).astype(np.float64)
    # Of nothing, bincount makes integers.
    kl_T = np.bincount(token, p_shared * np.log(p_shared / q_shared), num_tokens).astype(np.float64)
    # The bucket is what is dropped plus the ids that the other row does not store, added up rather than 1 - mass:
    # a tail of 1e-9 would drown in the rounding of 1.
    rest_a = _rest(a, token_a, p, in_a)
    rest_b = _rest(b, token_b, q, in_b)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl_T += np.where(rest_a > 0, rest_a * np.log(rest_a / rest_b), 0.0)
    # Rounding leaves a negative hair where the rows are equal.
    return RowDivergence(np.maximum(kl_T, 0.0), mass_T)


def _token_of(rows: StoredRows) -> npt.NDArray[np.int64]:
    """The token of each stored entry."""
    return np.repeat(np.arange(len(rows.k_T), dtype=np.int64), rows.k_T)


def _probabilities(rows: StoredRows, token: npt.NDArray[np.int64]) -> Float64:
    """The probability of each stored entry, head and tail of its token summing to 1."""
    p = np.exp(rows.topk_logprobs.astype(np.float64))
    normalised: Float64 = p / _sums(rows, token, p)[token]
    return normalised


def _sums(rows: StoredRows, token: npt.NDArray[np.int64], p: Float64) -> Float64:
    sums: Float64 = np.bincount(token, p, len(rows.k_T)) + np.exp(rows.log_tail_mass_T.astype(np.float64))
    return sums


def _rest(rows: StoredRows, token: npt.NDArray[np.int64], p: Float64, shared: npt.NDArray[np.int64]) -> Float64:
    """The tail and the entries that the other cache does not store, as normalised mass of each token."""
    raw_tail = np.exp(rows.log_tail_mass_T.astype(np.float64))
    tail = raw_tail / _sums(rows, token, np.exp(rows.topk_logprobs.astype(np.float64)))
    alone = np.ones(len(p), bool)
    alone[shared] = False
    return np.asarray(np.bincount(token[alone], p[alone], len(rows.k_T)) + tail)


def first_ids(rows: StoredRows) -> npt.NDArray[np.int32]:
    """The first choice of each token."""
    starts = np.cumsum(rows.k_T.astype(np.int64)) - rows.k_T
    first: npt.NDArray[np.int32] = rows.topk_ids[starts]
    return first
