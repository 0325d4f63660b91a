"""The catalog's contract on a local folder, in memory and on S3: publish, look up, ask, race."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pytest

from logitlake_schemas import CaptureSpec, LakeManifest, layout
from logitlake_shared.catalog import Catalog, publish_catalog, rebuild_catalog
from logitlake_shared.catalog.attach import attach_statements, copy_files, find_attachable
from logitlake_shared.errors import LakeCorruptError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.store import ObjectStore

MakeUnit = Callable[..., UnitResult]

PUBLISHERS = 4


@pytest.fixture
def lake(store: ObjectStore, capture_spec: CaptureSpec, make_unit: MakeUnit) -> Lake:
    """A lake of two units with a snapshot."""
    store.put_new(layout.LAKE_MANIFEST, LakeManifest().to_bytes())
    lake = Lake.of(store)
    cache = lake.create_cache("main", capture_spec)
    for number in (1, 2):
        cache.publish_unit(make_unit(number))
    cache.snapshot()
    return lake


def test_published_catalogs_answer(lake: Lake, make_unit: MakeUnit) -> None:
    """Without a catalog, with one, and with one that is behind: the same rows, and each sample at its place."""
    question = "SELECT sample_id, count(*) AS tokens FROM tokens GROUP BY sample_id ORDER BY sample_id"
    with Catalog(lake) as catalog:
        before = catalog.query(question)
    assert publish_catalog(lake) == 1
    with Catalog(lake) as catalog:
        assert catalog.query(question) == before
        (place,) = catalog.find("sample-0021")
        rows = lake.cache("main").read(place.entry)
        assert rows.column("sample_id")[place.row].as_py() == "sample-0021"
    lake.cache("main").publish_unit(make_unit(3))
    lake.cache("main").snapshot()
    with Catalog(lake) as catalog:
        assert catalog.query(question).num_rows == before.num_rows + 2
        assert len(catalog.find("sample-0030")) == 1
    assert publish_catalog(lake) == 2
    assert publish_catalog(lake) == 2


def test_racing_publishers_agree(lake: Lake) -> None:
    """Publishers of the same snapshots make one catalog; rebuilders each make one, all of equal rows."""
    with ThreadPoolExecutor(PUBLISHERS) as pool:
        assert list(pool.map(publish_catalog, [lake] * PUBLISHERS)) == [1] * PUBLISHERS
        assert sorted(pool.map(rebuild_catalog, [lake] * PUBLISHERS)) == [2, 3, 4, 5]
    assert len(lake.store.names(layout.catalog_prefix())) == 1 + PUBLISHERS


def test_damage_is_refused_and_replaced(lake: Lake) -> None:
    """A catalog that is cut short is refused by readers and replaced by the next publisher."""
    publish_catalog(lake)
    name = layout.catalog_path(1)
    data = lake.store.get(name)
    assert data is not None
    lake.store.overwrite(name, data[:4096])
    with pytest.raises(LakeCorruptError, match="logitlake rebuild"):
        Catalog(lake)
    assert publish_catalog(lake) == 2
    with Catalog(lake) as catalog:
        assert catalog.query("SELECT count(*) AS n FROM sample_index").to_pylist() == [{"n": 4}]


def test_a_copy_is_attached_in_a_plain_duckdb(lake: Lake, tmp_path: Path) -> None:
    """Its rows are those of the lake; a second copy fetches nothing."""
    publish_catalog(lake)
    question = "SELECT sample_id, list_sum(label_logprob) AS logprob FROM samples ORDER BY sample_id"
    found, told = find_attachable(lake), list[int]()
    assert copy_files(lake, found, tmp_path / "copy", told.append) == len(found.files) == len(told)
    assert copy_files(lake, found, tmp_path / "copy", told.append) == 0
    with duckdb.connect() as connection, Catalog(lake) as catalog:
        for statement in attach_statements(tmp_path / "copy", found):
            connection.execute(statement)
        assert connection.sql(question).to_arrow_table().to_pylist() == catalog.query(question).to_pylist()
