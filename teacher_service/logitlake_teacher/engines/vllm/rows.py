"""vLLM's answers as `TeacherRows`: flat lists of `prompt_logprobs` and `logprobs`, and the span hook's packed rows.

Pure functions of arrays; nothing here imports vllm. `PackedLayout` is the one agreement between the engine's process
and vLLM's workers: one float32 row a response token, integers carried by their bits, so that a sample's answer is one
array that no Python loop touches on its way.

Axes: T response tokens, K captured entries, X other temperatures.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitlake_shared.topk import TeacherRows
from logitlake_teacher.engines.base import agree_label_ranks

__all__ = ["LOG_TAIL_FLOOR", "PackedLayout", "rows_of_flat", "rows_of_packed"]

# One minus a sum of float32 probabilities is known to about 1e-7 (the spacing of float32 below 1 is 6e-8): a
# smaller remainder is rounding, and a softmax never is exactly zero, so the tail is held at this value.
LOG_TAIL_FLOOR = float(np.log(1e-7))


@dataclass(frozen=True)
class PackedLayout:
    """Columns of the span hook's float32 rows: label logprob, label rank (bits), tails, K logprobs, K ids (bits)."""

    k: int
    num_temperatures: int
    """temperatures beside 1"""

    LABEL_LOGPROB = 0
    LABEL_RANK = 1
    FIRST_TAIL = 2

    @property
    def tails(self) -> slice:
        """Log tail mass at T=1, then at each other temperature."""
        return slice(self.FIRST_TAIL, self.FIRST_TAIL + 1 + self.num_temperatures)

    @property
    def logprobs(self) -> slice:
        """The K best, by falling probability."""
        return slice(self.tails.stop, self.tails.stop + self.k)

    @property
    def ids(self) -> slice:
        """Their ids, as the bits of an int32."""
        return slice(self.logprobs.stop, self.width)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.FIRST_TAIL + 1 + self.num_temperatures + 2 * self.k


def rows_of_packed(packed_TW: NDArray[np.float32], layout: PackedLayout, label_ids_T: NDArray[np.int32]) -> TeacherRows:
    """The rows that the span hook packed; their tail is exact."""
    bits_TW = packed_TW.view(np.int32)
    topk_ids_TK = bits_TW[:, layout.ids].copy()
    tails_TX = packed_TW[:, layout.tails]
    return TeacherRows(
        topk_ids_TK=topk_ids_TK,
        topk_logprobs_TK=packed_TW[:, layout.logprobs].copy(),
        label_logprob_T=packed_TW[:, layout.LABEL_LOGPROB].copy(),
        label_rank_T=agree_label_ranks(topk_ids_TK, label_ids_T, bits_TW[:, layout.LABEL_RANK]),
        log_tail_mass_T=tails_TX[:, 0].copy(),
        log_tail_mass_TX=tails_TX[:, 1:].copy() if layout.num_temperatures else None,
    )


def rows_of_flat(
    flat: Any,
    k: int,
    vocab_size: int,
    label_ids_T: NDArray[np.int32],
    positions_T: NDArray[np.int64] | None = None,
) -> TeacherRows:
    """`positions_T` (rising; None: all) of vLLM's flat lists, k + 1 entries a position: the actual token, then ranks
    1 to k.

    The tail is one minus the head: see `LOG_TAIL_FLOOR`.
    """
    if positions_T is None:
        positions_T = np.arange(len(flat.ranks) // (k + 1))
    first, stop = (positions_T[0], positions_T[-1] + 1) if len(positions_T) else (0, 0)
    entries, rows_T = slice(first * (k + 1), stop * (k + 1)), positions_T - first
    # Lists become arrays entry by entry, so only what is wanted of them does: of the ranks, one a position.
    ids = np.asarray(flat.token_ids[entries], np.int32).reshape(-1, k + 1)[rows_T]
    logprobs = np.asarray(flat.logprobs[entries], np.float32).reshape(-1, k + 1)[rows_T]
    ranks_T = np.asarray(flat.ranks[entries.start : entries.stop : k + 1], np.int32)[rows_T]
    topk_ids_TK, topk_logprobs_TK = ids[:, 1:], logprobs[:, 1:]
    return TeacherRows(
        topk_ids_TK=topk_ids_TK,
        topk_logprobs_TK=topk_logprobs_TK,
        label_logprob_T=logprobs[:, 0],
        label_rank_T=agree_label_ranks(topk_ids_TK, label_ids_T, ranks_T),
        log_tail_mass_T=_log_tail(topk_logprobs_TK, vocab_size),
    )


def _log_tail(topk_logprobs_TK: NDArray[np.float32], vocab_size: int) -> NDArray[np.float32]:
    """`log_tail_mass_T` from the head: log(1 - sum p), held at `LOG_TAIL_FLOOR`; -inf where K is the vocabulary."""
    num_tokens, k = topk_logprobs_TK.shape
    if k >= vocab_size:
        return np.full(num_tokens, -np.inf, dtype=np.float32)
    head_T = np.exp(topk_logprobs_TK.astype(np.float64)).sum(axis=1)
    floor = np.exp(LOG_TAIL_FLOOR)
    log_tail_T: NDArray[np.float32] = np.log(np.maximum(1.0 - head_T, floor)).astype(np.float32)
    return log_tail_T
