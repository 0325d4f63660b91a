"""Sums over tokens or pairs, added up over micro-batches and ranks."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Complete", "Sums", "add", "sum_over_ranks"]

Sums = dict[str, Tensor]
Complete = Callable[[Sums], Sums]
"""from a micro-batch's sums to those of the global batch"""


def sum_over_ranks(sums: Sums) -> Sums:
    """The sums of all ranks, on each of them: exact for counts, in a fixed order for everything else."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not sums:
        return sums
    flat = torch.cat([value.detach().double().flatten() for value in sums.values()])
    dist.all_reduce(flat)
    parts = torch.split(flat, [value.numel() for value in sums.values()])
    return {name: part.view_as(value).to(value.dtype) for (name, value), part in zip(sums.items(), parts, strict=True)}


def add(parts: Sequence[Sums]) -> Sums:
    """The sums of several micro-batches."""
    return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}
