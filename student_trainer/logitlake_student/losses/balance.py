"""Keeping the experts of a sparse student in use: balance loss, router z-loss, and what the routers did.

The balance loss of one layer is the Switch/Mixtral one (arXiv 2101.03961, eq. 4): E * sum_e f_e P_e, where
P_e is the mean router probability of expert e and f_e the number of times a token chose it, per token. f sums
to `num_experts_per_tok`, so that an even layer scores `num_experts_per_tok`; transformers counts the same
way. Only real tokens count: padding is no token, and image tokens are. Frequencies are those of the global batch
(arXiv 2501.11873): a micro-batch of one picture is never even, and pulling it there takes the experts' specialities.

Layers are averaged. transformers pools the tokens of all layers first, so that one layer's favourite expert
hides another layer's idle one; with one layer the two are equal, which is how the tests compare them.

Axes: N positions of a micro-batch (batch x sequence, padding included), E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitlake_shared.errors import DataError

__all__ = [
    "ExpertCounts",
    "LayerRouting",
    "count_experts",
    "load_balancing_loss",
    "router_entropies",
    "router_z_loss",
    "routing_statistics",
]


@dataclass(frozen=True)
class ExpertCounts:
    """Which experts T tokens chose. Counts of several batches add up. Detached."""

    assigned_LE: Tensor
    """float32, tokens that were sent to each expert of each sparse layer."""
    num_tokens: Tensor
    """int64, 0-d: T."""

    def __add__(self, other: "ExpertCounts") -> "ExpertCounts":
        return ExpertCounts(self.assigned_LE + other.assigned_LE, self.num_tokens + other.num_tokens)


@dataclass(frozen=True)
class LayerRouting:
    """How one layer routed real tokens. Detached."""

    load_E: Tensor
    """float32, share of all token-to-expert assignments that each expert got; sums to 1."""
    entropy: float
    """Mean over tokens of the router distribution's entropy, in nats; log(E) is undecided, 0 certain."""
    max_violation: float
    """How far the busiest expert is above an even load, in even loads: 0 is even, E/k - 1 the most."""
    num_dead: int
    """Experts that no token chose."""


def count_experts(
    router_logits: Sequence[Tensor],
    token_mask_N: Tensor,
    num_experts_per_tok: int,
    chosen: Sequence[Tensor] | None = None,
) -> ExpertCounts:
    """How often each expert was chosen by the real tokens: by `chosen`, int64 `[N, k]` of each layer, or where nothing
    but the logits decides, by these."""
    _check(router_logits, token_mask_N)
    if chosen is None:
        chosen = [logits_NE.topk(num_experts_per_tok, dim=-1).indices for logits_NE in router_logits]
    counts = [
        torch.bincount(chosen_Nk[token_mask_N].flatten(), minlength=logits_NE.shape[1])
        for logits_NE, chosen_Nk in zip(router_logits, chosen, strict=True)
    ]
    return ExpertCounts(torch.stack(counts).float(), token_mask_N.sum())


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    token_mask_N: Tensor,
    num_experts_per_tok: int,
    counts: ExpertCounts | None = None,
) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e, 0-d float32. The gradient flows through P only.

    Args:
        router_logits: [N, E] per sparse layer.
        token_mask_N: bool, False at padding.
        num_experts_per_tok: experts that each token is sent to.
        counts: of all the tokens that f and P are taken over, where these tokens are only some of them. The result is
            then their share of the loss: f is that of all tokens, and the shares of all tokens add up to the loss.
    """
    if counts is None:
        counts = count_experts(router_logits, token_mask_N, num_experts_per_tok)
    _check(router_logits, token_mask_N)
    probs = [torch.softmax(logits_NE.float()[token_mask_N], dim=-1) for logits_NE in router_logits]
    losses = [
        probs_TE.shape[1] * (frequency_E * (probs_TE.sum(dim=0) / counts.num_tokens)).sum()
        for probs_TE, frequency_E in zip(probs, counts.assigned_LE / counts.num_tokens, strict=True)
    ]
    return torch.stack(losses).mean()


def router_z_loss(router_logits: Sequence[Tensor], token_mask_N: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(router logits)^2 over layers and real tokens, 0-d float32 (ST-MoE, arXiv 2202.08906).

    With `num_tokens`, the number of all tokens of which these are some: their share of the mean.
    """
    _check(router_logits, token_mask_N)
    total = token_mask_N.sum() if num_tokens is None else num_tokens
    lse = [torch.logsumexp(logits_NE.float()[token_mask_N], dim=-1) for logits_NE in router_logits]
    return torch.stack([(lse_T**2).sum() / total for lse_T in lse]).mean()


@torch.no_grad()
def router_entropies(router_logits: Sequence[Tensor], token_mask_N: Tensor) -> Tensor:
    """`entropy_L`: of the router distribution in nats, summed over the real tokens."""
    _check(router_logits, token_mask_N)
    probs = [torch.softmax(logits_NE.float()[token_mask_N], dim=-1) for logits_NE in router_logits]
    return torch.stack([torch.special.entr(probs_TE).sum() for probs_TE in probs])


def routing_statistics(counts: ExpertCounts, entropy_L: Tensor, num_experts_per_tok: int) -> list[LayerRouting]:
    """What counts and summed entropies say of each sparse layer."""
    num_tokens = counts.num_tokens.float()
    layers = []
    for assigned_E, entropy in zip(counts.assigned_LE, entropy_L, strict=True):
        load_E = assigned_E / (num_tokens * num_experts_per_tok)
        violation = float(load_E.max()) * len(load_E) - 1
        layers.append(LayerRouting(load_E, float(entropy / num_tokens), violation, int((assigned_E == 0).sum())))
    return layers


def _check(router_logits: Sequence[Tensor], token_mask_N: Tensor) -> None:
    if not router_logits:
        raise DataError("router logits: expected at least one sparse layer, got none; is the student upcycled?")
    for layer, logits_NE in enumerate(router_logits):
        if logits_NE.shape[:1] != token_mask_N.shape:
            raise DataError(
                f"router logits of sparse layer {layer}: expected {tuple(token_mask_N.shape)} positions, "
                f"got {tuple(logits_NE.shape)}"
            )
    if token_mask_N.dtype != torch.bool or not bool(token_mask_N.any()):
        raise DataError("token_mask_N: expected a bool mask with at least one real token")
