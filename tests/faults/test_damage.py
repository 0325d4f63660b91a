"""A7-A10: a shard whose bytes are not the bytes that were committed reaches no reader, and its unit can be healed.

The damaged file always takes the place of the good one under its name, which is what a bad disk, a bad copy or a
mistaken person makes of a lake.
"""

import re
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from tests.faults.conftest import Bench
from tests.faults.laws import assert_nothing_torn, findings

from logitlake_schemas import ShardEntry
from logitlake_shared.cli import cli
from logitlake_shared.errors import LakeCorruptError, LakeError
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset
from logitlake_shared.tools.verify import quarantine_damaged

Damage = Callable[[bytes, bytes], bytes]


def _footer_bytes(good: bytes) -> int:
    return 8 + int.from_bytes(good[-8:-4], "little")


# What becomes of a shard, given its good bytes and those of another unit's shard of the same kind.
DAMAGES: dict[str, Damage] = {
    "empty": lambda _good, _other: b"",
    "first half": lambda good, _other: good[: len(good) // 2],
    "one byte short": lambda good, _other: good[:-1],
    "footer cut": lambda good, _other: good[: -_footer_bytes(good)],
    "zeroed tail": lambda good, _other: good[:-512] + bytes(512),
    "zeroed page": lambda good, _other: good[:64] + bytes(64) + good[128:],
    "two files in one": lambda good, other: good + other,
    "the same file twice": lambda good, _other: good + good,
    "trailing junk": lambda good, _other: good + b"junk",
    "leading junk": lambda good, _other: b"PAR1" + good,
    "another unit's shard": lambda _good, other: other,
    "no Parquet at all": lambda _good, _other: b"<html>404</html>",
}
FLIPS_OF_A_KIND = 90


@pytest.fixture
def lake(bench: Bench) -> Bench:
    """A finished capture."""
    assert bench.run("capture").ended == "done"
    return bench


@pytest.mark.parametrize("kind", ["samples", "images"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused_and_healed(lake: Bench, kind: str, damage: str) -> None:
    """No reader gets a row of it, `verify` names it, repair returns the unit, the next capture heals the lake."""
    entry, other = _entries(lake.root, kind)
    good = (lake.root / entry.path).read_bytes()
    _replace(lake.root / entry.path, DAMAGES[damage](good, (lake.root / other.path).read_bytes()))
    _assert_refused(lake.root)
    told = CliRunner().invoke(cli, ["verify", str(lake.root)])
    assert isinstance(told.exception, LakeCorruptError)
    assert entry.path in told.output
    found = findings(lake.root)
    assert {finding.unit for finding in found} == {"000001-test"}
    assert quarantine_damaged(Lake.open(lake.root), found) == {"main": ["000001-test"]}
    assert LakeDataset(lake.root, "main").ids() == ["sample-0020", "sample-0021"]
    assert lake.run("capture").ended == "done"
    assert findings(lake.root) == []
    assert (lake.root / entry.path).read_bytes() == good
    assert len(LakeDataset(lake.root, "main")) == 4
    assert_nothing_torn(lake.root, ["000001-test", "000002-test"], [1, 2, 3])


@pytest.mark.parametrize("kind", ["samples", "images"])
def test_a_missing_shard_is_named(lake: Bench, kind: str) -> None:
    """A committed file that is gone is an error that names it."""
    entry, _ = _entries(lake.root, kind)
    (lake.root / entry.path).unlink()
    with pytest.raises(LakeCorruptError, match=f"{re.escape(entry.path)}: committed but missing"):
        _read_all(lake.root)
    assert entry.path in {finding.path for finding in findings(lake.root)}


@pytest.mark.parametrize("seed", range(FLIPS_OF_A_KIND))
@pytest.mark.parametrize("kind", ["samples", "images"])
def test_a_flipped_bit(lake: Bench, kind: str, seed: int) -> None:
    """One bit of a shard: the reader and `verify` refuse it always; the page checksums alone give no other row."""
    entry, _ = _entries(lake.root, kind)
    path = lake.root / entry.path
    cache = Lake.open(lake.root).cache("main")
    good, rows = path.read_bytes(), cache.read(entry)
    index = cache.index(entry) if kind == "samples" else None
    generator = np.random.default_rng(seed)
    place, bit = int(generator.integers(len(good))), int(generator.integers(8))
    _replace(path, good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
    _assert_refused(lake.root)
    assert entry.path in {finding.path for finding in findings(lake.root)}
    with suppress(LakeError), closing(cache.open(entry, verify=False)) as shard:
        assert shard.read().equals(rows)
    if index is not None:
        with suppress(LakeError):
            assert cache.index(entry).equals(index)


def _entries(root: Path, kind: str) -> tuple[ShardEntry, ShardEntry]:
    """The first unit's shard of a kind, and the second's."""
    first, second = (
        entry
        for commit in Lake.open(root).cache("main").open_snapshot(1).commits
        for entry in commit.shards
        if entry.kind == kind
    )
    return first, second


def _replace(path: Path, data: bytes) -> None:
    """A new file under the old name, as a copy gone wrong leaves it."""
    damaged = path.with_name("damaged")
    damaged.write_bytes(data)
    damaged.replace(path)


def _assert_refused(root: Path) -> None:
    with pytest.raises(LakeCorruptError, match="000001-test"):
        _read_all(root)


def _read_all(root: Path) -> list[pa.RecordBatch]:
    """Every row by both roads of a dataset, with its images."""
    dataset = LakeDataset(root, "main")
    try:
        dataset.__getitems__(range(len(dataset)))
        return list(dataset.iter_arrow())
    finally:
        dataset.close()
