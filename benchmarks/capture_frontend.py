"""From what vLLM's core returns to `TeacherRows`, with a stub in the core's place: the part that Python pays for.

vLLM's own `LogprobsProcessor` is fed the tensors of a prompt of 256 positions at k = 64. `default` is what a caller
gets who asks for `prompt_logprobs` and nothing else: text for every entry, a dictionary a position. Beside it the two
roads that are used here: flat lists without text (route A), and the span hook's packed rows (route C). Theirs ends with
the dictionaries; ours with checked arrays.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.capture_samples import smollm2
from benchmarks.harness import Figure, interleaved, median
from logitlake_shared.teacher_checks import check_rows
from logitlake_teacher.engines.vllm.rows import PackedLayout, rows_of_flat, rows_of_packed

__all__ = ["frontend_figures"]

_K = 64
_POSITIONS = 256
_VOCAB_SIZE = 49_152


def frontend_figures(rounds: int) -> list[Figure]:
    """Positions a second of each road."""
    from transformers import AutoTokenizer

    ids_TK, logprobs_TK, ranks_T = _core_output()
    labels_T = ids_TK[:, 0]
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    layout = PackedLayout(_K, 0)
    packed_TW = _packed(ids_TK, logprobs_TK, ranks_T, layout)

    def route_a() -> None:
        flat = _through_vllm(ids_TK, logprobs_TK, ranks_T, None, flat=True)
        check_rows(rows_of_flat(flat, _K, _VOCAB_SIZE, labels_T), _VOCAB_SIZE, labels_T)

    def route_c() -> None:
        check_rows(rows_of_packed(packed_TW, layout, labels_T), _VOCAB_SIZE, labels_T)

    passes: dict[str, Callable[[], Any]] = {
        "default": lambda: _through_vllm(ids_TK, logprobs_TK, ranks_T, tokenizer, flat=False),
        "A": route_a,
        "C": route_c,
    }
    seconds = interleaved(passes, rounds)
    figures = [Figure("front end, vLLM's default", _POSITIONS / median(seconds["default"]), "positions / s")]
    for route, reach in (("A", 10.0), ("C", None)):
        ratio = median([theirs / ours for theirs, ours in zip(seconds["default"], seconds[route], strict=True)])
        holds = None if reach is None else ratio >= reach
        figures += [
            Figure(f"front end, route {route}", _POSITIONS / median(seconds[route]), "positions / s"),
            Figure(
                f"front end, route {route} over vLLM's default, k = {_K}",
                ratio,
                "x",
                None if reach is None else f">= {reach:g}",
                holds,
            ),
        ]
    return figures


def _core_output() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[T, k + 1]` ids and logprobs, `[T]` ranks of a seeded teacher; the actual token first, as vLLM has it."""
    generator = np.random.default_rng(0)
    logits_TV = generator.normal(scale=4, size=(_POSITIONS, _VOCAB_SIZE)).astype(np.float32)
    logprobs_TV = torch.log_softmax(torch.from_numpy(logits_TV), dim=1)
    best_TK, best_ids_TK = (part.numpy() for part in logprobs_TV.topk(_K, dim=1))
    labels_T = best_ids_TK[:, 3]
    ids_TK = np.concatenate([labels_T[:, None], best_ids_TK], axis=1).astype(np.int32)
    logprobs_TK = np.concatenate([best_TK[:, 3:4], best_TK], axis=1)
    return ids_TK, logprobs_TK, np.full(_POSITIONS, 4, np.int32)


def _through_vllm(
    ids_TK: np.ndarray, logprobs_TK: np.ndarray, ranks_T: np.ndarray, tokenizer: Any, *, flat: bool
) -> Any:
    """vLLM's own road from the core's tensors to what a caller gets."""
    from vllm.logprobs import create_prompt_logprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

    processor = LogprobsProcessor(
        tokenizer=tokenizer,
        logprobs=None,
        prompt_logprobs=create_prompt_logprobs(flat),
        cumulative_logprob=None,
        num_logprobs=None,
        num_prompt_logprobs=_K,
    )
    processor._update_prompt_logprobs(
        LogprobsTensors(torch.from_numpy(ids_TK), torch.from_numpy(logprobs_TK), torch.from_numpy(ranks_T))
    )
    return processor.pop_prompt_logprobs()


def _packed(ids_TK: np.ndarray, logprobs_TK: np.ndarray, ranks_T: np.ndarray, layout: PackedLayout) -> np.ndarray:
    """The same as the span hook packs it."""
    packed_TW = np.empty((_POSITIONS, layout.width), np.float32)
    packed_TW[:, layout.LABEL_LOGPROB] = logprobs_TK[:, 0]
    packed_TW[:, layout.LABEL_RANK] = ranks_T.view(np.float32)
    packed_TW[:, layout.tails] = np.log1p(-np.exp(logprobs_TK[:, 1:]).sum(1))[:, None]
    packed_TW[:, layout.logprobs] = logprobs_TK[:, 1:]
    packed_TW[:, layout.ids] = ids_TK[:, 1:].view(np.float32)
    return packed_TW
