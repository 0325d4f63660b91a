"""Laws of Random-Sampling KD: counts of draws are an unbiased estimate, stored as any other rows."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from logitlake_schemas import Codec, CodecPolicy, SampledPolicy
from logitlake_shared.draws import check_draws, drawn_error, encode_draws, uniforms
from logitlake_shared.errors import EngineError
from logitlake_shared.topk import DrawnRows, decode

VOCAB_SIZE = 12
# Five standard errors of a mean: one honest run in a million is outside.
STANDARD_ERRORS = 5
# log(count/N) and its exponential, each rounded to float32.
FLOAT32 = 1e-6


def make_draws(seed: int, num_tokens: int, draws: int) -> DrawnRows:
    """Draws from seeded distributions over `VOCAB_SIZE`, all ids possible."""
    generator = np.random.default_rng(seed)
    p_TV = generator.dirichlet(np.ones(VOCAB_SIZE), num_tokens)
    ids_TN = np.stack([generator.choice(VOCAB_SIZE, draws, p=p_V) for p_V in p_TV]).astype(np.int32)
    label = np.log(p_TV[:, 0]).astype(np.float32)
    entropy = -(p_TV * np.log(p_TV)).sum(1).astype(np.float32)
    return DrawnRows(ids_TN, label, np.ones(num_tokens, np.int32), entropy)


@given(seed=st.integers(0, 2**32), num_tokens=st.integers(1, 9), draws=st.integers(1, 255))
def test_stored_rows_are_the_counts(seed: int, num_tokens: int, draws: int) -> None:
    """Each distinct id once, by falling count, with exactly log(count/N); head mass one, no tail."""
    rows = make_draws(seed, num_tokens, draws)
    stored = encode_draws(rows)
    start = 0
    for t in range(num_tokens):
        stop = start + int(stored.k_T[t])
        ids, counts = np.unique(rows.drawn_ids_TN[t], return_counts=True)
        got = np.rint(np.exp(stored.topk_logprobs[start:stop].astype(np.float64)) * draws).astype(int)
        assert dict(zip(stored.topk_ids[start:stop].tolist(), got.tolist(), strict=True)) == dict(
            zip(ids.tolist(), counts.tolist(), strict=True)
        )
        assert (np.diff(got) <= 0).all()
        start = stop
    assert np.isneginf(stored.log_tail_mass_T).all()
    _, logprobs, log_tail = decode(stored)
    assert np.exp(logprobs.astype(np.float64)).sum(1) == pytest.approx(np.ones(num_tokens), abs=FLOAT32)
    assert np.isneginf(log_tail).all()
    assert drawn_error(stored).kl_mean is None


def test_counts_by_hand() -> None:
    """Draws 4 4 9 1 of one token: 4 with one half, then 1 and 9 with a quarter each, the lower id first."""
    rows = DrawnRows(
        np.array([[4, 9, 4, 1]], np.int32), np.zeros(1, np.float32), np.ones(1, np.int32), np.zeros(1, np.float32)
    )
    stored = encode_draws(rows)
    assert stored.k_T.tolist() == [3]
    assert stored.topk_ids.tolist() == [4, 1, 9]
    assert np.exp(stored.topk_logprobs).tolist() == pytest.approx([0.5, 0.25, 0.25], rel=FLOAT32)


def test_draws_are_unbiased_and_repeatable() -> None:
    """The mean of many stored estimates is the distribution; the same seed and sample give the same uniforms."""
    policy = SampledPolicy(type="sampled", draws=50, seed=3)
    p_V = np.random.default_rng(0).dirichlet(np.ones(VOCAB_SIZE))
    u_TN = uniforms(policy, "sample", 4000)
    assert (uniforms(policy, "sample", 4000) == u_TN).all()
    assert (uniforms(policy, "another", 1) != u_TN[:1]).any()
    ids_TN = np.searchsorted(np.cumsum(p_V) / p_V.sum(), u_TN, side="right")
    mean_V = np.bincount(ids_TN.reshape(-1), minlength=VOCAB_SIZE) / ids_TN.size
    standard_error_V = np.sqrt(p_V * (1 - p_V) / ids_TN.size)
    assert (np.abs(mean_V - p_V) < STANDARD_ERRORS * standard_error_V).all()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: rows.label_logprob_T.__setitem__(0, np.nan), "teacher_nonfinite"),
        (lambda rows: rows.drawn_ids_TN.__setitem__((0, 0), VOCAB_SIZE), "padded vocabulary"),
        (lambda rows: rows.drawn_ids_TN.__setitem__((0, 0), -1), "padded vocabulary"),
    ],
)
def test_what_must_never_be_written_is_refused(damage: Callable[[DrawnRows], None], said: str) -> None:
    """Each way in which draws can be wrong has its own message."""
    rows, policy = make_draws(1, 3, 8), SampledPolicy(type="sampled", draws=8)
    check_draws(rows, policy, VOCAB_SIZE)
    with pytest.raises(EngineError, match="8 draws a token, expected 9"):
        check_draws(rows, SampledPolicy(type="sampled", draws=9), VOCAB_SIZE)
    damage(rows)
    with pytest.raises(EngineError, match=said):
        check_draws(rows, policy, VOCAB_SIZE)


def test_the_codec_of_a_spec_is_told_by_its_type() -> None:
    """`type` chooses; without it a codec is a top-k, as in every file written before there was a choice."""
    codec: TypeAdapter[Codec] = TypeAdapter(Codec)
    assert codec.validate_python({"k_max": 8}) == CodecPolicy(k_max=8)
    assert codec.validate_python({"type": "sampled", "draws": 9}) == SampledPolicy(type="sampled", draws=9)
    with pytest.raises(ValueError, match="k_max"):
        codec.validate_python({"type": "sampled", "k_max": 8})
    with pytest.raises(ValueError, match="less than or equal to 255"):
        codec.validate_python({"type": "sampled", "draws": 256})
