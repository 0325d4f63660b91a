"""The published catalog: incremental equals rebuilt, races lose nothing, damage is seen, plain DuckDB reads it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from tests.shared.conftest import older_duckdb

from logitlake_schemas import CaptureSpec, layout
from logitlake_shared.catalog import Catalog, publish_catalog, rebuild_catalog
from logitlake_shared.catalog.tables import CATALOG_VERSION
from logitlake_shared.errors import LakeError
from logitlake_shared.lake import Lake, UnitResult

MakeUnit = Callable[..., UnitResult]

TABLES = ("about", "caches", "shards", "errors", "sample_index")
PUBLISHERS = 4


@pytest.fixture
def lake(tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit) -> Lake:
    """A lake of one cache, three units and a snapshot; nothing is published."""
    lake = Lake.create(tmp_path / "lake")
    cache = lake.create_cache("main", capture_spec)
    for number in (1, 2, 3):
        cache.publish_unit(make_unit(number))
    cache.snapshot()
    return lake


def test_incremental_equals_rebuilt(
    lake: Lake, capture_spec: CaptureSpec, make_unit: MakeUnit, make_pair_unit: Callable[[int], UnitResult]
) -> None:
    """Grown by units, by a cache that sorts before, and shrunk by a quarantine: every table is as if made at once."""
    assert publish_catalog(lake) == 1
    assert publish_catalog(lake) == 1
    main = lake.cache("main")
    main.publish_unit(make_unit(0))
    main.snapshot()
    assert publish_catalog(lake) == 2
    first = lake.create_cache("a-first", capture_spec.model_copy(update={"kind": "pairs"}))
    first.publish_unit(make_pair_unit(1))
    first.snapshot()
    assert publish_catalog(lake) == 3
    main.quarantine(make_unit(2).unit, ["a test"])
    main.snapshot()
    assert publish_catalog(lake) == 4
    assert rebuild_catalog(lake) == 5
    assert _tables(lake, 4) == _tables(lake, 5)
    units = _units(lake, 4)
    assert units == {"000000-test", "000001-test", "000003-test"}


def test_incremental_reads_only_what_is_new(lake: Lake, make_unit: MakeUnit) -> None:
    """With the old shards gone, a new unit is still added; a rebuild then names the shard that is missing."""
    publish_catalog(lake)
    old = lake.store.names("caches/main/shards")
    lake.cache("main").publish_unit(make_unit(4))
    lake.cache("main").snapshot()
    for path in old:
        lake.store.delete(path)
    assert publish_catalog(lake) == 2
    assert len(_tables(lake, 2)["sample_index"]) == 8
    with pytest.raises(LakeError, match="committed but missing"):
        rebuild_catalog(lake)


def test_of_racing_publishers_none_is_lost(lake: Lake, make_unit: MakeUnit) -> None:
    """Publishers that each add a unit first: the newest catalog in the end has all units and equals a rebuild."""
    publish_catalog(lake)
    cache, barrier = lake.cache("main"), Barrier(PUBLISHERS)

    def add(number: int) -> int:
        cache.publish_unit(make_unit(number))
        cache.snapshot()
        barrier.wait()
        return publish_catalog(lake)

    with ThreadPoolExecutor(PUBLISHERS) as pool:
        numbers = list(pool.map(add, range(4, 4 + PUBLISHERS)))
    newest = publish_catalog(lake)
    assert max(numbers) == newest
    assert rebuild_catalog(lake) == newest + 1
    assert _tables(lake, newest) == _tables(lake, newest + 1)


def test_a_catalog_stays_open_while_newer_ones_come(lake: Lake, make_unit: MakeUnit) -> None:
    """A reader's answers do not change under it, even when its file is collected."""
    publish_catalog(lake)
    with Catalog(lake) as before, Catalog(lake) as beside:
        lake.cache("main").publish_unit(make_unit(4))
        lake.cache("main").snapshot()
        assert publish_catalog(lake) == 2
        lake.store.delete(layout.catalog_path(1))
        with Catalog(lake) as after:
            counts = [c.query("SELECT count(*) AS n FROM sample_index") for c in (before, beside, after)]
    assert [count.to_pylist()[0]["n"] for count in counts] == [6, 6, 8]


@pytest.mark.parametrize("damage", ["cut", "scribbled", "emptied", "text"])
def test_a_damaged_catalog_is_refused_and_replaced(lake: Lake, damage: str) -> None:
    """Readers are told to rebuild; the next publisher makes a sound file from the records; that answers again."""
    publish_catalog(lake)
    sound = _tables(lake, 1)
    path = Path(lake.store.uri) / layout.catalog_path(1)
    data = bytearray(path.read_bytes())
    if damage == "scribbled":
        data[4096 : len(data) - 1000] = np.random.default_rng(0).bytes(len(data) - 5096)
    path.write_bytes({"cut": data[: len(data) // 3], "emptied": b"", "text": b"not a catalog"}.get(damage, data))
    with pytest.raises(LakeError, match="logitlake rebuild"):
        Catalog(lake)
    assert publish_catalog(lake) == 2
    assert _tables(lake, 2) == sound
    with Catalog(lake) as catalog:
        assert len(catalog.find("sample-0010")) == 1


def test_a_flipped_bit_of_a_catalog_is_seen_or_harmless(lake: Lake) -> None:
    """After any flipped bit, the next publisher's newest catalog holds the true rows."""
    publish_catalog(lake)
    sound = _tables(lake, 1)
    path = Path(lake.store.uri) / layout.catalog_path(1)
    good, replaced = path.read_bytes(), 0
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * len(good), 30):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << int(bit % 8)
        path.write_bytes(bytes(damaged))
        number = publish_catalog(lake)
        assert _tables(lake, number) == sound
        if number == 2:
            replaced += 1
            lake.store.delete(layout.catalog_path(2))
    assert replaced > 0


def test_a_catalog_of_another_version_counts_as_none(lake: Lake) -> None:
    """Readers work without it, and the next publisher starts afresh."""
    publish_catalog(lake)
    with Catalog(lake) as catalog:
        truth = catalog.query("FROM sample_index ORDER BY ALL")
    with duckdb.connect(Path(lake.store.uri) / layout.catalog_path(1)) as connection:
        connection.execute(f"UPDATE about SET catalog_version = {CATALOG_VERSION + 1}")
        connection.execute("DELETE FROM sample_index")
    with Catalog(lake) as catalog:
        assert catalog.query("FROM sample_index ORDER BY ALL") == truth
    assert publish_catalog(lake) == 2
    with Catalog(lake) as catalog:
        assert catalog.query("FROM sample_index ORDER BY ALL") == truth


def test_a_cache_made_anew_is_not_mistaken_for_the_old_one(lake: Lake, make_unit: MakeUnit) -> None:
    """The same name, spec and snapshot number with other units: the old catalog does not speak for it."""
    publish_catalog(lake)
    spec = lake.cache("main").spec
    for path in lake.store.names("caches"):
        lake.store.delete(path)
    cache = lake.create_cache("main", spec)
    cache.publish_unit(make_unit(7))
    assert cache.snapshot().number == 1
    with Catalog(lake) as catalog:
        assert catalog.query("SELECT sample_id FROM sample_index ORDER BY 1").column(0).to_pylist() == [
            "sample-0070",
            "sample-0071",
        ]
    assert publish_catalog(lake) == 2


PLAIN = """
import json, sys
import duckdb
lake = sys.argv[1]
connection = duckdb.connect()
connection.execute(f"ATTACH '{lake}/catalog/catalog-00000001.duckdb' AS cat (READ_ONLY)")
connection.execute(
    f"SET VARIABLE paths = (SELECT list('{lake}/' || path) FROM cat.shards WHERE kind = 'samples')"
)
tokens = connection.execute(
    "SELECT count(*), sum(len(response_ids)) FROM read_parquet(getvariable('paths'))"
).fetchone()
places = connection.execute(
    "SELECT path, row_group, row FROM cat.sample_index JOIN cat.shards USING (shard) "
    "WHERE id_hash = (md5_number_lower('sample-0010') >> 32)::UINTEGER AND sample_id = 'sample-0010'"
).fetchall()
print(json.dumps([duckdb.__version__, tokens, places]))
"""


@pytest.mark.parametrize("version", ["1.4", "2."])
def test_plain_duckdb_reads_the_lake(lake: Lake, version: str) -> None:
    """The recipe of the package's docstring, in a process without this package, in an old DuckDB and in ours."""
    publish_catalog(lake)
    environment = dict(os.environ)
    command = [sys.executable, "-c", PLAIN, lake.store.uri]
    if version == "1.4":
        # -S: none of the environment's own packages.
        command.insert(1, "-S")
        environment["PYTHONPATH"] = str(older_duckdb())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, tokens, places = json.loads(done.stdout)
    assert found.startswith(version)
    assert tokens == [6, 24]
    with Catalog(lake) as catalog:
        (place,) = catalog.find("sample-0010")
    assert places == [[place.entry.path, place.row_group, place.row]]


def _tables(lake: Lake, number: int) -> dict[str, pa.Table]:
    """Every table of a published file, in the order in which it is stored."""
    with duckdb.connect(Path(lake.store.uri) / layout.catalog_path(number), read_only=True) as connection:
        return {table: connection.sql(f"FROM {table}").to_arrow_table() for table in TABLES}


def _units(lake: Lake, number: int) -> set[str]:
    """The units of the samples in a published file."""
    shards = _tables(lake, number)["shards"].to_pylist()
    return {shard["unit"] for shard in shards if shard["kind"] == "samples"}
