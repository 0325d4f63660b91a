"""`decode` of a whole batch against a slow, obvious twin: one token after the other, in float64."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitlake_schemas import CodecPolicy
from logitlake_shared.topk import StoredRows, TeacherRows, decode, encode

# Each float32 exponential is right to 2 ulp (2.4e-7) of its share of a sum of about 1; einsum adds k <= 128 of them in
# 8 lanes or more, 19 roundings of 6e-8 at most; rounding a logprob of down to -30 nats once more costs up to 1e-6.
FLOAT32 = 3e-6
VOCAB_SIZE = 128


def decode_slowly(rows: list[StoredRows]) -> tuple[list[list[int]], list[list[float]], list[float]]:
    """Ids, logprobs and log tail of each token, unpadded."""
    ids, logprobs, tails = [], [], []
    for sample in rows:
        start = 0
        for k, log_tail in zip(sample.k_T.tolist(), sample.log_tail_mass_T.tolist(), strict=True):
            entries = [float(logprob) for logprob in sample.topk_logprobs[start : start + k]]
            log_sum = math.log(math.fsum(math.exp(logprob) for logprob in (*entries, log_tail)))
            ids.append(sample.topk_ids[start : start + k].tolist())
            logprobs.append([logprob - log_sum for logprob in entries])
            tails.append(log_tail - log_sum)
            start += k
    return ids, logprobs, tails


def made_rows(seed: int, num_tokens: int, k: int, p_min: float, scale: float = 4.0) -> StoredRows:
    """Stored rows of a seeded teacher; the larger `scale`, the sharper."""
    generator = np.random.default_rng(seed)
    logits_TV = generator.normal(scale=scale, size=(num_tokens, VOCAB_SIZE))
    logprobs_TV = -np.sort(-(logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))), axis=1)
    with np.errstate(divide="ignore"):
        log_tail_T = np.log(np.exp(logprobs_TV[:, k:]).sum(1))
    captured = TeacherRows(
        topk_ids_TK=generator.permuted(np.tile(np.arange(VOCAB_SIZE, dtype=np.int32), (num_tokens, 1)), axis=1)[:, :k],
        topk_logprobs_TK=logprobs_TV[:, :k].astype(np.float32),
        label_logprob_T=logprobs_TV[:, 0].astype(np.float32),
        label_rank_T=np.ones(num_tokens, np.int32),
        log_tail_mass_T=log_tail_T.astype(np.float32),
    )
    return encode(captured, CodecPolicy(k_max=k, k_min=1, p_min=p_min))


def assert_equals_slow(rows: list[StoredRows]) -> None:
    ids_RK, logprobs_RK, log_tail_R = decode(rows)
    ids, logprobs, tails = decode_slowly(rows)
    k = max(map(len, ids))
    assert ids_RK.shape == logprobs_RK.shape == (len(ids), k)
    assert (ids_RK.dtype, logprobs_RK.dtype, log_tail_R.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_allclose(log_tail_R, tails, atol=FLOAT32)
    for token, kept in enumerate(ids):
        assert ids_RK[token].tolist() == kept + [0] * (k - len(kept))
        np.testing.assert_allclose(logprobs_RK[token, : len(kept)], logprobs[token], atol=FLOAT32)
        assert np.isneginf(logprobs_RK[token, len(kept) :]).all()


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    k=st.integers(1, VOCAB_SIZE),
    p_min=st.sampled_from([0.0, 1e-3, 0.05]),
    seed=st.integers(0, 2**32),
)
def test_a_batch_decodes_as_its_tokens_do(lengths: list[int], k: int, p_min: float, seed: int) -> None:
    """Ragged or even, samples of any length, the whole vocabulary or one entry: the twin's ids and logprobs."""
    assert_equals_slow([made_rows(seed + place, length, k, p_min) for place, length in enumerate(lengths)])


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_flat_and_saturated_teachers(scale: float) -> None:
    """From a nearly uniform distribution to one where a single token has all the mass and the tail underflows."""
    assert_equals_slow([made_rows(1, 50, 32, 0.0, scale), made_rows(2, 50, 8, 1e-3, scale)])


def test_a_sample_alone_is_a_sample_in_a_batch() -> None:
    """Batch mates change the padding of a row and nothing else."""
    rows = [made_rows(seed, 4, 12, 0.02) for seed in range(3)]
    ids_RK, logprobs_RK, log_tail_R = decode(rows)
    for place, sample in enumerate(rows):
        alone: tuple[npt.NDArray[np.generic], ...] = decode(sample)
        here, k = slice(4 * place, 4 * place + 4), alone[0].shape[1]
        np.testing.assert_array_equal(ids_RK[here, :k], alone[0])
        np.testing.assert_allclose(logprobs_RK[here, :k], alone[1], atol=FLOAT32)
        np.testing.assert_allclose(log_tail_R[here], alone[2], atol=FLOAT32)
