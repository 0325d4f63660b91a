"""What is captured of a chunk of logits, against the full softmax in float64."""

import numpy as np
import pytest
import torch

from logitlake_shared.topk import TeacherRows
from logitlake_teacher.engines.hf.rows import rows_at_once, top_rows

# float32 logits of about 10 are known to 1e-6, their differences to twice that.
TOLERANCE = 5e-6
TEMPERATURES = (2.0, 0.5)


def twin(logits_RV: np.ndarray, k: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """`logprobs_RV` falling, and the log mass behind the k best, in float64."""
    scaled_RV = -np.sort(-logits_RV.astype(np.float64), axis=1) / temperature
    logprobs_RV = scaled_RV - np.logaddexp.reduce(scaled_RV, axis=1, keepdims=True)
    return logprobs_RV, np.logaddexp.reduce(logprobs_RV[:, k:], axis=1)


def check(logits_RV: np.ndarray, k: int, tolerance: float = TOLERANCE) -> TeacherRows:
    """The rows, which must be those of the twin."""
    labels_R = np.arange(len(logits_RV), dtype=np.int32) * 7 % logits_RV.shape[1]
    rows = top_rows(torch.from_numpy(logits_RV.copy()), labels_R, k, TEMPERATURES)
    logprobs_RV, log_tail_R = twin(logits_RV, k, 1.0)
    np.testing.assert_allclose(rows.topk_logprobs_TK, logprobs_RV[:, :k], atol=tolerance, rtol=1e-6)
    np.testing.assert_allclose(rows.log_tail_mass_T, log_tail_R, atol=tolerance, rtol=1e-6)
    assert rows.log_tail_mass_TX is not None
    for x, temperature in enumerate(TEMPERATURES):
        expected_R = twin(logits_RV, k, temperature)[1]
        np.testing.assert_allclose(rows.log_tail_mass_TX[:, x], expected_R, atol=2 * tolerance, rtol=1e-6)
    own_R = logits_RV[np.arange(len(logits_RV)), labels_R]
    assert all(len(set(ids)) == k for ids in rows.topk_ids_TK.tolist())
    np.testing.assert_array_equal(
        np.take_along_axis(logits_RV, rows.topk_ids_TK.astype(np.int64), 1), -np.sort(-logits_RV, axis=1)[:, :k]
    )
    is_tied_R = (logits_RV == own_R[:, None]).sum(1) > 1
    np.testing.assert_array_equal(rows.label_rank_T[~is_tied_R], ((logits_RV > own_R[:, None]).sum(1) + 1)[~is_tied_R])
    for t, rank in enumerate(rows.label_rank_T.tolist()):
        assert (rank <= k) == (labels_R[t] in rows.topk_ids_TK[t])
        if rank <= k:
            assert rows.topk_ids_TK[t, rank - 1] == labels_R[t]
            assert rows.topk_logprobs_TK[t, rank - 1] == rows.label_logprob_T[t]
    return rows


@pytest.mark.parametrize("vocab_size", [40, 1000, 20000])
def test_rows_equal_the_full_softmax(vocab_size: int) -> None:
    """Top-k, ranks, and the tail at three temperatures."""
    draw = np.random.default_rng(vocab_size)
    check(draw.normal(scale=3, size=(60, vocab_size)).astype(np.float32), k=16)


def test_ties_are_taken_in_any_order_and_each_once() -> None:
    """Half of the logits are equal: still k different ids, the same masses, and ranks that agree with the columns."""
    draw = np.random.default_rng(0)
    check(np.round(draw.normal(scale=1, size=(60, 5003)) * 2).astype(np.float32), k=16)


def test_a_tail_is_exact_however_small() -> None:
    """A sure teacher: what is left outside is e^-80, where one minus the sum of float32 is 0."""
    draw = np.random.default_rng(0)
    logits_RV = draw.normal(size=(5, 3000)).astype(np.float32)
    logits_RV[:, :4] += 90
    rows = check(logits_RV, k=4, tolerance=3e-5)
    assert (rows.log_tail_mass_T < -70).all()
    assert (rows.log_tail_mass_T > -90).all()


def test_logits_of_minus_infinity_have_no_mass() -> None:
    """A model that forbids tokens: the tail is that of the others, and -inf where only forbidden ones are left."""
    logits_RV = np.full((2, 3000), -np.inf, np.float32)
    logits_RV[:, :20] = np.arange(20)
    logits_RV[1, :12] = -np.inf
    rows = top_rows(torch.from_numpy(logits_RV.copy()), np.array([19, 19], np.int32), 8)
    assert np.isneginf(rows.log_tail_mass_T).tolist() == [False, True]
    np.testing.assert_allclose(rows.log_tail_mass_T[0], twin(logits_RV[:1, :20], 8, 1.0)[1][0], atol=TOLERANCE)
    np.testing.assert_allclose(np.exp(rows.topk_logprobs_TK).sum(1) + np.exp(rows.log_tail_mass_T), 1, atol=TOLERANCE)


def test_a_chunk_is_bounded_in_bytes() -> None:
    """At a vocabulary of 151,936 a chunk of float32 logits stays under 32 MiB, and one row always goes."""
    cpu = torch.device("cpu")
    assert 4 * 151_936 * rows_at_once(151_936, cpu, drawn=False) < 32 * 2**20
    assert rows_at_once(10**9, cpu, drawn=True) == 1
