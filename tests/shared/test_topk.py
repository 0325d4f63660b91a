"""Laws of the top-k codec."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitlake_schemas import CodecPolicy
from logitlake_shared.topk import (
    GRID_LEVELS,
    TeacherRows,
    _grid,
    _snap,
    concatenate,
    decode,
    encode,
    nearest_level,
    split,
    stored_error,
    stored_kl,
    tail_bound,
)

VOCAB_SIZE = 40
# float32 exponentials of at most 40 entries, summed.
SUM_TOLERANCE = 1e-5
# decode() rounds each logprob to float32 once more (6e-8 relative), which enters the KL at first order.
FLOAT32_KL = 1e-6
# The table of levels is found by ten mantissa bits: half of the last one.
TABLE_RESOLUTION = 2**-11
# The default budget of a spec, in nats: what the writer would refuse.
GRID_KL_BUDGET = 2e-4

Rows = Callable[..., TeacherRows]


@given(seed=st.integers(0, 2**32), k=st.integers(1, VOCAB_SIZE), p_min=st.sampled_from([0.0, 1e-3, 0.05]))
def test_decoded_rows_are_a_distribution(seed: int, k: int, p_min: float) -> None:
    """Head and tail sum to one, in rank order, whatever the policy keeps."""
    rows = _rows(seed, k)
    _, logprobs, log_tail = decode(encode(rows, CodecPolicy(k_max=k, k_min=1, p_min=p_min)))
    total = np.exp(logprobs.astype(np.float64)).sum(1) + np.exp(log_tail.astype(np.float64))
    assert np.abs(total - 1).max() < SUM_TOLERANCE
    finite = np.where(np.isfinite(logprobs), logprobs, -1e9)
    assert (np.diff(finite, axis=1) <= 0).all()


@given(seed=st.integers(0, 2**32))
def test_exact_profile_with_everything_kept_is_lossless(seed: int) -> None:
    """grid=exact, p_min=0: what comes back is what went in, and the measured error is zero."""
    rows = _rows(seed, 8)
    stored = encode(rows, CodecPolicy(k_max=8, k_min=1, p_min=0.0, grid="exact"))
    ids, logprobs, log_tail = decode(stored)
    assert (ids == rows.topk_ids_TK).all()
    np.testing.assert_allclose(logprobs, rows.topk_logprobs_TK, atol=SUM_TOLERANCE)
    np.testing.assert_allclose(log_tail, rows.log_tail_mass_T, atol=SUM_TOLERANCE)
    assert stored_error(rows, stored).kl_max < FLOAT32_KL


@given(seed=st.integers(0, 2**32))
def test_grid_stays_within_the_budget(seed: int) -> None:
    """The 256-level grid costs less than the default budget on any distribution, and never a negative KL."""
    rows = _rows(seed, 32)
    kl = stored_kl(rows, encode(rows, CodecPolicy(k_max=32, p_min=0.0)))
    assert (kl >= 0).all()
    assert kl.mean() < GRID_KL_BUDGET


def test_grid_has_256_levels_and_one_byte_codes_suffice() -> None:
    """Parquet's dictionary holds one-byte codes only up to 256 values."""
    assert len(np.unique(_grid())) == GRID_LEVELS == 256
    assert _grid()[-1] == 0


@given(logprob=st.floats(-40, 0, width=32))
def test_the_table_of_levels_is_the_search_for_the_nearest(logprob: float) -> None:
    """The fast twin finds the nearest level, or one that is as near but for the table's ten mantissa bits."""
    exact = np.array([logprob], np.float32)
    fast, slow = _snap(exact), nearest_level(exact)
    assert abs(fast - exact)[0] <= abs(slow - exact)[0] + abs(exact[0]) * TABLE_RESOLUTION


def test_a_unit_is_encoded_as_its_samples_are(teacher_rows: Rows) -> None:
    """Encoding all rows at once and cutting them apart is encoding each sample."""
    samples = [teacher_rows(n, 8, seed) for seed, n in enumerate((3, 1, 5))]
    policy = CodecPolicy(k_max=8, k_min=2, p_min=0.02)
    together = split(encode(concatenate(samples), policy), [3, 1, 5])
    for one, part in zip(samples, together, strict=True):
        for name, value in vars(encode(one, policy)).items():
            np.testing.assert_array_equal(getattr(part, name), value, err_msg=name)


@given(seed=st.integers(0, 2**32), p_min=st.sampled_from([0.0, 0.02]))
def test_stored_kl_is_that_of_the_decoded_rows(seed: int, p_min: float) -> None:
    """The cancelled form equals sum p log(p/q) on what `decode` returns, class by class in float64."""
    rows = _rows(seed, 12)
    stored = encode(rows, CodecPolicy(k_max=12, k_min=1, p_min=p_min))
    _, logprobs, log_tail = decode(stored)
    for t, k in enumerate(stored.k_T):
        head = np.exp(rows.topk_logprobs_TK[t].astype(np.float64))
        p = np.append(head[:k], np.exp(float(rows.log_tail_mass_T[t])) + head[k:].sum())
        log_q = np.append(logprobs[t, :k], log_tail[t]).astype(np.float64)
        assert stored_kl(rows, stored)[t] == pytest.approx(
            (p / p.sum() * (np.log(p / p.sum()) - log_q)).sum(), abs=FLOAT32_KL
        )


@given(
    seed=st.integers(0, 2**32),
    p_min=st.sampled_from([0.0, 1e-3, 0.02, 0.3]),
    k_min=st.integers(1, 12),
    grid=st.sampled_from(["exact", "companded256"]),
)
def test_nothing_that_is_not_stored_exceeds_the_bound(seed: int, p_min: float, k_min: int, grid: str) -> None:
    """The bound holds for every id outside the stored ones, in the engine's numbers and divided as `decode` does."""
    rows = _rows(seed, VOCAB_SIZE)
    policy = CodecPolicy.model_validate({"k_max": 12, "k_min": k_min, "p_min": p_min, "grid": grid})
    captured = replace(
        rows,
        topk_ids_TK=rows.topk_ids_TK[:, :12],
        topk_logprobs_TK=rows.topk_logprobs_TK[:, :12],
        log_tail_mass_T=np.log(np.exp(rows.topk_logprobs_TK[:, 12:].astype(np.float64)).sum(1)).astype(np.float32),
    )
    stored = encode(captured, policy)
    head = np.add.reduceat(np.exp(stored.topk_logprobs), np.cumsum(stored.k_T, dtype=np.int64) - stored.k_T)
    log_sum_T = np.log(head + np.exp(stored.log_tail_mass_T))
    for t, k in enumerate(stored.k_T):
        largest = rows.topk_logprobs_TK[t, k]
        assert max(largest, largest - log_sum_T[t]) <= tail_bound(stored, policy)[t]


def test_adaptive_k_by_hand() -> None:
    """p = .6 .3 .06 .03 | tail .01, floor .05, at least 1: three entries stay, .03 joins the tail: .04."""
    p = np.array([[0.6, 0.3, 0.06, 0.03]])
    rows = TeacherRows(
        topk_ids_TK=np.array([[3, 1, 4, 2]], np.int32),
        topk_logprobs_TK=np.log(p).astype(np.float32),
        label_logprob_T=np.log([0.3]).astype(np.float32),
        label_rank_T=np.array([2], np.int32),
        log_tail_mass_T=np.log([0.01]).astype(np.float32),
    )
    stored = encode(rows, CodecPolicy(k_max=4, k_min=1, p_min=0.05, grid="exact"))
    assert stored.k_T.tolist() == [3]
    assert stored.topk_ids.tolist() == [3, 1, 4]
    assert float(np.exp(stored.log_tail_mass_T[0])) == pytest.approx(0.04, rel=1e-5)
    # -(.6 ln .6 + .3 ln .3 + .06 ln .06 + .03 ln .03 + .01 ln .01) = 0.98773
    assert float(stored.entropy_T[0]) == pytest.approx(0.98773, abs=1e-4)


def test_a_full_vocabulary_has_no_tail(teacher_rows: Rows) -> None:
    """k = vocabulary: the tail is -inf going in and coming out."""
    rows = teacher_rows(3, VOCAB_SIZE, 0)
    stored = encode(rows, CodecPolicy(k_max=VOCAB_SIZE, k_min=1, p_min=0.0))
    assert np.isneginf(decode(stored)[2]).all()


def _rows(seed: int, k: int) -> TeacherRows:
    logits = np.random.default_rng(seed).normal(scale=3, size=(5, VOCAB_SIZE))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.exp(np.take_along_axis(logprobs, order[:, k:], 1)).sum(1))
    return TeacherRows(
        topk_ids_TK=order[:, :k].astype(np.int32),
        topk_logprobs_TK=np.take_along_axis(logprobs, order[:, :k], 1).astype(np.float32),
        label_logprob_T=logprobs[:, 0].astype(np.float32),
        label_rank_T=(order == 0).argmax(1).astype(np.int32) + 1,
        log_tail_mass_T=log_tail.astype(np.float32),
    )
