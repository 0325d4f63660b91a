"""What the steps of a run take: time, the wait for data in it, tokens; and how even each layer's experts are.

A step lasts from when it asks for its samples to when the weights have changed. What comes after that (a line of
metrics, a checkpoint) belongs to no step. Times are this rank's; the ranks wait for each other anyway.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from logitlake_shared.jobs.measured import Meter, labelled

__all__ = ["StepMeter"]


class StepMeter(Meter):
    """The figures of an attempt at a run."""

    def __init__(self) -> None:
        super().__init__()
        self._began = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around a step's wait for its samples, with which it begins."""
        self._began = time.perf_counter()
        yield
        self.add("data_wait_seconds", time.perf_counter() - self._began)

    def step_ended(self, num_tokens: float) -> None:
        """A step is over, of so many tokens on all ranks."""
        self.time("train_step_seconds", time.perf_counter() - self._began)
        self.add("train_tokens", num_tokens)

    def routed(self, load_LE: Sequence[Sequence[float]]) -> None:
        """Where tokens went: of each sparse layer the share of each expert."""
        for layer, load_E in enumerate(load_LE):
            self.renew(labelled("expert_load_max_ratio", layer), len(load_E) * max(load_E))
