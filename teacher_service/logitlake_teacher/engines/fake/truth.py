"""The fake teacher's distribution: Zipf's law with surprises.

Tokens fall in probability by rank as words do: the logit of rank r + 1 lies `sharpness` / r below that of rank r, times
a draw from the standard exponential for the first ranks (so that one position is sure and another is not) and times its
mean, 1, for all others. Which token has which rank is an arithmetic progression through the vocabulary with a start and
a stride of the position's own. So the top-k, any token's rank, and the mass behind the top-k at any temperature take a
few operations a row whatever the vocabulary, exactly; and all of the vocabulary is there when it is asked for.

Where answers shall have a mean length, EOS stands outside the progression, with a probability of 1 / that length.

Axes: T tokens, M ranks with a surprise + 1, N tokens in the progression, K captured entries, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from logitlake_shared.topk import TeacherRows
from logitlake_teacher.engines.base import agree_label_ranks
from logitlake_teacher.engines.fake.prefixes import UInt64, hash64

__all__ = ["FakeTruth"]

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_NUM_SURPRISES = 12
_NUM_STRIDES = 64
# Numbers in which the hashes of one position differ: its surprises are 0, 1, ….
_START, _STRIDE = 1001, 1002


@dataclass(frozen=True)
class _Rows:
    """T positions: logits of the first ranks, and the progression through the vocabulary."""

    logits_TM: Float64
    start_T: Int64
    stride_T: Int64
    inverse_T: Int64
    """of the stride, modulo N"""
    eos_T: Float64
    """logit of an EOS that stands outside the progression; -inf if none does"""


class FakeTruth:
    """`sharpness` is the exponent of the falling probabilities: the token of rank r has about r^-sharpness."""

    def __init__(self, vocab_size: int, sharpness: float, eos_id: int, mean_response: int | None) -> None:
        self._vocab_size = vocab_size
        self._sharpness = sharpness
        self._eos_id = eos_id if mean_response is not None and vocab_size > 1 else None
        # p(EOS) = 1 / mean at every token: lengths are geometric with that mean.
        self._log_odds_against_eos = np.log(mean_response - 1) if mean_response is not None else np.inf
        self._num_tokens = vocab_size - (self._eos_id is not None)
        self._num_surprises = min(_NUM_SURPRISES, self._num_tokens - 1)
        candidates = range(1, self._num_tokens + 1)
        strides = [stride for stride in candidates if gcd(stride, self._num_tokens) == 1]
        chosen = strides[:: max(1, len(strides) // _NUM_STRIDES)]
        self._strides = np.array(chosen, np.int64)
        self._inverses = np.array([pow(stride, -1, self._num_tokens) for stride in chosen], np.int64)
        # How far each rank without a surprise lies below the last one that has a logit of its own.
        ranks = np.arange(self._num_surprises + 1, self._num_tokens)
        self._below = np.concatenate([[0.0], np.cumsum(sharpness / ranks)])
        self._log_rests: dict[float, Float64] = {}

    def rows(self, hash_T: UInt64, label_ids_T: Int64, k: int, temperatures: Sequence[float]) -> TeacherRows:
        """What an engine captures at these positions. Labels inside the vocabulary; K <= V."""
        rows = self._rows(hash_T)
        log_total_T = self._log_totals(rows, 1.0)
        logits_TK, ids_TK, is_eos_inside_T = self._top(rows, k)
        label_logit_T, label_rank_T = self._labels(rows, label_ids_T)
        tails = [self._log_tails(rows, k, is_eos_inside_T, temperature) for temperature in (1.0, *temperatures)]
        topk_ids_TK = ids_TK.astype(np.int32)
        return TeacherRows(
            topk_ids_TK=topk_ids_TK,
            topk_logprobs_TK=(logits_TK - log_total_T[:, None]).astype(np.float32),
            label_logprob_T=(label_logit_T - log_total_T).astype(np.float32),
            label_rank_T=agree_label_ranks(topk_ids_TK, label_ids_T.astype(np.int32), label_rank_T.astype(np.int32)),
            log_tail_mass_T=tails[0].astype(np.float32),
            log_tail_mass_TX=np.stack(tails[1:], axis=1).astype(np.float32) if temperatures else None,
        )

    def logits(self, hash_T: UInt64) -> Float64:
        """`logits_TV` of all tokens."""
        rows = self._rows(hash_T)
        logits_TV = np.empty((len(hash_T), self._vocab_size))
        ranks_TN = np.broadcast_to(np.arange(self._num_tokens), (len(hash_T), self._num_tokens))
        np.put_along_axis(logits_TV, self._ids(rows, ranks_TN), self._logits_at(rows, ranks_TN), axis=1)
        if self._eos_id is not None:
            logits_TV[:, self._eos_id] = rows.eos_T
        return logits_TV

    def _rows(self, hash_T: UInt64) -> _Rows:
        surprises = np.arange(self._num_surprises, dtype=np.uint64)
        bits_TM = hash64(hash_T[:, None] + hash64(surprises))
        # Uniform in (0, 1], so that its logarithm is finite.
        exponential_TM = -np.log(((bits_TM >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53)
        gaps_TM = exponential_TM * (self._sharpness / np.arange(1, self._num_surprises + 1))
        logits_TM = np.zeros((len(hash_T), self._num_surprises + 1))
        np.cumsum(-gaps_TM, axis=1, out=logits_TM[:, 1:])
        place_T = self._pick(hash_T, _STRIDE, len(self._strides))
        rows = _Rows(
            logits_TM,
            self._pick(hash_T, _START, self._num_tokens),
            self._strides[place_T],
            self._inverses[place_T],
            np.full(len(hash_T), -np.inf),
        )
        if self._eos_id is not None:
            rows.eos_T[:] = self._log_totals(rows, 1.0) - self._log_odds_against_eos
        return rows

    def _pick(self, hash_T: UInt64, name: int, num: int) -> Int64:
        """A whole number below `num` for each position."""
        return (hash64(hash_T + hash64(np.array([name], np.uint64))) % np.uint64(num)).astype(np.int64)

    def _top(self, rows: _Rows, k: int) -> tuple[Float64, Int64, NDArray[np.bool_]]:
        """Logits and ids of the K best, and whether an EOS outside the progression is among them."""
        num_ranks = min(k, self._num_tokens)
        ranks_TK = np.broadcast_to(np.arange(num_ranks), (len(rows.start_T), num_ranks))
        is_head = num_ranks <= rows.logits_TM.shape[1]
        logits_TK = rows.logits_TM[:, :num_ranks] if is_head else self._logits_at(rows, ranks_TK)
        ids_TK = self._ids(rows, ranks_TK)
        if self._eos_id is None:
            return logits_TK, ids_TK, np.zeros(len(ids_TK), np.bool_)
        column_T = self._ranks_above(rows, rows.eos_T)
        source_TK = np.arange(k) - (np.arange(k) > column_T[:, None])
        source_TK = np.minimum(source_TK, num_ranks - 1)
        is_eos_TK = np.arange(k) == column_T[:, None]
        return (
            np.where(is_eos_TK, rows.eos_T[:, None], np.take_along_axis(logits_TK, source_TK, axis=1)),
            np.where(is_eos_TK, self._eos_id, np.take_along_axis(ids_TK, source_TK, axis=1)),
            column_T < k,
        )

    def _labels(self, rows: _Rows, label_ids_T: Int64) -> tuple[Float64, Int64]:
        """Logit and rank (from 1) of each label."""
        if self._eos_id is None:
            place_T = label_ids_T
        else:
            place_T = np.minimum(label_ids_T - (label_ids_T > self._eos_id), self._num_tokens - 1)
        rank_T = (place_T - rows.start_T) * rows.inverse_T % self._num_tokens
        logit_T = self._logits_at(rows, rank_T[:, None])[:, 0]
        if self._eos_id is None:
            return logit_T, rank_T + 1
        is_eos_T = label_ids_T == self._eos_id
        return (
            np.where(is_eos_T, rows.eos_T, logit_T),
            np.where(is_eos_T, self._ranks_above(rows, rows.eos_T), rank_T + (rows.eos_T > logit_T)) + 1,
        )

    def _ids(self, rows: _Rows, ranks_TQ: Int64) -> Int64:
        """The tokens of these ranks, from 0."""
        ids_TQ: Int64 = (rows.start_T[:, None] + ranks_TQ * rows.stride_T[:, None]) % self._num_tokens
        return ids_TQ if self._eos_id is None else ids_TQ + (ids_TQ >= self._eos_id)

    def _logits_at(self, rows: _Rows, ranks_TQ: Int64) -> Float64:
        """The logits of these ranks, from 0."""
        last = self._num_surprises
        own_TQ: Float64 = np.take_along_axis(rows.logits_TM, np.minimum(ranks_TQ, last), axis=1)
        below_TQ: Float64 = self._below[np.maximum(ranks_TQ - last, 0)]
        return own_TQ - below_TQ

    def _ranks_above(self, rows: _Rows, logit_T: Float64) -> Int64:
        """How many tokens of the progression have a greater logit."""
        in_head_T: Int64 = (rows.logits_TM[:, :-1] > logit_T[:, None]).sum(axis=1)
        behind_T = np.searchsorted(self._below, rows.logits_TM[:, -1] - logit_T, side="left")
        return in_head_T + behind_T

    def _log_totals(self, rows: _Rows, temperature: float) -> Float64:
        """`logsumexp(logits / T)` of all tokens, the EOS outside included once it is known."""
        return np.logaddexp(self._log_behind(rows, 0, temperature), rows.eos_T / temperature)

    def _log_tails(self, rows: _Rows, k: int, is_eos_inside_T: NDArray[np.bool_], temperature: float) -> Float64:
        """The log mass of softmax(logits / T) outside the K best."""
        if self._eos_id is None:
            return self._log_behind(rows, k, temperature) - self._log_totals(rows, temperature)
        log_rest_T = np.where(
            is_eos_inside_T,
            self._log_behind(rows, k - 1, temperature),
            np.logaddexp(self._log_behind(rows, k, temperature), rows.eos_T / temperature),
        )
        return log_rest_T - self._log_totals(rows, temperature)

    def _log_behind(self, rows: _Rows, num_ranks: int, temperature: float) -> Float64:
        """`logsumexp(logits / T)` of the progression behind its first ranks; -inf where nothing is left."""
        log_rests = self._log_rests_at(temperature)
        last = self._num_surprises
        last_T: Float64 = rows.logits_TM[:, -1] / temperature
        if num_ranks > last:
            return last_T + float(log_rests[min(num_ranks, self._num_tokens) - last])
        # The greatest logit is 0, so that the head's exponentials neither overflow nor, all of them, vanish.
        head_TQ = rows.logits_TM[:, num_ranks:last] / temperature
        origin_T: Float64 = rows.logits_TM[:, num_ranks] / temperature
        behind_T = np.exp(head_TQ - origin_T[:, None]).sum(axis=1)
        behind_T += np.exp(last_T - origin_T + log_rests[0])
        log_behind_T: Float64 = origin_T + np.log(behind_T)
        return log_behind_T

    def _log_rests_at(self, temperature: float) -> Float64:
        """For each number of ranks without a surprise: `logsumexp(-below / T)` of those behind them."""
        if temperature not in self._log_rests:
            falling = np.logaddexp.accumulate(-self._below[::-1] / temperature)[::-1]
            self._log_rests[temperature] = np.append(falling, -np.inf)
        return self._log_rests[temperature]
