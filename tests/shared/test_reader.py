"""Laws of the datasets: what was committed is what is read, in the order of the ids, from bounded memory."""

import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from logitlake_schemas import CaptureSpec
from logitlake_shared.errors import ConfigError, DataError, LakeCorruptError, LakeError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.reader.held import Held
from logitlake_shared.reader.loader import LakeLoader
from logitlake_shared.reader.order import epoch_order
from logitlake_shared.rows import LakeSample
from logitlake_shared.topk import decode

MakeUnit = Callable[..., UnitResult]

UNITS = (3, 1, 2)
SAMPLES_A_UNIT = 5
# Two samples of four tokens: units of five make three row groups each.
GROUP_TOKENS = 8
# As many as the research of the format used.
NUM_FLIPPED_BITS = 180


@pytest.fixture
def units(make_unit: MakeUnit) -> list[UnitResult]:
    """What `lake_dir` was made from, in the order of publication."""
    return [make_unit(number, num_samples=SAMPLES_A_UNIT) for number in UNITS]


@pytest.fixture
def lake_dir(
    tmp_path: Path,
    capture_spec: CaptureSpec,
    units: list[UnitResult],
    make_pair_unit: Callable[[int], UnitResult],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A lake with a cache of samples (three units of three row groups) and one of pairs (two units)."""
    monkeypatch.setattr("logitlake_shared.shards._GROUP_TOKENS", GROUP_TOKENS)
    root = tmp_path / "lake"
    lake = Lake.create(root)
    samples = lake.create_cache("main", capture_spec)
    pairs = lake.create_cache("pairs", capture_spec.model_copy(update={"kind": "pairs"}))
    for unit in units:
        samples.publish_unit(unit)
    for number in (1, 2):
        pairs.publish_unit(make_pair_unit(number))
    samples.snapshot()
    pairs.snapshot()
    return root


def assert_equal(item: LakeSample, expected: LakeSample, image: bytes) -> None:
    """Every field of a sample, its rows and its image."""
    assert item.images == (image,)
    for name, value in vars(expected).items():
        if name == "rows":
            for row_name, rows in vars(value).items():
                np.testing.assert_array_equal(getattr(item.rows, row_name), rows, err_msg=row_name)
        elif name != "images":
            np.testing.assert_array_equal(getattr(item, name), value, err_msg=name)


def all_items(dataset: LakeDataset) -> list[LakeSample]:
    return dataset.__getitems__(range(len(dataset)))


# ---- what is read ----


def test_items_come_by_id_and_equal_what_was_published(lake_dir: Path, units: list[UnitResult]) -> None:
    """The order is that of the ids whatever the commit order; every field, row and image is as published."""
    dataset = LakeDataset(lake_dir, "main")
    published = sorted(
        ((sample, unit.images[0].data) for unit in units for sample in unit.samples), key=lambda pair: pair[0].sample_id
    )
    assert len(dataset) == len(published) == 15
    assert dataset.ids() == [sample.sample_id for sample, _ in published]
    for item, (sample, image) in zip(all_items(dataset), published, strict=True):
        assert_equal(item, sample, image)
    np.testing.assert_array_equal(dataset.num_tokens, [len(sample.response_ids) for sample, _ in published])


def test_a_batch_is_its_items(lake_dir: Path) -> None:
    """`__getitems__` gives what indexing gives, in the asked order; positions count from the end as in a list."""
    dataset = LakeDataset(lake_dir, "main")
    positions = [11, 0, 7, 0, -1]
    assert [item.sample_id for item in dataset.__getitems__(positions)] == [dataset.ids()[place] for place in positions]
    assert [dataset[place].sample_id for place in positions] == [dataset.ids()[place] for place in positions]
    for outside in (15, -16):
        with pytest.raises(IndexError, match="of a dataset of 15"):
            dataset[outside]


def test_filters_by_split_and_task(lake_dir: Path) -> None:
    """Filters are exact; what selects nothing is refused with the filters named."""
    everything = all_items(LakeDataset(lake_dir, "main"))
    some = LakeDataset(lake_dir, "main", split="train", tasks=["caption"])
    expected = [item.sample_id for item in everything if item.split == "train" and item.task == "caption"]
    assert [item.sample_id for item in all_items(some)] == some.ids() == expected
    assert 0 < len(expected) < len(everything)
    with pytest.raises(DataError, match="tasks=\\['nothing'\\]"):
        LakeDataset(lake_dir, "main", tasks=["nothing"])
    with pytest.raises(LakeError, match="holds samples, expected pairs"):
        PairDataset(lake_dir, "main")
    with pytest.raises(LakeError, match="no cache 'mian'; caches in this lake: main, pairs"):
        LakeDataset(lake_dir, "mian")


def test_pairs_round_trip(lake_dir: Path, make_pair_unit: Callable[[int], UnitResult]) -> None:
    """Both responses, the teacher's logprobs and the image come back exactly."""
    dataset = PairDataset(lake_dir, "pairs")
    unit = make_pair_unit(1)
    for name, value in vars(unit.pairs[0]).items():
        if name != "images":
            np.testing.assert_array_equal(getattr(dataset[0], name), value, err_msg=name)
    assert dataset[0].images == (unit.images[0].data,)
    np.testing.assert_array_equal(dataset.num_tokens, [5, 5])


def test_a_reader_keeps_to_its_snapshot(lake_dir: Path, make_unit: MakeUnit) -> None:
    """What is committed or pinned later is not seen; an older snapshot can be asked for."""
    before = LakeDataset(lake_dir, "main")
    cache = Lake.open(lake_dir).cache("main")
    cache.publish_unit(make_unit(7))
    assert LakeDataset(lake_dir, "main").ids() == before.ids()
    cache.snapshot()
    assert len(LakeDataset(lake_dir, "main")) == len(before) + 2
    assert LakeDataset(lake_dir, "main", snapshot=1).ids() == before.ids()


# ---- memory ----


def test_arrays_are_views_that_cannot_be_written_to(lake_dir: Path) -> None:
    """A sample costs no copy: two readings of it share memory, and nobody can change what others see."""
    dataset = LakeDataset(lake_dir, "main")
    one, again = dataset[4], dataset[4]
    assert np.shares_memory(one.rows.topk_ids, again.rows.topk_ids)
    for array in (one.rows.topk_logprobs, one.rows.k_T, one.response_ids):
        assert not array.flags.writeable
    for array in decode([one.rows, again.rows]):
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_a_dataset_that_holds_nothing_reads_the_same(lake_dir: Path) -> None:
    """Memory is bounded by `held_bytes`, down to the row group in use; values do not depend on it."""
    for item, other in zip(
        all_items(LakeDataset(lake_dir, "main", held_bytes=0)), all_items(LakeDataset(lake_dir, "main")), strict=True
    ):
        assert_equal(item, other, other.images[0])


def test_held_bytes_are_bounded_and_the_oldest_leave() -> None:
    """Never more than the bound but for a single value that is larger; what was used last stays."""
    held = Held(100)
    made: list[str] = []

    def value(name: str, num_bytes: int) -> str:
        def make() -> tuple[str, int]:
            made.append(name)
            return name.upper(), num_bytes

        return held.get(name, make)

    assert [value("a", 40), value("b", 40), value("a", 40), value("c", 40)] == ["A", "B", "A", "C"]
    assert held.num_bytes == 80
    value("a", 40)
    assert made == ["a", "b", "c"], "b was used least recently"
    value("huge", 1000)
    assert held.num_bytes == 1000
    value("a", 40)
    assert made == ["a", "b", "c", "huge", "a"]
    assert held.num_bytes == 40


def test_a_value_is_made_once_for_all_threads_and_an_error_is_not_kept() -> None:
    """Eight threads at a barrier, one decoding; a failure is raised to its callers and tried again afterwards."""
    held, barrier, calls = Held(10**6), threading.Barrier(8), []

    def make() -> tuple[int, int]:
        calls.append(threading.get_ident())
        if len(calls) == 1:
            raise LakeCorruptError("the first one fails")
        return 7, 1

    with pytest.raises(LakeCorruptError):
        held.get("key", make)

    def ask(_: int) -> int:
        barrier.wait()
        return held.get("key", make)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [7] * 8
    assert len(calls) == 2


# ---- faults ----


def shards_of(lake_dir: Path) -> list[Path]:
    return sorted(lake_dir.glob("caches/main/shards/*.parquet"))


def read_everything(lake_dir: Path) -> list[LakeSample]:
    return all_items(LakeDataset(lake_dir, "main"))


def test_every_flipped_bit_of_a_shard_is_caught(lake_dir: Path) -> None:
    """A bit anywhere in a shard of rows: an error before the first row of that shard, never a wrong row."""
    shard = shards_of(lake_dir)[0]
    good = shard.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(good), NUM_FLIPPED_BITS):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(generator.integers(8))
        shard.write_bytes(bytes(damaged))
        with pytest.raises(LakeError):
            read_everything(lake_dir)
    shard.write_bytes(good)
    assert len(read_everything(lake_dir)) == 15


@pytest.mark.parametrize("damage", ["cut", "empty", "zeroed tail", "junk", "twice", "other", "missing"])
def test_a_damaged_shard_is_refused_by_name(lake_dir: Path, damage: str) -> None:
    """Cut short, empty, overwritten, joined with itself or with junk, swapped for another one, gone."""
    shard, other, *_ = shards_of(lake_dir)
    good = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "other":
        shutil.copy(other, shard)
    else:
        shard.write_bytes(
            {
                "cut": good[:-100],
                "empty": b"",
                "zeroed tail": good[:-100] + bytes(100),
                "junk": good + b"junk",
                "twice": good + good,
            }[damage]
        )
    with pytest.raises(LakeError, match=shard.name):
        read_everything(lake_dir)


def test_a_swapped_shard_is_refused_even_where_a_filter_takes_none_of_its_rows(lake_dir: Path) -> None:
    """Rows cannot vanish because another shard lies in the place of theirs."""
    train, test = shards_of(lake_dir)[:2]  # unit 1 is of split train, unit 2 of split test
    shutil.copy(test, train)
    with pytest.raises(LakeCorruptError, match=train.name):
        LakeDataset(lake_dir, "main", split="train")


def test_a_shard_that_changes_under_a_reader_is_caught(lake_dir: Path) -> None:
    """A shard is hashed once, and again when the file is another one: a new reader does not trust an old look."""
    read_everything(lake_dir)
    shard = shards_of(lake_dir)[0]
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    building = shard.with_suffix(".new")
    building.write_bytes(bytes(damaged))
    building.replace(shard)
    with pytest.raises(LakeError, match=shard.name):
        read_everything(lake_dir)


def test_a_bad_shard_in_the_middle_of_an_epoch_names_its_items(lake_dir: Path) -> None:
    """Batches before it are delivered; then the error says which shard, row group and items."""
    dataset = LakeDataset(lake_dir, "main", held_bytes=0)
    shard = shards_of(lake_dir)[1]  # samples 20 to 24, in groups of two
    shard.unlink()
    seen: list[str] = []

    def note(samples: list[LakeSample]) -> None:
        seen.extend(sample.sample_id for sample in samples)

    loader = LakeLoader(dataset, dataset.batches(seed=0, batch_size=1), note, num_threads=1, prefetch=1, epochs=1)
    named = r"committed but missing.*items, sample-002\d to sample-002\d"
    with loader, pytest.raises(LakeCorruptError, match=named) as caught:
        list(loader)
    assert shard.name in str(caught.value)
    order = [dataset.ids()[place] for place in epoch_order(dataset.layout, 0, 0)]
    assert seen == order[: len(seen)]
    assert order[len(seen)].startswith("sample-002")


def test_an_image_that_its_unit_does_not_hold_is_an_error(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit
) -> None:
    """The row names the image, the message names both."""
    unit = make_unit(1)
    cache = Lake.create(tmp_path / "lake").create_cache("main", capture_spec)
    cache.publish_unit(UnitResult(unit="bare", samples=unit.samples))
    cache.snapshot()
    with pytest.raises(LakeCorruptError, match=f"names image {unit.images[0].image_sha256}"):
        LakeDataset(tmp_path / "lake", "main")[0]


# ---- processes and threads ----


def _ids_read(dataset: LakeDataset, queue: Any) -> None:
    queue.put([item.sample_id for item in all_items(dataset)])


def test_a_dataset_survives_fork_and_pickling(lake_dir: Path) -> None:
    """A DataLoader's worker process opens its own files: what the parent holds or has locked does not matter."""
    dataset = LakeDataset(lake_dir, "main")
    all_items(dataset)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_ids_read, args=(dataset, queue))
    child.start()
    assert queue.get(timeout=60) == dataset.ids()
    child.join(60)
    assert child.exitcode == 0
    sent = pickle.loads(pickle.dumps(dataset))
    assert [item.sample_id for item in all_items(sent)] == dataset.ids()


def test_closing_leaves_no_file_open(lake_dir: Path) -> None:
    """After `close` the process holds no shard; the dataset may be used again."""
    dataset = LakeDataset(lake_dir, "main")
    all_items(dataset)
    dataset.close()
    targets = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [target for target in targets if target.is_relative_to(lake_dir)]
    assert dataset[0].sample_id == dataset.ids()[0]
    dataset.close()


def test_batches_from_a_lake_do_not_depend_on_threads(lake_dir: Path) -> None:
    """The tensors' numbers, batch by batch, with one thread and with four, and with row groups shared among batches."""

    def batch_of(samples: list[LakeSample]) -> tuple[Any, ...]:
        return (*decode([sample.rows for sample in samples]), [sample.sample_id for sample in samples])

    def run(num_threads: int) -> list[tuple[Any, ...]]:
        dataset = LakeDataset(lake_dir, "main", held_bytes=2000)
        batches = dataset.batches(seed=1, batch_size=4, by_length=True)
        with LakeLoader(dataset, batches, batch_of, num_threads=num_threads, epochs=2) as loader:
            return list(loader)

    for one, four in zip(run(1), run(4), strict=True):
        assert one[3] == four[3]
        for left, right in zip(one[:3], four[:3], strict=True):
            np.testing.assert_array_equal(left, right)


# ---- Arrow ----


@pytest.mark.parametrize("split", [None, "train"])
def test_record_batches_are_the_rows(lake_dir: Path, split: str | None) -> None:
    """In any order: each row once, equal to the item of its position, under the declared schema."""
    dataset = LakeDataset(lake_dir, "main", split=split)
    drawn = epoch_order(dataset.layout, 3, 0)
    columns = ["sample_id", "topk_ids", "entropy"]
    expected = {item.sample_id: item for item in all_items(dataset)}
    for order, ids in (
        ("id", dataset.ids()),
        (drawn, [dataset.ids()[place] for place in drawn]),
        ("stored", None),
    ):
        batches = list(dataset.iter_arrow(columns, order=order, batch_rows=4))  # type: ignore[arg-type]
        table = pa.Table.from_batches(batches, dataset.arrow_schema(columns))
        read = table.column("sample_id").to_pylist()
        assert read == ids if ids is not None else sorted(read) == dataset.ids()
        for row in table.to_pylist():
            assert row["topk_ids"] == expected[row["sample_id"]].rows.topk_ids.tolist()
            assert row["entropy"] == expected[row["sample_id"]].rows.entropy_T.tolist()


def test_all_columns_come_under_the_declared_schema(lake_dir: Path) -> None:
    """A record batch reader of the whole snapshot is what other tools take."""
    for dataset in (LakeDataset(lake_dir, "main"), PairDataset(lake_dir, "pairs")):
        reader = pa.RecordBatchReader.from_batches(dataset.arrow_schema(), dataset.iter_arrow())
        assert reader.read_all().num_rows == len(dataset)
    with pytest.raises(ConfigError, match="no column topk; samples have sample_id, task"):
        LakeDataset(lake_dir, "main").iter_arrow(["topk"])
