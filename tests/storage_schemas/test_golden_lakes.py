"""Lakes of every format version ever released open in this release, and say what they said when they were written.

`format-<n>` is a lake of version n as its first release wrote it, `format-<n>-additions` one with the nullable columns
that came to it later.
"""

import json
from pathlib import Path

import pytest
from tests.golden.make_format_1 import values

from logitlake_schemas import FORMAT_VERSION
from logitlake_shared.catalog import Catalog
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.tools.verify import verify_unit

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = sorted(GOLDEN.glob("format-*"))


def test_every_format_has_its_golden_lake() -> None:
    """The present format is among them; a new one adds its own and keeps the others."""
    first = [folder.name for folder in FORMATS if not folder.name.endswith("-additions")]
    assert first == [f"format-{number + 1}" for number in range(FORMAT_VERSION)]


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_rows_are_what_they_were(folder: Path) -> None:
    """Every value of every row, every error and every fingerprint equals the plain JSON written with the lake."""
    assert values(Lake.open(folder / "lake")) == json.loads((folder / "values.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_readers_sql_and_verify_agree(folder: Path) -> None:
    """The datasets, SQL and verify of this release understand the lake."""
    lake = Lake.open(folder / "lake")
    for name in lake.cache_names():
        cache = lake.cache(name)
        dataset = (LakeDataset if cache.spec.kind == "samples" else PairDataset)(folder / "lake", name)
        assert len(dataset) == sum(
            entry.rows
            for commit in cache.open_snapshot().commits
            for entry in commit.shards
            if entry.kind == cache.spec.kind
        )
        for commit in cache.open_snapshot().commits:
            assert verify_unit(cache, commit) == []
    with Catalog(lake) as catalog:
        (row,) = catalog.query("SELECT count(*) AS n, sum(k) AS entries FROM tokens").to_pylist()
        (added,) = catalog.query(
            "SELECT count(visual_advantage) AS advantages, count(log_tail_mass_t4) AS tails FROM tokens"
        ).to_pylist()
        (topk,) = catalog.query("SELECT count(*) AS n FROM topk").to_pylist()
        assert row["entries"] == topk["n"]
        assert all((count > 0) == folder.name.endswith("-additions") for count in added.values())
