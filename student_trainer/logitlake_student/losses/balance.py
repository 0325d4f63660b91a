"""Keeping the experts of a sparse student in use: balance loss, router z-loss, and what the routers did.

The balance loss of one layer is the Switch/Mixtral one (arXiv 2101.03961, eq. 4): E * sum_e f_e P_e, where
P_e is the mean router probability of expert e and f_e the number of times a token chose it, per token. f sums
to `num_experts_per_tok`, so that an even layer scores `num_experts_per_tok`; transformers counts the same
way. Only real tokens count: padding is no token, and image tokens are.

Layers are averaged. transformers pools the tokens of all layers first, so that one layer's favourite expert
hides another layer's idle one; with one layer the two are equal, which is how the tests compare them.

Axes: N positions of a micro-batch (batch x sequence, padding included), E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitlake_shared.errors import DataError

__all__ = ["LayerRouting", "load_balancing_loss", "router_z_loss", "routing_statistics"]


@dataclass(frozen=True)
class LayerRouting:
    """How one layer routed the real tokens of a micro-batch. Detached."""

    load_E: Tensor
    """float32, share of all token-to-expert assignments that each expert got; sums to 1."""
    entropy: float
    """Mean over tokens of the router distribution's entropy, in nats; log(E) is undecided, 0 certain."""
    num_dead: int
    """Experts that no token chose."""


def load_balancing_loss(router_logits: Sequence[Tensor], token_mask_N: Tensor, num_experts_per_tok: int) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e, 0-d float32. The gradient flows through P only.

    Args:
        router_logits: [N, E] per sparse layer.
        token_mask_N: bool, False at padding.
        num_experts_per_tok: experts that each token is sent to.
    """
    losses = []
    for probs_TE, assigned_TE in _routes(router_logits, token_mask_N, num_experts_per_tok):
        losses.append(probs_TE.shape[1] * (assigned_TE.mean(dim=0) * probs_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def router_z_loss(router_logits: Sequence[Tensor], token_mask_N: Tensor) -> Tensor:
    """Mean of logsumexp(router logits)^2 over layers and real tokens, 0-d float32 (ST-MoE, arXiv 2202.08906)."""
    _check(router_logits, token_mask_N)
    lse = [torch.logsumexp(logits_NE.float()[token_mask_N], dim=-1) for logits_NE in router_logits]
    return torch.stack([(lse_T**2).mean() for lse_T in lse]).mean()


@torch.no_grad()
def routing_statistics(
    router_logits: Sequence[Tensor], token_mask_N: Tensor, num_experts_per_tok: int
) -> list[LayerRouting]:
    """Load, entropy and dead experts of each sparse layer, over the real tokens."""
    layers = []
    for probs_TE, assigned_TE in _routes(router_logits, token_mask_N, num_experts_per_tok):
        load_E = assigned_TE.mean(dim=0) / num_experts_per_tok
        entropy = torch.special.entr(probs_TE).sum(dim=-1).mean()
        layers.append(LayerRouting(load_E, float(entropy), int((load_E == 0).sum())))
    return layers


def _routes(
    router_logits: Sequence[Tensor], token_mask_N: Tensor, num_experts_per_tok: int
) -> list[tuple[Tensor, Tensor]]:
    """Per layer, over the T real tokens: router probabilities [T, E] and 0/1 assignments [T, E], float32."""
    _check(router_logits, token_mask_N)
    routes = []
    for logits_NE in router_logits:
        probs_TE = torch.softmax(logits_NE.float()[token_mask_N], dim=-1)
        chosen_Tk = probs_TE.topk(num_experts_per_tok, dim=-1).indices
        routes.append((probs_TE, torch.zeros_like(probs_TE).scatter_(1, chosen_Tk, 1.0)))
    return routes


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
