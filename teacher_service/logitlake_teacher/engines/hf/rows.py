"""From a chunk of logits to what is captured of it.

The lm_head makes the largest tensor of a capture, so each chunk of logits is read a few times and copied once: the
top-k is taken and struck out in place, and ranks and masses are summed through one buffer. Nothing of size `[R, V]` but
the logits and that buffer lives. The tail mass is the logsumexp of what the top-k left out, never one minus a sum:
exact however small it is. All in float32, relative to the greatest logit.

Axes: R response rows, V vocabulary, K captured entries, N draws, X temperatures.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from logitlake_shared.topk import DrawnRows, TeacherRows
from logitlake_teacher.engines.base import agree_label_ranks

__all__ = ["drawn_rows", "rows_at_once", "top_rows"]

# Bytes of one chunk of float32 logits. On a CPU they stay below what the allocator gives back to the kernel after every
# use (32 MiB, glibc): above it, each chunk spends longer on page faults than on its top-k. A GPU keeps its memory, and
# wants more rows for one reading of the lm_head.
_CHUNK_BYTES = {"cpu": 28 * 2**20, "cuda": 512 * 2**20}
# Draws hold the whole distribution in float64 as well, twice.
_DRAWN_BYTES_PER_LOGIT = 5


def rows_at_once(vocab_size: int, device: torch.device, *, drawn: bool) -> int:
    """Rows of logits that are held at once, at least 1."""
    bytes_per_row = 4 * vocab_size * (_DRAWN_BYTES_PER_LOGIT if drawn else 1)
    return max(1, _CHUNK_BYTES[device.type] // bytes_per_row)


def top_rows(
    logits_RV: torch.Tensor, label_ids_R: NDArray[np.int32], k: int, temperatures: Sequence[float] = ()
) -> TeacherRows:
    """The `k` best entries of each row with the exact tail at T=1 and at each of `temperatures`; K <= V.

    `logits_RV` is float32 and is used up.
    """
    labels_R1 = torch.from_numpy(label_ids_R.astype(np.int64)).to(logits_RV.device)[:, None]
    label_logits_R1 = logits_RV.gather(1, labels_R1)
    buffer_RV = torch.empty_like(logits_RV)
    # As float32, which counts exactly to 2**24 and is summed ten times faster than booleans.
    rank_R = torch.gt(logits_RV, label_logits_R1, out=buffer_RV).sum(dim=1) + 1
    topk_RK, topk_ids_RK = logits_RV.topk(k, dim=1)
    best_R1 = topk_RK[:, :1].clone()
    rest_RV = logits_RV.scatter_(1, topk_ids_RK, -torch.inf)
    topk_RK -= best_R1
    every_temperature = (1.0, *temperatures)
    log_rest_XR = _log_masses(rest_RV, best_R1, every_temperature, buffer_RV)
    log_total_XR = [
        torch.logaddexp((topk_RK / temperature).logsumexp(dim=1), log_rest_R)
        for temperature, log_rest_R in zip(every_temperature, log_rest_XR, strict=True)
    ]
    log_tail_RX = (torch.stack(log_rest_XR, dim=1) - torch.stack(log_total_XR, dim=1)).cpu().numpy()
    log_total_R1 = log_total_XR[0][:, None]
    topk_ids = topk_ids_RK.to(torch.int32).cpu().numpy()
    return TeacherRows(
        topk_ids_TK=topk_ids,
        topk_logprobs_TK=(topk_RK - log_total_R1).cpu().numpy(),
        label_logprob_T=((label_logits_R1 - best_R1) - log_total_R1)[:, 0].cpu().numpy(),
        label_rank_T=agree_label_ranks(topk_ids, label_ids_R, rank_R.to(torch.int32).cpu().numpy()),
        log_tail_mass_T=np.ascontiguousarray(log_tail_RX[:, 0]),
        log_tail_mass_TX=np.ascontiguousarray(log_tail_RX[:, 1:]) if temperatures else None,
    )


def drawn_rows(logits_RV: torch.Tensor, label_ids_R: NDArray[np.int32], uniforms_RN: NDArray[np.float64]) -> DrawnRows:
    """For each uniform the id where the cumulated distribution, in the order of ids, passes it."""
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    labels_R = torch.from_numpy(label_ids_R.astype(np.int64)).to(logits_RV.device)
    label_logprob_R = logprobs_RV.gather(1, labels_R[:, None])[:, 0]
    # In float64: the cumulated sum of 150,000 float32 would lose the improbable tokens that drawing is for.
    cumulated_RV = logprobs_RV.double().exp().cumsum(dim=1)
    cumulated_RV /= cumulated_RV[:, -1:].clone()
    drawn_RN = torch.searchsorted(cumulated_RV, torch.from_numpy(uniforms_RN).to(logits_RV.device), right=True)
    return DrawnRows(
        drawn_ids_TN=drawn_RN.to(torch.int32).cpu().numpy(),
        label_logprob_T=label_logprob_R.cpu().numpy(),
        label_rank_T=((logprobs_RV > label_logprob_R[:, None]).sum(dim=1) + 1).to(torch.int32).cpu().numpy(),
        entropy_T=-(logprobs_RV.exp() * logprobs_RV).sum(dim=1).cpu().numpy(),
    )


def _log_masses(
    rest_RV: torch.Tensor, best_R1: torch.Tensor, temperatures: Sequence[float], buffer_RV: torch.Tensor
) -> list[torch.Tensor]:
    """`logsumexp((rest - best) / T)` of each row for each T, through the buffer; -inf where nothing is left."""
    greatest_R1 = rest_RV.amax(dim=1, keepdim=True)
    # A row without finite values keeps its -inf: there is nothing to be relative to.
    origin_R1 = greatest_R1.masked_fill(greatest_R1 == -torch.inf, 0)
    log_masses = []
    for temperature in temperatures:
        torch.sub(rest_RV, origin_R1, out=buffer_RV)
        if temperature != 1:
            buffer_RV.div_(temperature)
        log_masses.append(buffer_RV.exp_().sum(dim=1).log_() + (origin_R1 - best_R1)[:, 0] / temperature)
    return log_masses
