"""Sums over tokens or pairs, added up over micro-batches and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["StepTotals", "Sums", "add", "count", "sum_over_ranks"]

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class StepTotals:
    """What is known of a step, all micro-batches and ranks, before its first forward pass."""

    counted: Sums
    """what `Objective.count` says of it, 0-d"""
    surveyed: Sums | None = None
    """None: this micro-batch is all that the rank has"""

    @property
    def num_items(self) -> Tensor:
        """What the loss of the step is divided by, 0-d."""
        return self.counted["items"]

    def complete(self, own: Sums) -> Sums:
        """From a micro-batch's sums to those of the global batch."""
        return sum_over_ranks(own) if self.surveyed is None else {name: self.surveyed[name] for name in own}


def count(number: int, like: Tensor) -> Tensor:
    """A number as a summand, where `like` is: 0-d float64."""
    return torch.tensor(float(number), dtype=torch.float64, device=like.device)


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
