"""The batches of an epoch: which positions step n trains on, whatever the number of threads or ranks.

`Batches` cuts the epoch's order into global batches, by number of samples or by a budget of tokens, on request with
samples of similar length together. A rank takes its share of a global batch (`share`), so the union over the ranks of
step n is the same for every world size. All of it is a function of the snapshot, the seed and the epoch: the whole
state of a run is `(epoch, step)`, and resuming plans the epoch again without reading a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from logitlake_shared.errors import ConfigError
from logitlake_shared.reader.order import Layout, batch_order, epoch_windows

__all__ = ["Batches", "EpochBatches", "share"]

Int64 = npt.NDArray[np.int64]

# An epoch's end is prefetched beside the beginning of the next.
_PLANNED_EPOCHS = 2


@dataclass(frozen=True)
class EpochBatches:
    """The global batches of one epoch: batch n is `positions_P[starts_B[n]:starts_B[n + 1]]`."""

    positions_P: Int64
    starts_B: Int64
    """one more than there are batches"""

    def __len__(self) -> int:
        return len(self.starts_B) - 1

    def __getitem__(self, step: int) -> Int64:
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of an epoch of {len(self)}")
        return self.positions_P[self.starts_B[step] : self.starts_B[step + 1]]

    def __iter__(self) -> Iterator[Int64]:
        return (self[step] for step in range(len(self)))

    def smallest(self) -> int:
        """The number of samples of the smallest batch."""
        return int(np.diff(self.starts_B).min())


class Batches:
    """The global batches of every epoch.

    Give either `batch_size` (samples a global batch) or `max_tokens` (its samples times the response tokens of the
    longest, so that the padded batch fits). `by_length` puts samples of similar length together: the items of a
    window are sorted by length, cut, and the batches permuted. Every sample occurs once an epoch; `drop_last` leaves
    out the last batch of an epoch where it is not full.

    Raises `ConfigError` for contradicting settings, and for a sample that alone is over `max_tokens`.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        seed: int,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        by_length: bool = False,
        drop_last: bool = False,
    ) -> None:
        if (batch_size is None) == (max_tokens is None):
            raise ConfigError(f"batches: give batch_size or max_tokens, got {batch_size} and {max_tokens}")
        if min(size for size in (batch_size, max_tokens) if size is not None) < 1:
            raise ConfigError(f"batches: expected a size of at least 1, got {batch_size or max_tokens}")
        if len(layout) == 0:
            raise ConfigError("batches: the dataset holds no item")
        if drop_last and (batch_size is None or batch_size > len(layout)):
            raise ConfigError(
                f"batches: drop_last leaves {'no batch' if batch_size else 'an unknown remainder'} of {len(layout)} "
                f"items with batch_size={batch_size}, max_tokens={max_tokens}"
            )
        if max_tokens is not None and int(layout.num_tokens_P.max()) > max_tokens:
            position = int(layout.num_tokens_P.argmax())
            raise ConfigError(
                f"batches: item {position} has {layout.num_tokens_P[position]} response tokens, over max_tokens="
                f"{max_tokens}; raise it, or leave the task out"
            )
        self.layout, self.seed = layout, seed
        self._batch_size, self._max_tokens = batch_size, max_tokens
        self._by_length, self._drop_last = by_length, drop_last
        self.epoch = lru_cache(maxsize=_PLANNED_EPOCHS)(self._plan)

    def _plan(self, epoch: int) -> EpochBatches:
        """The batches of an epoch; a few recent ones are remembered. Costs numpy time only, no read."""
        windows = epoch_windows(self.layout, self.seed, epoch)
        if self._batch_size is not None:
            chunks = self._whole_batches(np.concatenate(windows), [len(window) for window in windows], self._batch_size)
        else:
            chunks = windows
        positions, starts, num_done = [], [np.zeros(1, np.int64)], 0
        for number, chunk in enumerate(chunks):
            if self._by_length:
                # Stable: equal lengths stay in the drawn order, so batch mates change from epoch to epoch.
                chunk = chunk[np.argsort(self.layout.num_tokens_P[chunk], kind="stable")]
            cuts = self._cuts(chunk)
            if self._by_length:
                chunk, cuts = _permuted(chunk, cuts, batch_order(len(cuts) - 1, self.seed, epoch, number))
            positions.append(chunk)
            starts.append(cuts[1:] + num_done)
            num_done += len(chunk)
        planned = EpochBatches(np.concatenate(positions), np.concatenate(starts))
        if self._drop_last and self._batch_size is not None:
            # Sorting may have put the short batch anywhere in the last window.
            full_B = np.diff(planned.starts_B) == self._batch_size
            kept_P = np.repeat(full_B, np.diff(planned.starts_B))
            starts_B = np.arange(int(full_B.sum()) + 1, dtype=np.int64) * self._batch_size
            planned = EpochBatches(planned.positions_P[kept_P], starts_B)
        return planned

    def _whole_batches(self, order: Int64, sizes: list[int], batch_size: int) -> list[Int64]:
        """The order in windows of whole batches: what is over at a window's end begins the next one."""
        ends = np.cumsum(sizes)
        ends[:-1] -= ends[:-1] % batch_size
        return [chunk for chunk in np.split(order, ends[:-1]) if len(chunk)]

    def _cuts(self, chunk: Int64) -> Int64:
        """Where the batches of a chunk begin, and its end."""
        if self._batch_size is not None:
            return np.append(np.arange(0, len(chunk), self._batch_size), len(chunk)).astype(np.int64)
        assert self._max_tokens is not None
        lengths = np.maximum(self.layout.num_tokens_P[chunk].astype(np.int64), 1)
        cuts = [0]
        while cuts[-1] < len(chunk):
            at = cuts[-1]
            longest = np.maximum.accumulate(lengths[at : at + self._max_tokens // int(lengths[at])])
            padded = longest * np.arange(1, len(longest) + 1)
            cuts.append(at + max(1, int(np.searchsorted(padded, self._max_tokens, side="right"))))
        return np.array(cuts, np.int64)


def share(positions: Int64, rank: int, world_size: int) -> Int64:
    """The positions of a global batch that `rank` trains on: every `world_size`-th, so that lengths are shared too."""
    return positions[rank::world_size]


def _permuted(chunk: Int64, cuts: Int64, order: Int64) -> tuple[Int64, Int64]:
    batches = np.split(chunk, cuts[1:-1])
    moved = [batches[number] for number in order]
    return np.concatenate(moved), np.cumsum([0, *(len(batch) for batch in moved)]).astype(np.int64)
