"""Laws of an epoch's order and of its batches: functions of snapshot, seed and epoch, and of nothing else."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitlake_shared.errors import ConfigError
from logitlake_shared.reader.batches import Batches, share
from logitlake_shared.reader.order import Layout, epoch_order, epoch_windows

# Two orders of 60 items or more share about one place by chance; a tenth of them would be a broken shuffle.
MOST_SHARED = 0.1


def made_layout(num_items: int, num_groups: int, window_tokens: int | None, seed: int = 0) -> Layout:
    """Items with 1 to 9 tokens, scattered over the groups."""
    generator = np.random.default_rng(seed)
    return Layout(
        generator.integers(0, num_groups, num_items).astype(np.int32),
        generator.integers(1, 10, num_items).astype(np.int32),
        window_tokens,
    )


layouts = st.builds(
    made_layout,
    num_items=st.integers(1, 80),
    num_groups=st.integers(1, 12),
    window_tokens=st.one_of(st.none(), st.integers(1, 400)),
    seed=st.integers(0, 1000),
)


# ---- the order ----


@given(layout=layouts, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**31))
def test_every_item_once(layout: Layout, seed: int, epoch: int) -> None:
    """Whatever the groups and the window, an epoch is a permutation."""
    assert sorted(epoch_order(layout, seed, epoch)) == list(range(len(layout)))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 0), (7, 3)])
@pytest.mark.parametrize("num_items", [1, 5, 100])
def test_one_window_is_the_permutation_of_all_positions(num_items: int, seed: int, epoch: int) -> None:
    """A small lake is shuffled as a whole, by the plain permutation of (seed, epoch): training runs rely on it."""
    expected = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_items)
    np.testing.assert_array_equal(epoch_order(made_layout(num_items, 4, None), seed, epoch), expected)
    np.testing.assert_array_equal(epoch_order(made_layout(num_items, 4, 10_000), seed, epoch), expected)


@given(layout=layouts)
def test_a_window_holds_whole_groups_and_a_bounded_number_of_tokens(layout: Layout) -> None:
    """No group is decoded for two windows, and a window is over its size by less than one group."""
    windows = epoch_windows(layout, seed=1, epoch=0)
    seen: set[int] = set()
    biggest = max(np.bincount(layout.group_P, weights=layout.num_tokens_P))
    for window in windows:
        groups = set(layout.group_P[window].tolist())
        assert not groups & seen
        seen |= groups
        if layout.window_tokens is not None:
            assert layout.num_tokens_P[window].sum() < layout.window_tokens + biggest


@pytest.mark.parametrize("window_tokens", [None, 60])
def test_other_seed_or_epoch_other_order(window_tokens: int | None) -> None:
    """Orders of different epochs and seeds have next to nothing in common; the same ones are the same."""
    layout = made_layout(120, 20, window_tokens)
    orders = {(seed, epoch): epoch_order(layout, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    for key, order in orders.items():
        np.testing.assert_array_equal(epoch_order(layout, *key), order)
        for other, its_order in orders.items():
            assert other == key or (order == its_order).mean() < MOST_SHARED


def test_groups_far_apart_meet_in_a_window() -> None:
    """The groups are permuted before they are cut into windows: a window is not a stretch of the lake."""
    layout = Layout(np.repeat(np.arange(40), 10).astype(np.int32), np.ones(400, np.int32), window_tokens=80)
    for window in epoch_windows(layout, seed=0, epoch=0):
        groups = np.unique(layout.group_P[window])
        assert len(groups) == 8
        assert groups.max() - groups.min() > len(groups)


def test_only_the_order_of_group_numbers_counts() -> None:
    """A filter that leaves gaps in the numbers of the groups changes nothing else."""
    layout = made_layout(50, 6, 30)
    spread = Layout(layout.group_P * 1000 + 17, layout.num_tokens_P, 30)
    np.testing.assert_array_equal(epoch_order(layout, 2, 3), epoch_order(spread, 2, 3))


def test_what_cannot_be_ordered_is_refused() -> None:
    """Negative seeds and epochs, windows of nothing, lengths for other items."""
    with pytest.raises(ConfigError, match="seed -1"):
        epoch_order(made_layout(3, 1, None), -1, 0)
    with pytest.raises(ConfigError, match="window of at least 1 token, got 0"):
        made_layout(3, 1, 0)
    with pytest.raises(ConfigError, match=r"\(2,\) and \(3,\)"):
        Layout(np.zeros(2, np.int32), np.zeros(3, np.int32))


# ---- batches ----


@given(
    layout=layouts,
    sizes=st.one_of(
        st.fixed_dictionaries({"batch_size": st.integers(1, 30)}),
        st.fixed_dictionaries({"max_tokens": st.integers(9, 90)}),
    ),
    by_length=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_every_sample_in_one_batch_of_an_epoch(
    layout: Layout, sizes: dict[str, int], by_length: bool, epoch: int
) -> None:
    """By samples or by tokens, with or without buckets: each sample once, no batch empty or over its size."""
    batches = Batches(layout, seed=3, by_length=by_length, **sizes).epoch(epoch)
    assert Counter(np.concatenate(list(batches)).tolist()) == Counter(range(len(layout)))
    for batch in batches:
        assert 0 < len(batch) <= sizes.get("batch_size", len(layout))
        if "max_tokens" in sizes:
            assert len(batch) * layout.num_tokens_P[batch].max() <= sizes["max_tokens"]
    if "batch_size" in sizes:
        assert sum(len(batch) < sizes["batch_size"] for batch in batches) <= 1
        assert len(batches) == -(-len(layout) // sizes["batch_size"])


@given(layout=layouts, world_size=st.integers(1, 5))
def test_the_ranks_together_see_the_same_batch(layout: Layout, world_size: int) -> None:
    """The union over the ranks of step n is batch n, whatever the world size, in shares that differ by one at most."""
    for batch in Batches(layout, seed=1, batch_size=7, by_length=True).epoch(2):
        shares = [share(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_buckets_batches_are_the_order_cut() -> None:
    """Batch n is the n-th stretch of the epoch's order."""
    layout = made_layout(50, 5, 60)
    batches = Batches(layout, seed=4, batch_size=8)
    np.testing.assert_array_equal(np.concatenate(list(batches.epoch(1))), epoch_order(layout, 4, 1))


def test_a_batch_by_length_has_similar_lengths_and_new_mates_each_epoch() -> None:
    """Padding shrinks several times against batches that are drawn freely, and the batches change with the epoch."""
    lengths = np.random.default_rng(0).integers(1, 500, 600).astype(np.int32)
    layout = Layout(np.repeat(np.arange(12), 50).astype(np.int32), lengths)

    def padding(by_length: bool) -> int:
        batches = Batches(layout, seed=0, batch_size=8, by_length=by_length).epoch(0)
        return sum(int(len(batch) * lengths[batch].max() - lengths[batch].sum()) for batch in batches)

    # 600 lengths over a range of 500: neighbours of 8 span about 500/75, free batches most of the range.
    assert padding(True) * 10 < padding(False)
    batches = Batches(layout, seed=0, batch_size=8, by_length=True)
    mates = [{frozenset(batch.tolist()) for batch in batches.epoch(epoch)} for epoch in (0, 1)]
    assert mates[0] != mates[1]
    first = [int(lengths[batch].max()) for batch in batches.epoch(0)]
    assert first != sorted(first), "the batches of a window must come in a drawn order, not by length"


def test_drop_last_leaves_out_the_one_short_batch() -> None:
    """Every batch is full; at most batch_size - 1 samples are not seen."""
    layout = made_layout(50, 5, 60)
    for by_length in (False, True):
        batches = list(Batches(layout, seed=0, batch_size=8, by_length=by_length, drop_last=True).epoch(0))
        assert [len(batch) for batch in batches] == [8] * 6
        assert len(set(np.concatenate(batches).tolist())) == 48


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give batch_size or max_tokens"),
        ({"batch_size": 2, "max_tokens": 2}, "give batch_size or max_tokens"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_tokens": 8}, r"item \d+ has 9 response tokens, over max_tokens=8"),
        ({"batch_size": 100, "drop_last": True}, "drop_last leaves no batch"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, int], message: str) -> None:
    """Before anything is read."""
    with pytest.raises(ConfigError, match=message):
        Batches(made_layout(50, 5, None), seed=0, **settings)  # type: ignore[arg-type]
