"""The order in which an epoch visits the items of a snapshot.

A two-level shuffle: the row groups are permuted, then cut into windows of about `window_tokens` response tokens, and
the items of each window are permuted among themselves. A reader therefore decodes every row group once an epoch and
holds the groups of one window, however large the lake is. A lake that fits into one window is permuted as a whole.

The order is a function of the snapshot, the seed and the epoch. Every draw comes from a counter-based generator whose
counter says what is drawn, so nothing depends on threads, ranks or on what was drawn before.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitlake_shared.errors import ConfigError

__all__ = ["Layout", "batch_order", "epoch_order", "epoch_windows", "generator"]

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# What a generator's counter says is drawn.
_ITEMS, _BATCHES, _GROUPS = 0, 1, 2


@dataclass(frozen=True)
class Layout:
    """Where the P items of a dataset lie, by position: the number of the row group, and the response tokens.

    Groups are numbered by the snapshot alone. Only the order of the numbers counts, gaps are fine. `window_tokens` is
    the size of a window, None for one window of everything.
    """

    group_P: Int32
    num_tokens_P: Int32
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.window_tokens is not None and self.window_tokens < 1:
            raise ConfigError(f"layout: expected a window of at least 1 token, got {self.window_tokens}")
        if self.group_P.shape != self.num_tokens_P.shape or self.group_P.ndim != 1:
            raise ConfigError(
                f"layout: expected one group and one length an item, got shapes {self.group_P.shape} and "
                f"{self.num_tokens_P.shape}"
            )

    def __len__(self) -> int:
        return len(self.group_P)

    @classmethod
    def of_one_group(cls, num_items: int) -> "Layout":
        """`num_items` items that are all at hand, e.g. in memory: one group, one token each."""
        return cls(np.zeros(num_items, np.int32), np.ones(num_items, np.int32))


def epoch_order(layout: Layout, seed: int, epoch: int) -> Int64:
    """All positions, each once, in the order of this epoch."""
    windows = epoch_windows(layout, seed, epoch)
    return np.concatenate(windows) if windows else np.zeros(0, np.int64)


def epoch_windows(layout: Layout, seed: int, epoch: int) -> list[Int64]:
    """The same order, window by window. A window holds whole row groups, at most one more than fills it.

    Raises `ConfigError` for a negative seed or epoch.
    """
    if len(layout) == 0:
        return []
    window_tokens = layout.window_tokens
    if window_tokens is None or int(layout.num_tokens_P.sum(dtype=np.int64)) <= window_tokens:
        return [generator(seed, epoch).permutation(len(layout))]
    groups, group_P = np.unique(layout.group_P, return_inverse=True)
    tokens_G = np.bincount(group_P, weights=layout.num_tokens_P, minlength=len(groups)).astype(np.int64)
    order_G = generator(seed, epoch, _GROUPS).permutation(len(groups))
    before_G = np.cumsum(tokens_G[order_G]) - tokens_G[order_G]
    window_G = np.empty(len(groups), np.int64)
    # Cut where the running sum passes a multiple of the window: no loop over groups, and no group is split.
    window_G[order_G] = np.unique(before_G // window_tokens, return_inverse=True)[1]
    window_P = window_G[group_P]
    positions = np.argsort(window_P, kind="stable")
    starts = np.searchsorted(window_P[positions], np.arange(1, int(window_P.max()) + 1))
    return [
        generator(seed, epoch, _ITEMS, number).permutation(window)
        for number, window in enumerate(np.split(positions, starts))
    ]


def batch_order(num_batches: int, seed: int, epoch: int, window: int) -> Int64:
    """The order of the batches of a window whose items were sorted by length."""
    return generator(seed, epoch, _BATCHES, window).permutation(num_batches)


def generator(seed: int, epoch: int, purpose: int = _ITEMS, window: int = 0) -> np.random.Generator:
    """The generator of one draw: key (seed, epoch), counter (purpose, window) above 2^128 blocks of its own."""
    if seed < 0 or epoch < 0:
        raise ConfigError(f"the order needs a seed and an epoch of at least 0, got seed {seed}, epoch {epoch}")
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, purpose, window]))
