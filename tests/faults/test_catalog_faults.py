"""A17-A19, A3: the catalog is derived; lost, damaged or half published it costs an answer no row.

Publishing a catalog is a few calls to the lake's disk (the file is made elsewhere), so every one of them is broken
here as those of a capture are in `test_kill` and `test_errors`.
"""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest
from tests.faults.conftest import Bench
from tests.faults.harness import Fault
from tests.faults.laws import assert_nothing_torn, tree

from logitlake_schemas import layout
from logitlake_shared.catalog import open_catalog, publish_catalog, rebuild_catalog
from logitlake_shared.errors import LakeCorruptError
from logitlake_shared.lake import Lake
from logitlake_shared.tools.verify import verify_catalog

Rows = dict[str, list[dict[str, Any]]]

# More calls than publishing a catalog makes.
MOST_CALLS = 10
# The crash points of the fault matrix, as (what happens, at which call).
CRASH_POINTS = {
    "before_catalog_tx": ("kill_before", "open"),
    "mid_catalog_tx": ("kill_mid", "write"),
    "after_catalog_tx": ("kill_after", "link"),
    "after_ack": ("kill_after", "unlink"),
}
TABLES = ("caches", "shards", "errors", "sample_index", "samples")
DAMAGES = {
    "empty": lambda _good: b"",
    "half": lambda good: good[: len(good) // 2],
    "zeroed head": lambda good: bytes(4096) + good[4096:],
    "zeroed tail": lambda good: good[:-4096] + bytes(4096),
    "text": lambda _good: b"not a database\n" * 500,
}


@pytest.fixture
def lake(bench: Bench) -> Bench:
    """A finished capture without a catalog."""
    assert bench.run("capture").ended == "done"
    return bench


@pytest.mark.parametrize("call", range(1, MOST_CALLS + 1))
@pytest.mark.parametrize("do", ["kill_before", "EIO", "ENOSPC"])
def test_a_broken_publication_is_made_good_by_the_next(lake: Bench, do: str, call: int) -> None:
    """Call n of publishing goes wrong: answers are right at once, and the next publication is whole."""
    _publish_and_ask(lake, Fault(do, call, lasting=do == "ENOSPC"))


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_publication_killed_at_a_named_point(lake: Bench, point: str) -> None:
    """The catalog's crash points of the fault matrix."""
    do, op = CRASH_POINTS[point]
    _publish_and_ask(lake, Fault(do, 1, ops=(op,)), killed=True)


def test_there_are_no_more_calls_of_publishing(lake: Bench) -> None:
    """Publishing makes fewer calls than are tried."""
    assert 0 < len(lake.run("catalog").calls) < MOST_CALLS


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_scribbled_catalog_is_loud_and_rebuilt_equal(lake: Bench, damage: str) -> None:
    """Never another answer: the right one or an error; `verify` says so; a rebuild is equal row for row."""
    number = publish_catalog(Lake.open(lake.root))
    right = _everything(lake.root)
    path = lake.root / layout.catalog_path(number)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    if not _same_or_loud(lake.root, right):
        assert any("catalog" in finding.path for finding in verify_catalog(Lake.open(lake.root)))
    assert rebuild_catalog(Lake.open(lake.root)) == number + 1
    assert _everything(lake.root) == right
    assert list(verify_catalog(Lake.open(lake.root))) == []


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_of_a_catalog_changes_no_answer(lake: Bench, seed: int) -> None:
    """One bit anywhere in the file: the same answers, or an error that names the remedy; a rebuild mends it."""
    number = publish_catalog(Lake.open(lake.root))
    right = _everything(lake.root)
    path = lake.root / layout.catalog_path(number)
    data, generator = bytearray(path.read_bytes()), random.Random(seed)
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(bytes(data))
    _same_or_loud(lake.root, right)
    rebuild_catalog(Lake.open(lake.root))
    assert _everything(lake.root) == right


def test_a_deleted_catalog_is_made_again_equal_row_for_row(lake: Bench) -> None:
    """Without any catalog the answers are the same, but for what the index alone knows; publishing anew restores it."""
    publish_catalog(Lake.open(lake.root))
    right = _everything(lake.root)
    for path in (lake.root / layout.catalog_prefix()).iterdir():
        path.unlink()
    assert _without_index(_everything(lake.root)) == _without_index(right)
    assert publish_catalog(Lake.open(lake.root)) == 1
    assert _everything(lake.root) == right


def test_a_catalog_of_an_older_snapshot_hides_nothing(lake: Bench) -> None:
    """Units that came since are answered for, and units that were taken back are not."""
    publish_catalog(Lake.open(lake.root))
    cache = Lake.open(lake.root).cache("main")
    cache.quarantine("000001-test", ["a test"])
    cache.snapshot()
    assert [row["sample_id"] for row in _everything(lake.root)["sample_index"]] == ["sample-0020", "sample-0021"]


def test_a_catalog_that_is_open_elsewhere_can_be_read_published_and_replaced(lake: Bench) -> None:
    """A17: another process holds the file open; readers read, a newer one is published, the holder sees its own."""
    number = publish_catalog(Lake.open(lake.root))
    path = lake.root / layout.catalog_path(number)
    script = (
        "import sys, duckdb\n"
        f"held = duckdb.connect({str(path)!r}, read_only=True)\n"
        "for line in sys.stdin:\n"
        "    print(held.sql('SELECT count(*) FROM sample_index').fetchall()[0][0], flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert _ask(holder) == "4"
        assert len(_everything(lake.root)["sample_index"]) == 4
        cache = Lake.open(lake.root).cache("main")
        cache.quarantine("000001-test", ["a test"])
        cache.snapshot()
        assert publish_catalog(Lake.open(lake.root)) == number + 1
        assert len(_everything(lake.root)["sample_index"]) == 2
        assert _ask(holder) == "4"
        path.unlink()
        assert _ask(holder) == "4"
        assert holder.stdin is not None
        holder.stdin.close()


def test_a_catalog_opens_in_an_older_duckdb(lake: Bench) -> None:
    """A18: the file's storage version is one that DuckDB 1.0 and later read."""
    path = lake.root / layout.catalog_path(publish_catalog(Lake.open(lake.root)))
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{path}' AS published (READ_ONLY)")
        ((version,),) = connection.sql(
            "SELECT tags['storage_version'] FROM duckdb_databases() WHERE database_name = 'published'"
        ).fetchall()
    assert str(version).startswith("v1.0")


def _publish_and_ask(lake: Bench, fault: Fault, killed: bool = False) -> None:
    outcome = lake.run("catalog", fault)
    assert not killed or outcome.ended == "killed"
    if outcome.ended == "raised":
        assert outcome.error["explained"], outcome.error["traceback"]
    elif not killed and len(outcome.calls) < fault.call:
        return
    assert_nothing_torn(lake.root, snapshots=[1])
    assert len(_everything(lake.root)["sample_index"]) == 4
    published = lake.run("catalog")
    assert published.ended == "done", published.said
    assert published.all("catalog") == [1]
    assert list(verify_catalog(Lake.open(lake.root))) == []


def test_publishing_twice_is_publishing_once(lake: Bench) -> None:
    """I6: nothing came since, so nothing is written."""
    assert lake.run("catalog").all("catalog") == [1]
    before = tree(lake.root)
    assert lake.run("catalog").all("catalog") == [1]
    assert tree(lake.root) == before


def _same_or_loud(root: Path, right: Rows) -> bool:
    """Whether the answers are the right ones; if not, there must be none, and the error names the remedy."""
    try:
        found = _everything(root)
    except LakeCorruptError as error:
        if "logitlake rebuild" not in str(error):
            raise
        return False
    assert found == right
    return True


def _everything(root: Path) -> Rows:
    """Every row of every table that the catalog answers for, in one order."""
    with open_catalog(root) as catalog:
        return {table: sorted(catalog.query(f"SELECT * FROM {table}").to_pylist(), key=str) for table in TABLES}


def _without_index(rows: Rows) -> Rows:
    """Without the numbers that an index gives to shards, and the range of ids that it found in them."""
    known_to_index = ("shard", "first_id", "last_id")
    return {
        table: sorted(({k: v for k, v in row.items() if k not in known_to_index} for row in rows[table]), key=str)
        for table in rows
    }


def _ask(holder: "subprocess.Popen[str]") -> str:
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write("?\n")
    holder.stdin.flush()
    return holder.stdout.readline().strip()
