"""The top-k codec: what an engine returns, what a shard holds, and what keeping less costs.

An engine captures `k_max` entries of every response token (`TeacherRows`, dense). The codec keeps, for each token,
the entries above `p_min` and at least `k_min` of them, snaps their logprobs to a grid of 256 levels and moves the
mass of what it drops into the tail (`StoredRows`, ragged). The log tail mass, the label's logprob and the entropy keep
a float16's ten mantissa bits; `grid = "exact"` rounds nothing. Parquet's own dictionary then holds the 256 levels as
one-byte codes while every reader sees plain floats.

The grid spaces levels so that p·step² is constant (uniform in sqrt(p), the Hellinger metric), capped at 0.35 nats
for improbable tokens: probable tokens are held to a thousandth of a nat, improbable ones coarsely, and the KL spent
is spread evenly. What it costs is measured on every unit, not assumed (`stored_error`).

Everything is at T = 1. Where the tail mass at another temperature was captured, too, `decode` gives the distribution
at that temperature (`tempered` says how).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from logitlake_schemas import Codec, CodecPolicy, SampledPolicy, StoredError, Temperature
from logitlake_shared.errors import LakeError
from logitlake_shared.tempered import log_normaliser, merged_tail, tempered_head

__all__ = [
    "DrawnRows",
    "StoredRows",
    "TeacherRows",
    "concatenate",
    "decode",
    "encode",
    "join",
    "nearest_level",
    "own_figures",
    "rounded",
    "split",
    "stored_error",
    "stored_kl",
    "tail_bound",
]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Rows = TypeVar("Rows", "TeacherRows", "DrawnRows")

GRID_LEVELS = 256
GRID_STEP = 0.0105  # step at p = 1, in nats: 256 levels then reach below GRID_FLOOR
GRID_MAX_STEP = 0.35
# A float32 has 23 mantissa bits; ten of them name a grid level, and are what is kept of a token's own figures.
_DROPPED_BITS = 13
# The grid moves the sum of head and tail, by which `decode` divides, by less than a hundredth.
_BOUND_SLACK = np.float32(0.01)
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
    log_tail_mass_TX: Float32 | None = None
    """the same at each of the X other temperatures that were asked for: of softmax(logits / temperature)"""


@dataclass(frozen=True)
class DrawnRows:
    """What an engine that was asked for draws tells of one sample's T response tokens: N ids each, with replacement."""

    drawn_ids_TN: Int32
    """drawn from the full distribution at T=1, in any order"""
    label_logprob_T: Float32
    label_rank_T: Int32
    entropy_T: Float32
    """of the full distribution, in nats"""


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
    log_tails_T: Mapping[Temperature, Float32] = field(default_factory=dict)
    """log tail mass of softmax(logits / temperature) at each other temperature that was captured"""


def encode(rows: TeacherRows, policy: CodecPolicy) -> StoredRows:
    """Keeps what the policy keeps; the mass of dropped entries joins the tail. Entropy is that of the captured rows.

    Give it all rows of a unit at once (`concatenate`, then `split`): it is made for a hundred thousand of them. Rows
    for a policy with temperatures hold the tails at these, checked by `teacher_checks.check_rows`.
    """
    logprobs_TK = rows.topk_logprobs_TK.astype(np.float32, copy=False)
    p_TK = np.exp(logprobs_TK)
    tail_T = np.exp(rows.log_tail_mass_T.astype(np.float64))
    entropy_T = -np.einsum("tk,tk->t", p_TK, logprobs_TK, dtype=np.float64) - _xlogx(tail_T)
    keep_TK = p_TK >= policy.p_min
    keep_TK[:, : policy.k_min] = True
    # Rank order makes the kept entries a prefix of each row.
    k_T = keep_TK.sum(1)
    log_tail_T = rows.log_tail_mass_T.astype(np.float32)
    changed_T = k_T < logprobs_TK.shape[1]  # the others keep the engine's own log tail mass bit for bit
    dropped_T = np.where(keep_TK[changed_T], 0, p_TK[changed_T]).sum(1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        log_tail_T[changed_T] = np.log(tail_T[changed_T] + dropped_T)
    log_tails_T = {}
    for x, temperature in enumerate(policy.temperatures):
        assert rows.log_tail_mass_TX is not None
        log_tails_T[temperature] = rows.log_tail_mass_TX[:, x].astype(np.float32)
        log_tails_T[temperature][changed_T] = merged_tail(
            logprobs_TK[changed_T], keep_TK[changed_T], log_tails_T[temperature][changed_T], temperature
        )
    kept = logprobs_TK[keep_TK]
    return StoredRows(
        k_T=k_T.astype(np.uint16),
        topk_ids=rows.topk_ids_TK[keep_TK].astype(np.int32, copy=False),
        topk_logprobs=_snap(kept) if policy.grid == "companded256" else kept,
        label_logprob_T=own_figures(rows.label_logprob_T, policy),
        label_rank_T=rows.label_rank_T.astype(np.int32),
        log_tail_mass_T=own_figures(log_tail_T, policy),
        entropy_T=own_figures(np.maximum(entropy_T, 0), policy),
        log_tails_T={temperature: own_figures(tail_T, policy) for temperature, tail_T in log_tails_T.items()},
    )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of several samples as one, in order. All have the same K (or number of draws)."""
    kind = type(parts[0])
    columns: dict[str, list[Any]] = {
        column.name: [getattr(part, column.name) for part in parts] for column in fields(kind)
    }
    joined: dict[str, Any] = {
        name: None if values[0] is None else np.concatenate(values) for name, values in columns.items()
    }
    return kind(**joined)


def split(rows: StoredRows, lengths: Sequence[int]) -> list[StoredRows]:
    """The rows of each sample, `lengths` tokens each: views, no copies."""
    stops_T = np.concatenate([[0], np.cumsum(rows.k_T, dtype=np.int64)])
    tokens = np.cumsum([0, *lengths])
    entries = stops_T[tokens]
    return [
        StoredRows(
            k_T=rows.k_T[start:stop],
            topk_ids=rows.topk_ids[first:last],
            topk_logprobs=rows.topk_logprobs[first:last],
            label_logprob_T=rows.label_logprob_T[start:stop],
            label_rank_T=rows.label_rank_T[start:stop],
            log_tail_mass_T=rows.log_tail_mass_T[start:stop],
            entropy_T=rows.entropy_T[start:stop],
            log_tails_T={temperature: tails_T[start:stop] for temperature, tails_T in rows.log_tails_T.items()},
        )
        for (start, stop), (first, last) in zip(pairwise(tokens), pairwise(entries), strict=True)
    ]


def join(parts: Sequence[StoredRows]) -> StoredRows:
    """The inverse of `split`, with the tails at the temperatures that all parts have."""
    temperatures = [one for one in parts[0].log_tails_T if all(one in part.log_tails_T for part in parts)]
    return StoredRows(
        k_T=np.concatenate([part.k_T for part in parts]),
        topk_ids=np.concatenate([part.topk_ids for part in parts]),
        topk_logprobs=np.concatenate([part.topk_logprobs for part in parts]),
        label_logprob_T=np.concatenate([part.label_logprob_T for part in parts]),
        label_rank_T=np.concatenate([part.label_rank_T for part in parts]),
        log_tail_mass_T=np.concatenate([part.log_tail_mass_T for part in parts]),
        entropy_T=np.concatenate([part.entropy_T for part in parts]),
        log_tails_T={one: np.concatenate([part.log_tails_T[one] for part in parts]) for one in temperatures},
    )


def decode(
    rows: StoredRows | Sequence[StoredRows], temperature: Literal[1] | Temperature = 1
) -> tuple[Int32, Float32, Float32]:
    """The distribution that a loss may use: `topk_ids_TK`, `topk_logprobs_TK`, `log_tail_mass_T`.

    Of one sample, or of several at once, one after the other. K is the largest k of the rows; shorter rows are padded
    with id 0 at logprob -inf. The grid leaves head + tail a hair off 1; both are divided by their sum, so that a
    student equal to the stored teacher has loss and gradient 0. The arrays are new and may be written to.

    At a `temperature` beside 1 it is softmax(logits / temperature), normalised over the vocabulary too: exact to the
    rounding of the stored values. Raises `LakeError` where the rows hold no tail mass at it.
    """
    parts = [rows] if isinstance(rows, StoredRows) else rows
    k_T = np.concatenate([part.k_T for part in parts])
    ids = np.concatenate([part.topk_ids for part in parts])
    logprobs = np.concatenate([part.topk_logprobs for part in parts])
    log_tail_T = np.concatenate([_log_tail_at(part, temperature) for part in parts])
    num_tokens, k = len(k_T), int(k_T.max(initial=0))
    if len(ids) == num_tokens * k:
        ids_TK, logprobs_TK = ids.reshape(num_tokens, k), logprobs.reshape(num_tokens, k)
    else:
        kept_TK = np.arange(k, dtype=k_T.dtype) < k_T[:, None]
        ids_TK = np.zeros((num_tokens, k), np.int32)
        logprobs_TK = np.full((num_tokens, k), -np.inf, np.float32)
        ids_TK[kept_TK] = ids
        logprobs_TK[kept_TK] = logprobs
    if temperature != 1:
        return ids_TK, tempered_head(logprobs_TK, log_tail_T, temperature), log_tail_T
    # All of it in float32: the exponentials are right to 2e-7 and so is their sum, which is about 1. einsum sums short
    # rows several times faster than `sum`. The shift is then right to 1e-6 (tests/shared/test_reader_decode.py).
    log_sum_T = np.log(np.einsum("tk->t", np.exp(logprobs_TK)) + np.exp(log_tail_T))
    logprobs_TK -= log_sum_T[:, None]
    return ids_TK, logprobs_TK, log_tail_T - log_sum_T


def _log_tail_at(rows: StoredRows, temperature: Literal[1] | Temperature) -> Float32:
    if temperature == 1:
        return rows.log_tail_mass_T
    if temperature not in rows.log_tails_T:
        known = ", ".join(map(str, (1, *rows.log_tails_T)))
        raise LakeError(
            f"these rows hold no tail mass at temperature {temperature}, only at {known}, and it cannot be told from "
            f"them; capture with codec.temperatures=[{temperature}]"
        )
    return rows.log_tails_T[temperature]


def tail_bound(rows: StoredRows, codec: Codec, temperature: Literal[1] | Temperature = 1) -> Float32:
    """`log_bound_T`: no entry outside the stored ones has a greater logprob in the teacher at the temperature.

    Entries are stored in rank order, so what is not stored is at most as probable as the least stored entry, and
    below the codec's floor where fewer than `k_max` are stored. The bound is loose by the rounding of the stored
    values (an upper cell edge of the grid, and what `decode` divides by). Draws bound nothing: 0. Raises `LakeError`
    where the rows hold no tail mass at the temperature.
    """
    if isinstance(codec, SampledPolicy):
        return np.zeros(len(rows.k_T), np.float32)
    ends_T = np.cumsum(rows.k_T, dtype=np.int64)
    least_T = rows.topk_logprobs[ends_T - 1]
    if codec.grid == "companded256":
        least_T = _upper_edges()[np.searchsorted(_grid(), least_T)]
    floor = np.float32(np.log(codec.p_min)) if codec.p_min else np.float32(0)
    bound_T = np.where(rows.k_T < codec.k_max, np.minimum(least_T, floor), least_T)
    if temperature != 1:
        # What is more probable at 1 is more probable at any temperature.
        shift_T = log_normaliser(rows.topk_logprobs, ends_T - rows.k_T, _log_tail_at(rows, temperature), temperature)
        bound_T = bound_T / temperature + shift_T
    return np.minimum(bound_T + _BOUND_SLACK, 0).astype(np.float32)


def stored_kl(rows: TeacherRows, stored: StoredRows) -> npt.NDArray[np.float64]:
    """`kl_T`: KL(captured‖stored) of each token in nats, over the stored entries and the tail as one class.

    Merging dropped entries into the tail is not counted here: on those K+1 classes it is exact. What is counted is
    the rounding of logprobs and tail. The mass that the stored entries cover is reported beside it.

    With p the captured classes, s the stored ones and Z their sum (`decode` divides by it), the KL is
    sum p log(p/s) + log Z - log sum p. The last two nearly cancel and are taken together by log1p.
    """
    k_T = stored.k_T.astype(np.int64)
    starts_T = np.cumsum(k_T) - k_T
    kept_TK = np.arange(rows.topk_logprobs_TK.shape[1]) < k_T[:, None]
    exact = rows.topk_logprobs_TK[kept_TK]
    p, moved = np.exp(exact), stored.topk_logprobs - exact
    tail_T = np.exp(rows.log_tail_mass_T.astype(np.float64))
    tail_T += np.where(kept_TK, 0, np.exp(rows.topk_logprobs_TK)).sum(1, dtype=np.float64)
    stored_tail_T = np.exp(stored.log_tail_mass_T.astype(np.float64))
    total_T = _sums(p, starts_T) + tail_T
    with np.errstate(divide="ignore", invalid="ignore"):
        tail_kl_T = np.where(tail_T > 0, tail_T * np.log(tail_T / stored_tail_T), 0.0)
    head_kl_T = -_sums(p * moved, starts_T)
    growth_T = _sums(np.exp(stored.topk_logprobs) - p, starts_T) + stored_tail_T - tail_T
    kl_T: npt.NDArray[np.float64] = np.maximum((head_kl_T + tail_kl_T) / total_T + np.log1p(growth_T / total_T), 0.0)
    return kl_T


def stored_error(rows: TeacherRows, stored: StoredRows) -> StoredError:
    """What storing cost over all tokens of a unit."""
    kl_T = stored_kl(rows, stored)
    return StoredError(
        kl_mean=float(kl_T.mean()),
        kl_max=float(kl_T.max()),
        mean_stored_mass=float(1 - np.exp(stored.log_tail_mass_T.astype(np.float64)).mean()),
        mean_k=float(stored.k_T.mean()),
    )


def _sums(values: Float32, starts_T: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The sum of each token's entries; every token has at least one."""
    sums_T: npt.NDArray[np.float64] = np.add.reduceat(values, starts_T, dtype=np.float64)
    return sums_T


def _xlogx(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = p * np.log(np.where(p > 0, p, 1.0))
    return result


def rounded(values: npt.NDArray[np.floating[Any]]) -> Float32:
    """A token's own figures to the ten mantissa bits of a float16, as float32: half the bytes, enough for SQL."""
    exact = np.ascontiguousarray(values, np.float32)
    half = np.uint32(1 << (_DROPPED_BITS - 1))
    mask = np.uint32(0xFFFFFFFF << _DROPPED_BITS & 0xFFFFFFFF)
    return np.where(np.isfinite(exact), ((exact.view(np.uint32) + half) & mask).view(np.float32), exact)  # keeps -inf


def own_figures(values: npt.NDArray[np.floating[Any]], codec: Codec) -> Float32:
    """A token's own figures as a shard with this codec holds them: `rounded`, unless its grid is `exact`."""
    if isinstance(codec, CodecPolicy) and codec.grid == "exact":
        return np.ascontiguousarray(values, np.float32)
    return rounded(values)


@cache
def _grid() -> Float32:
    """The levels, ascending, from about -28 nats to 0."""
    levels, logprob = [], 0.0
    for _ in range(GRID_LEVELS):
        levels.append(logprob)
        logprob -= min(GRID_MAX_STEP, GRID_STEP * float(np.exp(-logprob / 2)))
    return np.array(levels[::-1], np.float32)


@cache
def _upper_edges() -> Float32:
    """The greatest logprob that is snapped to each level."""
    grid = _grid()
    return np.append((grid[1:] + grid[:-1]) / 2, np.float32(0)).astype(np.float32)


def nearest_level(logprobs: Float32) -> Float32:
    """The nearest level of each logprob, by search; what lies below the lowest level is held at it."""
    grid = _grid()
    return grid[np.searchsorted((grid[1:] + grid[:-1]) / 2, logprobs)]


@cache
def _snap_table() -> Float32:
    """The nearest level of every float that is at most 0, by its leading bits."""
    leading = np.arange(1 << (31 - _DROPPED_BITS), dtype=np.uint32)
    # The middle of the floats that share these bits. The sign is left out: every logprob has the same.
    magnitudes = ((leading << _DROPPED_BITS) | (1 << (_DROPPED_BITS - 1))).view(np.float32)
    return nearest_level(-np.where(np.isfinite(magnitudes), magnitudes, np.float32(np.inf)))


def _snap(logprobs: Float32) -> Float32:
    """`nearest_level` by table, several times faster.

    Ten mantissa bits find the level: a logprob within 0.05 % of the middle between two levels may go to either.
    """
    bits = np.ascontiguousarray(logprobs).view(np.uint32) & np.uint32(0x7FFFFFFF)
    nearest: Float32 = _snap_table()[bits >> _DROPPED_BITS]
    return nearest
