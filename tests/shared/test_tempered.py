"""Temperatures beside 1: what is stored at T = 1 and one tail mass at T give the distribution at T.

The truth is a dense softmax(logits / T) in float64; rows are captured from it as an engine captures them.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitlake_schemas import CodecPolicy, Temperature
from logitlake_shared.errors import LakeError
from logitlake_shared.teacher_checks import check_rows
from logitlake_shared.tempered import log_head_mass
from logitlake_shared.topk import GRID_MAX_STEP, TeacherRows, concatenate, decode, encode, join, split, tail_bound

VOCAB_SIZE = 60
TEMPERATURES: tuple[Temperature, ...] = (2, 4)
# Captured logprobs and tails are float32 (6e-8 of their size), summed over a row, exponentiated and divided.
EXACT = 1e-5
# The grid moves a logprob by at most half of 0.35 nats where it is improbable, and T divides that: the KL is about
# (step / T)² / 24 on the entries' share. Ten mantissa bits of the tail add less.
GRID_KL_BUDGET = 1e-3

Float64 = npt.NDArray[np.float64]
At = Literal[1] | Temperature


@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.01, 1.0, 3.0, 30.0]),
    k_max=st.sampled_from([1, 12, VOCAB_SIZE]),
    p_min=st.sampled_from([0.0, 1e-3, 0.1]),
    temperature=st.sampled_from([1, 2, 4]),
)
def test_decoded_rows_are_the_dense_truth(seed: int, scale: float, k_max: int, p_min: float, temperature: At) -> None:
    """With the exact grid, head and tail are those of softmax(logits / T), whatever was dropped into the tail.

    From flat rows, whose tail is nearly everything, to sharp ones, whose tail is nearly nothing.
    """
    logits_TV = _logits(seed, scale)
    policy = CodecPolicy(k_max=k_max, k_min=1, p_min=p_min, grid="exact", temperatures=TEMPERATURES)
    ids_TK, logprobs_TK, log_tail_T = decode(encode(_captured(logits_TV, k_max), policy), temperature)
    truth_TV = _log_softmax(logits_TV / temperature)
    there_TK = np.isfinite(logprobs_TK)
    expected_TK = np.take_along_axis(truth_TV, ids_TK.astype(np.int64), axis=1)
    np.testing.assert_allclose(logprobs_TK[there_TK], expected_TK[there_TK], rtol=EXACT, atol=EXACT)
    kept_TV = np.zeros(truth_TV.shape, np.bool_)
    np.put_along_axis(kept_TV, ids_TK.astype(np.int64), there_TK, axis=1)
    # Padding has id 0, which may be an entry, too.
    zero_T = (there_TK & (ids_TK == 0)).any(axis=1)
    kept_TV[:, 0] = zero_T
    with np.errstate(divide="ignore"):
        tail_T = np.log(np.where(kept_TV, 0, np.exp(truth_TV)).sum(1))
    np.testing.assert_allclose(np.exp(log_tail_T), np.exp(tail_T), atol=EXACT)
    large_T = tail_T > np.log(EXACT)
    np.testing.assert_allclose(log_tail_T[large_T], tail_T[large_T], rtol=1e-4, atol=EXACT)


@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1.0, 3.0, 30.0]),
    p_min=st.sampled_from([0.0, 1e-3, 0.1]),
    grid=st.sampled_from(["exact", "companded256"]),
    temperature=st.sampled_from([1, 2, 4]),
)
def test_nothing_outside_exceeds_the_bound(seed: int, scale: float, p_min: float, grid: str, temperature: At) -> None:
    """No id that is not stored has a greater logprob at the temperature, and the bound says something."""
    logits_TV = _logits(seed, scale)
    policy = CodecPolicy.model_validate(
        {"k_max": 12, "k_min": 1, "p_min": p_min, "grid": grid, "temperatures": TEMPERATURES, "max_mean_kl": 1.0}
    )
    stored = encode(_captured(logits_TV, 12), policy)
    truth_TV = _log_softmax(logits_TV / temperature)
    bound_T = tail_bound(stored, policy, temperature)
    ends_T = np.cumsum(stored.k_T, dtype=np.int64)
    for t, (end, k) in enumerate(zip(ends_T, stored.k_T, strict=True)):
        outside = np.delete(truth_TV[t], stored.topk_ids[end - k : end])
        assert outside.max() <= bound_T[t]
    _, logprobs_TK, _ = decode(stored, temperature)
    # Nor is it far above the most probable entry: three cells of the grid, and what rounding moves all by.
    assert (bound_T <= logprobs_TK[:, 0] + 3 * GRID_MAX_STEP).all()


@given(
    seed=st.integers(0, 2**32),
    p_min=st.sampled_from([0.0, 2e-3, 0.02]),
    scale=st.sampled_from([0.5, 3.0]),
    temperature=st.sampled_from([1, 2, 4]),
)
def test_the_grid_costs_little_at_every_temperature(seed: int, p_min: float, scale: float, temperature: At) -> None:
    """KL(truth at T‖decoded at T) over the entries and the tail stays within the budget; head and tail sum to one."""
    logits_TV = _logits(seed, scale)
    policy = CodecPolicy(k_max=16, k_min=1, p_min=p_min, temperatures=TEMPERATURES)
    ids_TK, logprobs_TK, log_tail_T = decode(encode(_captured(logits_TV, 16), policy), temperature)
    truth_TV = _log_softmax(logits_TV / temperature)
    for t in range(len(logits_TV)):
        there = np.isfinite(logprobs_TK[t])
        p = np.exp(truth_TV[t, ids_TK[t, there]])
        p = np.append(p, 1 - p.sum())
        log_q = np.append(logprobs_TK[t, there], log_tail_T[t]).astype(np.float64)
        assert np.exp(log_q).sum() == pytest.approx(1, abs=EXACT)
        assert 0 <= (p * (np.log(p) - log_q)).sum() + EXACT < GRID_KL_BUDGET


def test_half_the_mass_by_hand() -> None:
    """p = .64 .16 .16 .04 at T = 1 is, at T = 2, sqrt(p) / sum = .8 .4 .4 .2 / 1.8 = 4/9 2/9 2/9 1/9.

    Two entries are captured, the tail at T = 2 is 3/9. The floor .2 drops the second: tail 5/9, and 4/9 stays.
    """
    rows = TeacherRows(
        topk_ids_TK=np.array([[3, 1]], np.int32),
        topk_logprobs_TK=np.log([[0.64, 0.16]]).astype(np.float32),
        label_logprob_T=np.log([0.64]).astype(np.float32),
        label_rank_T=np.array([1], np.int32),
        log_tail_mass_T=np.log([0.2]).astype(np.float32),
        log_tail_mass_TX=np.log([[3 / 9]]).astype(np.float32),
    )
    stored = encode(rows, CodecPolicy(k_max=2, k_min=1, p_min=0.2, grid="exact", temperatures=(2,)))
    assert np.exp(stored.log_tails_T[2]).tolist() == pytest.approx([5 / 9], rel=1e-6)
    _, logprobs_TK, log_tail_T = decode(stored, 2)
    assert np.exp(logprobs_TK).tolist() == [pytest.approx([4 / 9], rel=1e-6)]
    assert np.exp(log_tail_T).tolist() == pytest.approx([5 / 9], rel=1e-6)


def test_what_is_kept_whole_keeps_its_tail_bit_for_bit() -> None:
    """With the exact grid and nothing dropped, the engine's own number is stored."""
    rows = _captured(_logits(0, 3.0), 8)
    stored = encode(rows, CodecPolicy(k_max=8, k_min=8, p_min=0.0, grid="exact", temperatures=TEMPERATURES))
    assert rows.log_tail_mass_TX is not None
    for x, temperature in enumerate(TEMPERATURES):
        np.testing.assert_array_equal(stored.log_tails_T[temperature], rows.log_tail_mass_TX[:, x])


def test_a_large_flat_vocabulary_keeps_its_digits() -> None:
    """32 of 150,000 tokens at T = 4 hold a thousandth of the mass: the head is still right to a thousandth of a nat."""
    logits_TV = np.random.default_rng(0).normal(scale=2, size=(2, 150_000))
    for grid, tolerance in (("exact", 1e-4), ("companded256", 1e-3)):
        policy = CodecPolicy.model_validate({"k_max": 32, "k_min": 32, "p_min": 0, "grid": grid, "temperatures": [4]})
        stored = encode(_captured(logits_TV, 32, (4,)), policy)
        truth_TK = -np.sort(-_log_softmax(logits_TV / 4), axis=1)[:, :32]
        assert np.exp(log_head_mass(stored.log_tails_T[4])).max() < 2e-3
        head_T = np.logaddexp.reduce(decode(stored, 4)[1].astype(np.float64), axis=1)
        np.testing.assert_allclose(head_T, np.logaddexp.reduce(truth_TK, axis=1), atol=tolerance)


def test_a_temperature_that_was_not_captured_is_refused() -> None:
    """The tail at T is not a function of the tail at 1: nothing is made up for it."""
    stored = encode(_captured(_logits(0, 3.0), 8), CodecPolicy(k_max=8, temperatures=(2,)))
    with pytest.raises(LakeError, match=r"no tail mass at temperature 4, only at 1, 2.*temperatures=\[4\]"):
        decode(stored, 4)


def test_a_unit_is_encoded_as_its_samples_are() -> None:
    """Tails at other temperatures are joined and cut apart with the rows, and decoded over several samples at once."""
    parts = [_captured(_logits(seed, 3.0)[:n], 8) for seed, n in enumerate((3, 1, 4))]
    policy = CodecPolicy(k_max=8, k_min=1, p_min=0.02, temperatures=TEMPERATURES)
    together = split(encode(concatenate(parts), policy), [3, 1, 4])
    for one, part in zip(parts, together, strict=True):
        for temperature in TEMPERATURES:
            np.testing.assert_array_equal(part.log_tails_T[temperature], encode(one, policy).log_tails_T[temperature])
    whole = encode(concatenate(parts), policy)
    for name, value in vars(join(together)).items():
        np.testing.assert_equal(value, getattr(whole, name), err_msg=name)
    assert join(
        [together[0], replace(together[1], log_tails_T={4: together[1].log_tails_T[4]})]
    ).log_tails_T.keys() == {4}
    _, _, log_tail_T = decode(together, 2)
    np.testing.assert_array_equal(log_tail_T, np.concatenate([part.log_tails_T[2] for part in together]))


@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.0, 0.01, 3.0, 100.0]), k=st.sampled_from([1, 8, 60]))
def test_every_distribution_passes_the_checks(seed: int, scale: float, k: int) -> None:
    """Heat moves mass out of the top-k, and the tail is at most what tokens below the last entry can have."""
    logits_TV = _logits(seed, scale)
    label_ids_T = np.arange(len(logits_TV), dtype=np.int32)
    check_rows(_captured(logits_TV, k, labels=label_ids_T), VOCAB_SIZE, label_ids_T, TEMPERATURES)


def _logits(seed: int, scale: float) -> Float64:
    return np.random.default_rng(seed).normal(size=(5, VOCAB_SIZE)) * scale


def _log_softmax(logits_TV: Float64) -> Float64:
    shifted_TV = logits_TV - logits_TV.max(1, keepdims=True)
    logprobs_TV: Float64 = shifted_TV - np.log(np.exp(shifted_TV).sum(1, keepdims=True))
    return logprobs_TV


def _captured(
    logits_TV: Float64,
    k: int,
    temperatures: tuple[Temperature, ...] = TEMPERATURES,
    labels: npt.NDArray[np.int32] | None = None,
) -> TeacherRows:
    """What a perfect engine says."""
    order_TV = np.argsort(-logits_TV, axis=1, kind="stable")
    logprobs_TV = np.take_along_axis(_log_softmax(logits_TV), order_TV, 1)
    labels_T = order_TV[:, 0] if labels is None else labels
    rank_T = (order_TV == labels_T[:, None]).argmax(1)
    with np.errstate(divide="ignore"):
        tails = [
            np.log(np.exp(_log_softmax(np.take_along_axis(logits_TV, order_TV, 1) / temperature)[:, k:]).sum(1))
            for temperature in (1, *temperatures)
        ]
    return TeacherRows(
        topk_ids_TK=order_TV[:, :k].astype(np.int32),
        topk_logprobs_TK=logprobs_TV[:, :k].astype(np.float32),
        label_logprob_T=logprobs_TV[np.arange(len(logits_TV)), rank_T].astype(np.float32),
        label_rank_T=rank_T.astype(np.int32) + 1,
        log_tail_mass_T=tails[0].astype(np.float32),
        log_tail_mass_TX=np.stack(tails[1:], axis=1).astype(np.float32),
    )
