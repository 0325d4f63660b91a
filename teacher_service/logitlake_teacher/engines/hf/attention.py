"""Causal attention over several sequences that lie one after the other in a single row.

transformers lets a model's attention be replaced by name. This one cuts queries, keys and values where the sequences
end and attends within each: what a block-diagonal mask would do, without the mask, whose cost grows with the square of
the batch. Sequences of one length go through a single call, so a batch sorted by length needs few of them.

Where the cuts are is said by `packed(lengths)` around the forward pass, not by an argument: models hand arguments of
their own making to their attention, and one that dropped ours would be wrong without a word.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers

from logitlake_shared.errors import EngineError

__all__ = ["PACKED_ATTENTION", "packed"]

PACKED_ATTENTION = "logitlake_packed"

_LENGTHS: ContextVar[tuple[int, ...]] = ContextVar("packed_lengths")
# Arguments of attention that change its result, and that this one does not know.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


@contextmanager
def packed(lengths: Sequence[int]) -> Iterator[None]:
    """Within, a forward pass of a model set to `PACKED_ATTENTION` sees sequences of these lengths in its one row."""
    token = _LENGTHS.set(tuple(lengths))
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`[1, heads, S, D]` queries and `[1, key heads, S, D]` keys and values -> `[1, S, heads, D]`.

    Raises `EngineError` where the model asks for an attention that is not plain causal softmax.
    """
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    lengths = _LENGTHS.get()
    if unknown or attention_mask is not None or query.shape[0] != 1 or query.shape[2] != sum(lengths):
        raise EngineError(
            f"{type(module).__name__}: its attention ({', '.join(unknown) or 'mask or shape'}) cannot take several "
            "sequences in one row; set engine.batching=padded"
        )
    outputs = []
    start = 0
    for length, group in itertools.groupby(lengths):
        num_sequences = len(list(group))
        stop = start + num_sequences * length
        # [1, heads, N * L, D] -> [N, heads, L, D]
        q_NHLD, k_NHLD, v_NHLD = (
            states[0, :, start:stop].view(-1, num_sequences, length, states.shape[-1]).transpose(0, 1)
            for states in (query, key, value)
        )
        window = None if sliding_window is None or sliding_window >= length else sliding_window
        attended_NHLD = torch.nn.functional.scaled_dot_product_attention(
            q_NHLD,
            k_NHLD,
            v_NHLD,
            attn_mask=None if window is None else _window_mask(length, window, query.device),
            is_causal=window is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        # [N, heads, L, D] -> [N * L, heads, D]
        outputs.append(attended_NHLD.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)[None], None


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """`[L, L]`: each position sees itself and the `window - 1` before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


transformers.AttentionInterface.register(PACKED_ATTENTION, packed_attention)
