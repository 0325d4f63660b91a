"""What the routers of a sparse student add to a step: balance and z-loss, and what is told of them.

The balance loss compares with the expert frequencies of the global batch, so these have to be known before the first
micro-batch is learned from: `survey` counts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitlake_student.losses.balance import (
    ExpertCounts,
    count_experts,
    load_balancing_loss,
    router_entropies,
    router_z_loss,
)
from logitlake_student.models.capacity import Capacity

__all__ = ["RoutingObjective", "RoutingSums"]


@dataclass(frozen=True)
class RoutingSums:
    """What the routers did with the tokens of a micro-batch. Detached; sums of several add up."""

    counts: ExpertCounts
    entropy_L: Tensor
    """of each sparse layer, summed over tokens, in nats"""
    dropped_L: Tensor
    """float32, choices of an expert that was full"""

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        return RoutingSums(
            self.counts + other.counts, self.entropy_L + other.entropy_L, self.dropped_L + other.dropped_L
        )


class RoutingObjective:
    """Balance and z-loss under their weights, and how much an expert takes."""

    def __init__(
        self,
        balance_weight: float,
        z_loss_weight: float,
        num_experts_per_tok: int,
        capacity_factor: float | None = None,
    ) -> None:
        self._balance_weight, self._z_loss_weight = balance_weight, z_loss_weight
        self.num_experts_per_tok = num_experts_per_tok
        self._capacity_factor = capacity_factor

    def capacity(self, token_mask_N: Tensor) -> Capacity | None:
        """Of a forward pass over these tokens."""
        return None if self._capacity_factor is None else Capacity(self._capacity_factor, token_mask_N)

    def count(self, router_logits: Sequence[Tensor], token_mask_N: Tensor) -> ExpertCounts:
        """Which experts the tokens of a micro-batch chose."""
        return count_experts(router_logits, token_mask_N, self.num_experts_per_tok)

    def __call__(
        self, router_logits: Sequence[Tensor], token_mask_N: Tensor, counts: ExpertCounts
    ) -> tuple[Tensor, Tensor]:
        """The micro-batch's shares of the weighted loss and of the balance loss alone; `counts` of the global batch."""
        balance = load_balancing_loss(router_logits, token_mask_N, self.num_experts_per_tok, counts)
        loss = self._balance_weight * balance
        if self._z_loss_weight:
            loss = loss + self._z_loss_weight * router_z_loss(router_logits, token_mask_N, counts.num_tokens)
        return loss, balance.detach()

    def told(self, router_logits: Sequence[Tensor], dropped: Sequence[Tensor], token_mask_N: Tensor) -> RoutingSums:
        """What is logged of a micro-batch; `dropped` is bool `[N, k]` of each layer."""
        return RoutingSums(
            self.count(router_logits, token_mask_N),
            router_entropies(router_logits, token_mask_N),
            torch.stack([dropped_Nk[token_mask_N].sum().float() for dropped_Nk in dropped]),
        )
