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
from logitlake_student.models.capacity import Capacity, fitting_choices
from logitlake_student.models.routing import RouterRecorder

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

    @property
    def drops(self) -> bool:
        """Whether an expert may be full."""
        return self._capacity_factor is not None

    def capacity(self, token_mask_N: Tensor) -> Capacity | None:
        """Of a forward pass over these tokens."""
        return None if self._capacity_factor is None else Capacity(self._capacity_factor, token_mask_N)

    def count(self, heard: RouterRecorder, token_mask_N: Tensor) -> ExpertCounts:
        """Which experts the tokens of a micro-batch chose."""
        return count_experts(heard.logits(), token_mask_N, self.num_experts_per_tok, heard.chosen())

    def __call__(
        self, router_logits: Sequence[Tensor], token_mask_N: Tensor, counts: ExpertCounts
    ) -> tuple[Tensor, Tensor]:
        """The micro-batch's shares of the weighted loss and of the balance loss alone; `counts` of the global batch."""
        balance = load_balancing_loss(router_logits, token_mask_N, self.num_experts_per_tok, counts)
        loss = self._balance_weight * balance
        if self._z_loss_weight:
            loss = loss + self._z_loss_weight * router_z_loss(router_logits, token_mask_N, counts.num_tokens)
        return loss, balance.detach()

    def told(self, heard: RouterRecorder, token_mask_N: Tensor) -> RoutingSums:
        """What is logged of a micro-batch."""
        counts, capacity = self.count(heard, token_mask_N), self.capacity(token_mask_N)
        dropped_L = counts.assigned_LE.new_zeros(len(counts.assigned_LE))
        if capacity is not None:
            num_experts = counts.assigned_LE.shape[1]
            fits = [fitting_choices(chosen_Nk, num_experts, capacity) for chosen_Nk in heard.chosen()]
            dropped_L = torch.stack([(~fits_Nk).sum() for fits_Nk in fits]).float()
        return RoutingSums(counts, router_entropies(heard.logits(), token_mask_N), dropped_L)


class ExpertBias:
    """Balance without a loss (arXiv 2408.15664): each expert's chances move against its load after every step.

    A stock model has no such bias, so it falls to nothing over the last fifth of the stage: the student that is saved
    routes as it was trained to at the end.
    """

    def __init__(self, rate: float, num_steps: int, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._rate, self._num_steps = rate, num_steps
        self.total_LE = torch.zeros(num_layers, num_experts, device=device)

    def update(self, counts: ExpertCounts) -> None:
        """After a step; `counts` of the global batch."""
        even_L1 = counts.assigned_LE.mean(dim=1, keepdim=True)
        self.total_LE += self._rate * torch.sign(even_L1 - counts.assigned_LE)

    def at(self, step: int) -> Tensor:
        """`bias_LE` for the step after `step`."""
        left = (self._num_steps - 1 - step) / max(_FADES * self._num_steps, 1)
        return self.total_LE * max(0.0, min(1.0, left))


# Share of a stage over which the bias falls to nothing.
_FADES = 0.2
