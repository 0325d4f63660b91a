"""Experts that take so many tokens and no more, as DeepSpeed's top-k gate does it: the preset `faithful`.

An expert holds C = ceil(factor * k * T / E) of T tokens. First choices queue in the order of the tokens, second choices
behind all first choices of all tokens, dropped ones included, and so on; who does not fit is dropped. The weights of a
token's choices that are left are divided by their sum, and a token without any passes the layer by. (DeepSpeed 0.9.5,
`top2gating`, which draws the second choice with Gumbel noise; here it is the second largest. It counts padding, too.)

What fits depends on the tokens that share a forward pass, so this is for training alone.

Axes: N positions of a forward pass, T of them real tokens, E experts, k experts a token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Capacity", "fitting_choices", "weights_within_capacity"]


@dataclass(frozen=True)
class Capacity:
    """How much the experts take of a forward pass."""

    factor: float
    """of an even share"""
    token_mask_N: Tensor
    """bool, False at padding, which takes no place"""


def fitting_choices(ids_Nk: Tensor, num_experts: int, capacity: Capacity) -> Tensor:
    """bool `[N, k]`: which choices, first ones first, find room in their expert. Padding always does."""
    k = ids_Nk.shape[1]
    real_N1 = capacity.token_mask_N[:, None]
    limit = math.ceil(capacity.factor * k * int(capacity.token_mask_N.sum()) / num_experts)
    queued_E = torch.zeros(num_experts, dtype=torch.long, device=ids_Nk.device)
    fits = []
    for ids_N in ids_Nk.unbind(dim=1):
        chosen_NE = torch.nn.functional.one_hot(ids_N, num_experts) * real_N1
        place_NE = queued_E + chosen_NE.cumsum(dim=0) - 1
        fits.append(place_NE.gather(1, ids_N[:, None]).squeeze(1) < limit)
        queued_E = queued_E + chosen_NE.sum(dim=0)
    return torch.stack(fits, dim=1) | ~real_N1


def weights_within_capacity(probs_Nk: Tensor, ids_Nk: Tensor, num_experts: int, capacity: Capacity) -> Tensor:
    """`weights_Nk` of choices and their router probabilities, first choices first: 0 where a choice was dropped."""
    kept_Nk = probs_Nk * fitting_choices(ids_Nk, num_experts, capacity)
    return kept_Nk / kept_Nk.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(kept_Nk.dtype).eps)
