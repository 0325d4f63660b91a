"""One contract for the readers, three stores: a local folder, memory, and S3 (moto's server on loopback).

An object store's shards are read from local copies: fetched once, verified, bounded, shared by processes.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from logitlake_schemas import CaptureSpec, sha256_hex
from logitlake_shared.errors import ConfigError, LakeCorruptError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_shared.reader.loader import LakeLoader
from logitlake_shared.reader.shard_copies import FOLDER_VARIABLE, ShardCopies, default_folder
from logitlake_shared.rows import LakeSample
from logitlake_shared.store import ObjectStore

UNITS = (3, 1, 2)


@pytest.fixture
def units(make_unit: Callable[..., UnitResult]) -> list[UnitResult]:
    """What `lake` holds."""
    return [make_unit(number, num_samples=3) for number in UNITS]


@pytest.fixture
def lake(store: ObjectStore, capture_spec: CaptureSpec, units: list[UnitResult]) -> Lake:
    """A lake of three units with an image each."""
    lake = _create(store)
    cache = lake.create_cache("main", capture_spec)
    for unit in units:
        cache.publish_unit(unit)
    cache.snapshot()
    return lake


def _create(store: ObjectStore) -> Lake:
    from logitlake_schemas import LakeManifest, layout

    store.put_new(layout.LAKE_MANIFEST, LakeManifest().to_bytes())
    return Lake.of(store)


def read_all(dataset: LakeDataset) -> list[LakeSample]:
    return dataset.__getitems__(range(len(dataset)))


def damage(store: ObjectStore, kind: str = "shards") -> str:
    """Flips a bit in the middle of the first shard of rows (or images), behind the lake's back; its name."""
    name = store.names(f"caches/main/{kind}")[0]
    data = bytearray(store.get(name) or b"")
    data[len(data) // 2] ^= 4
    store.overwrite(name, bytes(data))
    return name


# ---- any store ----


def test_what_was_published_is_what_is_read(lake: Lake, units: list[UnitResult], tmp_path: Path) -> None:
    """Ids, order, rows and images are the same on every store."""
    dataset = LakeDataset(lake, "main", copies=_copies(lake, tmp_path))
    published = sorted(
        ((sample, unit.images[0].data) for unit in units for sample in unit.samples), key=lambda pair: pair[0].sample_id
    )
    for item, (sample, image) in zip(read_all(dataset), published, strict=True):
        assert item.sample_id == sample.sample_id
        assert item.images == (image,)
        for name, value in vars(sample.rows).items():
            np.testing.assert_array_equal(getattr(item.rows, name), value, err_msg=name)


def test_the_order_of_batches_is_the_snapshots(lake: Lake, tmp_path: Path) -> None:
    """Threads and copies do not change it; a resumed loader goes on where the other one stopped."""
    dataset = LakeDataset(lake, "main", copies=_copies(lake, tmp_path), held_bytes=0)
    batches = dataset.batches(seed=2, batch_size=2)
    ids, expected = dataset.ids(), [batch.tolist() for batch in batches.epoch(0)]

    def names(samples: list[LakeSample]) -> list[str]:
        return [sample.sample_id for sample in samples]

    with LakeLoader(dataset, batches, names, epochs=1) as loader:
        seen = [next(loader), next(loader)]
    with LakeLoader(dataset, batches, names, epochs=1, start=loader.state, num_threads=3) as resumed:
        seen += list(resumed)
    assert seen == [[ids[place] for place in batch] for batch in expected]


@pytest.mark.parametrize("kind", ["shards", "images"])
def test_damage_in_the_store_is_refused(lake: Lake, tmp_path: Path, kind: str) -> None:
    """Not a row (or an image) of the damaged shard is delivered; the message names it."""
    name = damage(lake.store, kind)
    with pytest.raises(LakeCorruptError, match=name.rsplit("/", 1)[-1]):
        read_all(LakeDataset(lake, "main", copies=_copies(lake, tmp_path)))


def _copies(lake: Lake, tmp_path: Path) -> ShardCopies | None:
    return ShardCopies(tmp_path / "copies") if lake.store.root is None else None


# ---- local copies of an object store's shards ----

remote_stores = pytest.mark.parametrize("store", ["memory", "s3"], indirect=True)


@remote_stores
def test_a_shard_is_fetched_once_and_then_read_locally(lake: Lake, tmp_path: Path) -> None:
    """With its copies in the folder, another dataset reads rows that the store no longer gives."""
    copies = ShardCopies(tmp_path / "copies")
    first = [sample.sample_id for sample in read_all(LakeDataset(lake, "main", copies=copies))]
    later = LakeDataset(lake, "main", copies=ShardCopies(tmp_path / "copies"))
    for kind in ("shards", "images"):
        for name in lake.store.names(f"caches/main/{kind}"):
            lake.store.delete(name)
    assert [sample.sample_id for sample in read_all(later)] == first


@remote_stores
def test_a_rotten_copy_is_fetched_again(lake: Lake, tmp_path: Path) -> None:
    """A copy whose bytes changed on the local disk, or that was cut short, is not used."""
    expected = read_all(LakeDataset(lake, "main", copies=ShardCopies(tmp_path / "copies")))
    first, second, *_ = sorted((tmp_path / "copies").glob("*.parquet"))
    first.write_bytes(bytes(first.stat().st_size))
    second.write_bytes(second.read_bytes()[:-10])
    again = read_all(LakeDataset(lake, "main", copies=ShardCopies(tmp_path / "copies")))
    for one, other in zip(expected, again, strict=True):
        np.testing.assert_array_equal(one.rows.topk_logprobs, other.rows.topk_logprobs)
        assert one.images == other.images


@remote_stores
def test_copies_are_bounded_and_the_least_recently_used_leave(lake: Lake, tmp_path: Path) -> None:
    """However many shards are read, the folder holds at most its bytes, and everything is still read right."""
    commits = lake.cache("main").open_snapshot().commits
    entries = [entry for commit in commits for entry in commit.shards]
    largest = max(entry.bytes for entry in entries)
    copies = ShardCopies(tmp_path / "copies", max_bytes=2 * largest)
    assert sum(entry.bytes for entry in entries) > 2 * largest
    assert len(read_all(LakeDataset(lake, "main", copies=copies, held_bytes=0))) == 9
    held = list((tmp_path / "copies").glob("*.parquet"))
    assert 0 < sum(path.stat().st_size for path in held) <= 2 * largest
    one, two, *_ = entries
    copies = ShardCopies(tmp_path / "others", max_bytes=one.bytes + two.bytes)
    paths = [copies.folder / f"{entry.sha256}.parquet" for entry in (one, two)]
    unread = copies.open(lake.store, two)
    copies.open(lake.store, one).close()
    os.utime(paths[0], ns=(1, 1))
    os.utime(paths[1], ns=(2, 2))
    copies.open(lake.store, one).close()  # used again
    copies.open(lake.store, max(entries[2:], key=lambda entry: entry.bytes)).close()
    assert not paths[1].exists()
    with unread:
        assert sha256_hex(unread.read()) == two.sha256, "what is open stays readable"


@remote_stores
def test_threads_and_datasets_share_one_copy(lake: Lake, tmp_path: Path) -> None:
    """Many threads that want one shard get the same copy, complete."""
    (entry, *_) = lake.cache("main").open_snapshot().commits[0].shards
    copies = ShardCopies(tmp_path / "copies")
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: copies.open(lake.store, entry), range(16)))
    for file in files:
        with file:
            assert sha256_hex(file.read()) == entry.sha256
    assert [path.stat().st_size for path in copies.folder.glob("*.parquet")] == [entry.bytes]
    assert not list((tmp_path / "copies").glob(".*[0-9]")), "nothing half written is left"


_READ = """
import sys
from logitlake_shared.reader import LakeDataset
from logitlake_shared.reader.shard_copies import ShardCopies
dataset = LakeDataset(sys.argv[1], "main", copies=ShardCopies(sys.argv[2], max_bytes=int(sys.argv[3])), held_bytes=0)
for _ in range(5):
    print([sample.sample_id for sample in dataset.__getitems__(range(len(dataset)))])
"""


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_processes_share_a_folder_that_is_too_small(lake: Lake, tmp_path: Path) -> None:
    """Three processes that evict each other's copies all read everything."""
    arguments = [sys.executable, "-c", _READ, lake.store.uri, str(tmp_path / "copies"), "1"]
    expected = f"{LakeDataset(lake, 'main', copies=ShardCopies(tmp_path / 'own')).ids()}\n" * 5
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)) for _ in range(3)
        ]
        finished = [(process.communicate(timeout=120)[0], process.returncode) for process in processes]
    assert finished == [(expected, 0)] * 3


def test_the_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment for a whole machine; one that cannot be made is refused with the way out."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "here"))
    assert ShardCopies().folder == default_folder() == tmp_path / "here"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=FOLDER_VARIABLE):
        ShardCopies(tmp_path / "file" / "below")
