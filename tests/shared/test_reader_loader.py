"""Laws of the loader: one order whatever the threads, errors where they are due, no thread left behind."""

import gc
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from logitlake_shared.errors import ConfigError, LakeCorruptError, LakeError
from logitlake_shared.reader.batches import Batches, share
from logitlake_shared.reader.loader import LakeLoader
from logitlake_shared.reader.order import Layout

LAYOUT = Layout(np.repeat(np.arange(5), 10).astype(np.int32), np.full(50, 3, np.int32), window_tokens=60)


class Numbers:
    """A dataset of its own positions; counts what is being fetched, and fails where it is told to."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad, self.fetched = bad, 0
        self.prepared: list[int] = []

    def __getitems__(self, positions: Sequence[int]) -> list[int]:
        self.fetched += 1
        if self.bad in positions:
            raise LakeCorruptError(f"position {self.bad} is bad")
        return [int(position) for position in positions]

    def prepare(self, positions: Sequence[int]) -> None:
        self.prepared += positions


def batches(batch_size: int = 8) -> Batches:
    """Seven batches an epoch, the last of two."""
    return Batches(LAYOUT, seed=5, batch_size=batch_size)


def loader_threads() -> list[threading.Thread]:
    """The loaders' threads that live now."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("lake-loader")]


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 1), (1, 1), (2, 4), (4, 9)])
def test_the_order_does_not_depend_on_threads(num_threads: int, prefetch: int) -> None:
    """Two epochs, batch by batch, are those of the plan."""
    planned = batches()
    expected = [batch.tolist() for epoch in (0, 1) for batch in planned.epoch(epoch)]
    with LakeLoader(Numbers(), planned, list, num_threads=num_threads, prefetch=prefetch, epochs=2) as loader:
        assert list(loader) == expected
        assert loader.state == (2, 0)
        assert list(loader) == []


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 6, 7, 10])
def test_a_resumed_loader_repeats_what_was_not_seen(num_threads: int, stop: int) -> None:
    """`state` is enough: no batch twice, none left out, and nothing before it is read again."""
    with LakeLoader(Numbers(), batches(), list, num_threads=num_threads, epochs=2) as loader:
        seen = [next(loader) for _ in range(stop)]
        state = loader.state
    dataset = Numbers()
    with LakeLoader(dataset, batches(), list, num_threads=num_threads, epochs=2, start=state) as resumed:
        rest = list(resumed)
    assert dataset.fetched == len(rest)
    assert seen + rest == [batch.tolist() for epoch in (0, 1) for batch in batches().epoch(epoch)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_of_any_world_share_one_batch(world_size: int) -> None:
    """Step n of all ranks together is batch n of the plan, also when the world size changed at a restart."""
    loaders = [
        LakeLoader(Numbers(), batches(10), list, rank=rank, world_size=world_size, epochs=1, start=(0, 2))
        for rank in range(world_size)
    ]
    for step, parts in enumerate(zip(*loaders, strict=True), start=2):
        planned = batches(10).epoch(0)[step]
        assert sorted(position for part in parts for position in part) == sorted(planned.tolist())
        assert parts == tuple(share(planned, rank, world_size).tolist() for rank in range(world_size))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_is_raised_where_its_batch_is_due(num_threads: int) -> None:
    """The batches before the bad one are delivered; then its error comes, again when asked again, and no hang."""
    expected = [batch.tolist() for batch in batches().epoch(0)]
    dataset = Numbers(bad=expected[3][5])
    with LakeLoader(dataset, batches(), list, num_threads=num_threads, prefetch=6, epochs=1) as loader:
        assert [next(loader) for _ in range(3)] == expected[:3]
        for _ in range(2):
            with pytest.raises(LakeCorruptError, match="is bad"):
                next(loader)
            assert loader.state == (0, 3)
        dataset.bad = None  # what was wrong is repaired
        assert list(loader) == expected[3:]


def test_what_is_read_ahead_is_bounded() -> None:
    """Only `prefetch` batches are asked for before one is taken."""
    dataset = Numbers()
    with LakeLoader(dataset, batches(), list, num_threads=2, prefetch=3) as loader:
        next(loader)
    # Closing waits for what was begun: the first batch and the two asked for with it.
    assert dataset.fetched <= 3


def test_every_row_group_is_prepared_before_its_window_and_once_an_epoch() -> None:
    """The groups of the next `read_ahead` batches are asked for, each once, also across the end of an epoch."""
    dataset, planned = Numbers(), batches(1)
    with LakeLoader(dataset, planned, list, num_threads=1, read_ahead=12, epochs=2) as loader:
        seen = [next(loader)[0] for _ in range(60)]
    groups = LAYOUT.group_P[dataset.prepared].tolist()
    first, second = groups[:5], groups[5:]
    assert sorted(first) == list(range(5))
    assert len(set(second)) == len(second)
    assert set(LAYOUT.group_P[seen[50:]]) <= set(second)
    silent = Numbers()
    with LakeLoader(silent, batches(), list, read_ahead=0, epochs=1) as loader:
        assert len(list(loader)) == 7
    assert not silent.prepared


def test_no_thread_is_left() -> None:
    """After the end, after close, after a break that forgets the loader, and after an error."""
    with LakeLoader(Numbers(), batches(), list, epochs=1) as loader:
        list(loader)
    assert not loader_threads()
    loader = LakeLoader(Numbers(), batches(), list)
    next(loader)
    loader.close()
    assert not loader_threads()
    assert next(loader) == batches().epoch(0)[1].tolist()  # it may be used again
    del loader
    gc.collect()
    assert not loader_threads()
    bad = LakeLoader(Numbers(bad=0), batches(50), list)
    with pytest.raises(LakeCorruptError):
        next(bad)
    assert not loader_threads()


def test_a_batch_that_does_not_come_is_an_error() -> None:
    """A store that does not answer ends in an error that names the batch, not in a hang."""
    answer = threading.Event()

    class Silent(Numbers):
        def __getitems__(self, positions: Sequence[int]) -> list[int]:
            assert answer.wait(60)
            return super().__getitems__(positions)

    loader = LakeLoader(Silent(), batches(), list, timeout_s=0.01)
    try:
        with pytest.raises(LakeError, match=r"batch \(0, 0\) did not come within"):
            next(loader)
    finally:
        answer.set()
    for thread in loader_threads():
        thread.join(60)
    assert not loader_threads()


def test_settings_that_contradict_are_refused() -> None:
    """Ranks outside the world, no room to read ahead, a step that the epoch does not have, ranks without a sample."""
    with pytest.raises(ConfigError, match="rank from 0 to 1, got 2"):
        LakeLoader(Numbers(), batches(), list, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="prefetch >= 1"):
        LakeLoader(Numbers(), batches(), list, prefetch=0)
    with pytest.raises(ConfigError, match="epoch 1 has 7 batches, got step 9"):
        LakeLoader(Numbers(), batches(), list, start=(1, 9))
    with pytest.raises(ConfigError, match="a batch of 2 samples for 3 ranks"):
        next(LakeLoader(Numbers(), batches(), list, rank=0, world_size=3))
