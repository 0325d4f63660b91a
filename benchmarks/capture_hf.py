"""What capturing through transformers costs over a bare forward pass, and what its rows take in memory.

The bare pass is the stock model on the same sequences, one by one and without any padding, up to its last hidden
states, as fast as it gets on this machine. Memory is that of a process of its own, from before the rows to their peak.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.capture_samples import RESPONSE_SHARE, setup_of, smollm2, text_requests
from benchmarks.harness import Figure, in_own_process, interleaved, median, peak_mib
from logitlake_teacher.config import HfEngineConfig
from logitlake_teacher.engines import ScoreRequest, build_engine
from logitlake_teacher.engines.hf.rows import rows_at_once, top_rows

__all__ = ["hf_figures", "memory_figures"]

K = 64
_VOCAB_SIZE, _ROWS, _HIDDEN = 151_936, 2_048, 896


def hf_figures(rounds: int, quick: bool) -> list[Figure]:
    """Tokens a second of `score` and of the bare pass, on SmolLM2-135M."""
    from transformers import AutoModelForCausalLM

    setup = setup_of(smollm2(), K, num_threads=2)
    engine = build_engine(HfEngineConfig(batch_tokens=2048), setup)
    stock = AutoModelForCausalLM.from_pretrained(setup.model_dir, dtype=torch.float32).eval().base_model
    requests = text_requests(setup, 6 if quick else 24, 120)
    num_tokens = sum(len(request.prompt_ids) + len(request.response_ids) for request in requests)
    try:
        seconds = interleaved({"score": lambda: engine.score(requests), "bare": lambda: _bare(stock, requests)}, rounds)
    finally:
        engine.close()
    ratio = median([bare / score for bare, score in zip(seconds["bare"], seconds["score"], strict=True)])
    name = f"hf engine over the bare forward pass ({RESPONSE_SHARE:.0%} response rows)"
    return [
        Figure(name, ratio, "x", ">= 0.9", ratio >= 0.9),
        Figure("hf engine, SmolLM2-135M", num_tokens / median(seconds["score"]), "tokens / s"),
    ]


@torch.inference_mode()
def _bare(stock: torch.nn.Module, requests: Sequence[ScoreRequest]) -> None:
    for request in requests:
        ids_S = np.concatenate([request.prompt_ids, request.response_ids]).astype(np.int64)
        stock(input_ids=torch.from_numpy(ids_S)[None], use_cache=False)


def memory_figures() -> list[Figure]:
    """Peak memory of the rows of 2,048 response tokens at V = 151,936, against a full-vocabulary log-softmax."""
    ours, whole = in_own_process(_peak_mib, _our_rows), in_own_process(_peak_mib, _full_log_softmax)
    share = ours / whole
    return [
        Figure(
            f"hf rows, peak memory over log-softmax ({_ROWS} rows, V = {_VOCAB_SIZE:,})",
            share,
            "x",
            "<= 0.25",
            share <= 0.25,
        ),
        Figure("hf rows, peak memory", ours, "MiB"),
        Figure("full-vocabulary log-softmax, peak memory", whole, "MiB"),
    ]


def _our_rows(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, labels_R: np.ndarray) -> None:
    at_once = rows_at_once(_VOCAB_SIZE, torch.device("cpu"), drawn=False)
    for start in range(0, _ROWS, at_once):
        chunk = slice(start, start + at_once)
        top_rows(hidden_RH[chunk] @ weight_VH.T, labels_R[chunk], K)


def _full_log_softmax(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, labels_R: np.ndarray) -> None:
    logprobs_RV = torch.log_softmax(hidden_RH @ weight_VH.T, dim=1)
    logprobs_RV.topk(K, dim=1)
    logprobs_RV.gather(1, torch.from_numpy(labels_R.astype(np.int64))[:, None])


def _peak_mib(rows: Callable[[torch.Tensor, torch.Tensor, np.ndarray], None]) -> float:
    """MiB that the rows add to this process at their peak; weights and hidden states are there before."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    hidden_RH, weight_VH = torch.randn(_ROWS, _HIDDEN), torch.randn(_VOCAB_SIZE, _HIDDEN)
    labels_R = np.arange(_ROWS, dtype=np.int32)
    with torch.inference_mode():
        # What the libraries keep for themselves is not the rows'.
        top_rows(hidden_RH[:1] @ weight_VH.T, labels_R[:1], K)
        return peak_mib(lambda: rows(hidden_RH, weight_VH, labels_R))
