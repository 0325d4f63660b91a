"""Distributions at another temperature T, from what is known of them at T = 1 and one number more.

A logprob at T = 1 is a logit up to a constant of its row, so p_T(v) = exp(lp(v) / T) / Z with one unknown Z for the
whole row. The log tail mass at T tells it, for head and tail sum to one:

    sum over the head of exp(lp / T) / Z  =  1 - tail_T

So no entry needs to be stored twice, and entries may be moved from the head into the tail afterwards (`merged_tail`)
without asking the teacher again. 1 - tail_T is taken by expm1: it keeps its digits where the tail is nearly everything,
as it is at T = 4 over a large vocabulary, and the log of the tail keeps them where it is nearly nothing.

Axes: T tokens, K entries.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["log_head_mass", "log_normaliser", "merged_tail", "tempered_head"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def log_head_mass(log_tail_T: npt.NDArray[np.floating[Any]]) -> Float64:
    """log(1 - exp(log_tail)), float64; 0 for no tail (-inf)."""
    with np.errstate(divide="ignore"):
        log_head_T: Float64 = np.log(-np.expm1(log_tail_T.astype(np.float64)))
    return log_head_T


def merged_tail(
    logprobs_TK: Float32, keeps_TK: npt.NDArray[np.bool_], log_tail_T: Float32, temperature: float
) -> Float32:
    """The log tail mass at `temperature` once the entries that are not kept are part of the tail.

    `logprobs_TK` are those at T = 1, `log_tail_T` is what lies outside all K of them at `temperature`, below 0.
    """
    weights_TK = np.exp(logprobs_TK.astype(np.float64) / temperature)
    sum_T = weights_TK.sum(1)
    head_T = np.exp(log_head_mass(log_tail_T))
    kept_T = head_T * (np.where(keeps_TK, weights_TK, 0).sum(1) / sum_T)
    dropped_T = head_T * (np.where(keeps_TK, 0, weights_TK).sum(1) / sum_T)
    with np.errstate(divide="ignore"):
        small_T = np.log(np.exp(log_tail_T.astype(np.float64)) + dropped_T)
        merged_T = np.where(kept_T < 0.5, np.log1p(-np.minimum(kept_T, 0.5)), small_T)
    return merged_T.astype(np.float32)


def tempered_head(logprobs_TK: Float32, log_tail_T: Float32, temperature: float) -> Float32:
    """The entries' logprobs at `temperature`, from those at T = 1 and the log tail mass at `temperature`.

    Head and tail sum to one. Padding (-inf) stays padding. All in float32, as `topk.decode`.
    """
    scaled_TK = logprobs_TK / np.float32(temperature)
    log_sum_T = np.log(np.einsum("tk->t", np.exp(scaled_TK)))
    scaled_TK += (log_head_mass(log_tail_T) - log_sum_T).astype(np.float32)[:, None]
    return scaled_TK


def log_normaliser(
    logprobs: Float32, starts_T: npt.NDArray[np.int64], log_tail_T: Float32, temperature: float
) -> Float32:
    """`-log Z` of each token: what `logprob / temperature` is moved by at the temperature, in or out of the head.

    `logprobs` are the entries' at T = 1, one token after the other, each token's from `starts_T` on; `log_tail_T` is
    the tail at `temperature`.
    """
    sum_T = np.add.reduceat(np.exp(logprobs / np.float32(temperature)), starts_T, dtype=np.float64)
    shift_T: Float32 = (log_head_mass(log_tail_T) - np.log(sum_T)).astype(np.float32)
    return shift_T
