"""An exponential moving average of the weights that a stage trains."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """average = decay * average + (1 - decay) * weight after every step; it begins as the weights at the start.

    Spread weights have spread averages: each rank averages its own part.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._decay = decay
        self._weights = dict(named)
        self.averages: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimiser."""
        for name, weight in self._weights.items():
            self.averages[name].lerp_(weight.detach(), 1 - self._decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Makes the averages the weights; training is over."""
        for name, weight in self._weights.items():
            weight.copy_(self.averages[name])
