"""Random-Sampling KD: a token's distribution as the counts of N draws from it.

What is stored is the same `StoredRows` as of a top-k: each distinct id with log(count / N), by falling count, and
nothing in the tail. So shards, SQL, readers and the loss are the same code, and forward KL against the stored rows
has the gradient q - count/N, whose expectation is that of full distillation (Anshumann et al., ACL 2025). Counts are
never truncated and never renormalised; either would bring back the bias that drawing removes. A divergence that is
not linear in the teacher (reverse KL, JSD) is biased on draws.

The uniforms behind the draws come from a counter-based generator keyed by the seed and the sample, so that a unit
captured again holds the same rows.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from logitlake_schemas import SampledPolicy, StoredError
from logitlake_shared.errors import EngineError
from logitlake_shared.topk import DrawnRows, StoredRows, rounded

__all__ = ["check_draws", "drawn_error", "encode_draws", "uniforms"]


def uniforms(policy: SampledPolicy, sample_id: str, num_tokens: int) -> npt.NDArray[np.float64]:
    """`uniforms_TN` in [0, 1): an id is drawn where the cumulated probability first exceeds its uniform."""
    key = hashlib.sha256(f"{policy.seed}:{sample_id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    return generator.random((num_tokens, policy.draws))


def check_draws(rows: DrawnRows, policy: SampledPolicy, vocab_size: int) -> None:
    """Refuses what must never be written. Raises `EngineError` that begins `teacher_nonfinite` or `teacher_invalid`."""
    num_bad = int((~np.isfinite(rows.label_logprob_T)).sum() + (~np.isfinite(rows.entropy_T)).sum())
    if num_bad:
        raise EngineError(
            f"teacher_nonfinite: {num_bad} figures are NaN or infinite; check the teacher's weights and dtype"
        )
    ids_TN = rows.drawn_ids_TN
    if ids_TN.shape[1] != policy.draws:
        raise EngineError(f"teacher_invalid: {ids_TN.shape[1]} draws a token, expected {policy.draws}")
    if ids_TN.size and (int(ids_TN.min()) < 0 or int(ids_TN.max()) >= vocab_size):
        raise EngineError(
            f"teacher_invalid: token ids span {ids_TN.min()}..{ids_TN.max()}, expected 0..{vocab_size - 1}: the engine "
            "drew padded vocabulary slots"
        )


def encode_draws(rows: DrawnRows) -> StoredRows:
    """Each token's distinct ids by falling count, the lower id first where counts are equal."""
    num_tokens, num_draws = rows.drawn_ids_TN.shape
    ids_TN = np.sort(rows.drawn_ids_TN, axis=1)
    first_TN = np.ones(ids_TN.shape, np.bool_)
    first_TN[:, 1:] = ids_TN[:, 1:] != ids_TN[:, :-1]
    places = np.flatnonzero(first_TN)
    token, ids = places // num_draws, ids_TN.reshape(-1)[places]
    counts = np.diff(np.append(places, num_tokens * num_draws))
    order = np.lexsort((ids, -counts, token))
    k_T = first_TN.sum(1)
    return StoredRows(
        k_T=k_T.astype(np.uint16),
        topk_ids=ids[order].astype(np.int32),
        topk_logprobs=np.log(counts[order] / num_draws).astype(np.float32),
        label_logprob_T=rounded(rows.label_logprob_T),
        label_rank_T=rows.label_rank_T.astype(np.int32),
        log_tail_mass_T=np.full(num_tokens, -np.inf, np.float32),
        entropy_T=rounded(np.maximum(rows.entropy_T, 0)),
    )


def drawn_error(stored: StoredRows) -> StoredError:
    """What there is to say of draws: they estimate and round nothing, so there is no KL."""
    return StoredError(kl_mean=None, kl_max=None, mean_stored_mass=1.0, mean_k=float(stored.k_T.mean()))
