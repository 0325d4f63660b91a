"""Batches read ahead of the step that needs them, by threads.

    batches = dataset.batches(batch_size=8, seed=0)
    with LakeLoader(dataset, batches, collate, start=(epoch, step)) as loader:
        for batch in loader:
            ...

Threads, not processes: pyarrow and numpy work without the interpreter's lock, and passing tensors between processes
costs more than decoding them. Batches come in the order of `batches` whatever the number of threads; at most
`prefetch` of them are ready or in the making, and the row groups (of an object store: the shards) of the next
`read_ahead` batches are fetched before they are due, so that a new window of the order does not make the training
wait. What goes wrong in a thread is raised where its batch is due. `state`
is the next batch to be delivered; a loader that starts there repeats exactly the batches that were not seen.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from logitlake_shared.errors import ConfigError, LakeError
from logitlake_shared.reader.batches import Batches, share

__all__ = ["LakeLoader"]

Batch = TypeVar("Batch")
Item = TypeVar("Item")


class Fetches(Protocol[Item]):
    """What a loader needs of a dataset."""

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """The items at `positions`, in that order."""

    def prepare(self, positions: Sequence[int]) -> None:
        """Has what `positions` need at hand soon. Need not do anything, and must not raise."""


class LakeLoader(Generic[Batch]):
    """An iterator over `collate(items)` for this rank's share of every batch, epoch after epoch.

    `start` is (epoch, step); `epochs` ends the iteration before that epoch, None never ends it. `collate` is called
    in the threads, so it must not change what it shares; `num_threads=0` calls it where the batch is asked for.
    `timeout_s` bounds the wait for one batch. Use it as a context manager, or `close()` it; a loader that is
    forgotten ends its threads as well.

    Raises `ConfigError` for settings that contradict each other, what the dataset and `collate` raise, and `LakeError`
    when a batch does not come in time. After an error `state` is that batch, and asking again tries it again.
    """

    def __init__(
        self,
        dataset: Fetches[Item],
        batches: Batches,
        collate: Callable[[list[Item]], Batch],
        *,
        num_threads: int = 2,
        prefetch: int = 4,
        read_ahead: int = 64,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
        epochs: int | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"loader: expected a rank from 0 to {world_size - 1}, got {rank}")
        if num_threads < 0 or prefetch < 1 or read_ahead < 0 or timeout_s <= 0:
            raise ConfigError(
                "loader: expected num_threads >= 0, prefetch >= 1, read_ahead >= 0 and timeout_s > 0, got "
                f"{num_threads}, {prefetch}, {read_ahead} and {timeout_s}"
            )
        self._dataset, self._batches, self._collate = dataset, batches, collate
        self._num_threads, self._prefetch, self._timeout_s = num_threads, prefetch, timeout_s
        self._read_ahead = read_ahead
        self._rank, self._world_size, self._epochs = rank, world_size, epochs
        self._due: tuple[int, int] | None = self._settle(*start)
        """the next batch to deliver, None at the end"""
        self._asked = self._due
        """the next batch to ask of a thread"""
        self._ahead, self._lead = self._due, 0
        """the next batch to prepare, and how many batches that is after `_asked`"""
        self._prepared: tuple[int, set[int]] = (-1, set())
        """the row groups that were prepared in an epoch"""
        self._futures: deque[Future[Batch]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._end_pool: weakref.finalize[Any, Any] | None = None

    @property
    def state(self) -> tuple[int, int]:
        """(epoch, step) of the next batch: what `start` of another loader continues from."""
        if self._due is None:
            assert self._epochs is not None
            return self._epochs, 0
        return self._due

    def __iter__(self) -> "LakeLoader[Batch]":
        return self

    def __next__(self) -> Batch:
        if self._due is None:
            self.close()
            raise StopIteration
        batch = self._here() if self._num_threads == 0 else self._from_threads()
        epoch, step = self._due
        self._due = self._settle(epoch, step + 1)
        return batch

    def close(self) -> None:
        """Drops what was read ahead and ends the threads. The loader may be used again: it continues at `state`."""
        if self._end_pool is not None:
            self._end_pool()
        self._forget()

    def __enter__(self) -> "LakeLoader[Batch]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _here(self) -> Batch:
        assert self._due is not None
        return _make(self._dataset, self._collate, self._share(*self._due))

    def _from_threads(self) -> Batch:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="lake-loader")
            # Not `__del__`: the threads must not keep the loader alive, nor outlive it.
            self._end_pool = weakref.finalize(self, self._pool.shutdown, wait=True, cancel_futures=True)
        while self._asked is not None and len(self._futures) < self._prefetch:
            positions = self._share(*self._asked)
            self._futures.append(self._pool.submit(_make, self._dataset, self._collate, positions))
            self._asked = self._settle(self._asked[0], self._asked[1] + 1)
            self._look_ahead(self._pool)
        due = self._futures[0]
        try:
            batch = due.result(self._timeout_s)
        except BaseException as error:
            if isinstance(error, TimeoutError) and not due.done():
                self._abandon()
                raise LakeError(
                    f"batch {self._due} did not come within {self._timeout_s:.0f} s: the store does not answer, or "
                    "`collate` hangs; see whether the lake can be read with `logitlake verify`"
                ) from None
            self.close()
            raise
        self._futures.popleft()
        return batch

    def _look_ahead(self, pool: ThreadPoolExecutor) -> None:
        """One batch was asked for: prepares two more, until `read_ahead` are; a batch that is due never waits long."""
        self._lead -= 1
        if self._lead < 0:
            self._ahead, self._lead = self._asked, 0
        for _ in range(2):
            if self._ahead is None or self._lead >= self._read_ahead:
                return
            epoch, step = self._ahead
            if self._prepared[0] != epoch:
                self._prepared = (epoch, set())
            positions = share(self._batches.epoch(epoch)[step], self._rank, self._world_size)
            groups = self._batches.layout.group_P[positions].tolist()
            new = [at for at, group in zip(positions.tolist(), groups, strict=True) if group not in self._prepared[1]]
            if new:
                self._prepared[1].update(groups)
                pool.submit(self._dataset.prepare, new)
            self._ahead, self._lead = self._settle(epoch, step + 1), self._lead + 1

    def _abandon(self) -> None:
        """As `close`, without waiting for a thread that hangs."""
        if self._pool is not None and self._end_pool is not None:
            self._end_pool.detach()
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._forget()

    def _forget(self) -> None:
        self._pool, self._end_pool = None, None
        self._futures.clear()
        self._asked = self._ahead = self._due
        self._lead, self._prepared = 0, (-1, set())

    def _share(self, epoch: int, step: int) -> list[int]:
        planned = self._batches.epoch(epoch)
        if planned.smallest() < self._world_size:
            raise ConfigError(
                f"loader: epoch {epoch} has a batch of {planned.smallest()} samples for {self._world_size} ranks: one "
                "would get nothing; use drop_last, larger batches or fewer ranks"
            )
        positions: list[int] = share(planned[step], self._rank, self._world_size).tolist()
        return positions

    def _settle(self, epoch: int, step: int) -> tuple[int, int] | None:
        """(epoch, step) with a step past the epoch's end turned into the next epoch's first one."""
        if self._epochs is not None and epoch >= self._epochs:
            return None
        num_steps = len(self._batches.epoch(epoch))
        if not 0 <= step <= num_steps:
            raise ConfigError(f"loader: epoch {epoch} has {num_steps} batches, got step {step}; was the lake another?")
        return (epoch, step) if step < num_steps else self._settle(epoch + 1, 0)


def _make(dataset: Fetches[Item], collate: Callable[[list[Item]], Batch], positions: list[int]) -> Batch:
    return collate(dataset.__getitems__(positions))
