"""What may be asked is answered, and as the catalog itself answers it."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError
from tests.shared.sql_service.conftest import VISIBLE, make_sql_unit
from tests.shared.sql_service.questions import QUESTIONS

from logitlake_shared.catalog import Catalog, publish_catalog
from logitlake_shared.errors import LakeCorruptError, LakeError, QueryError, QueryTooLargeError
from logitlake_shared.lake import Lake
from logitlake_shared.sql_service import SqlLimits, SqlPool, SqlRequest
from logitlake_shared.sql_service.grammar import RELATIONS

# DuckDB adds floats in the order in which its threads come.
_ROUNDING = 1e-6


def test_the_answers_are_the_catalogs(lake: Path, pool: SqlPool) -> None:
    """Schema and rows of every question are those that a catalog of the same caches gives in process."""

    def ask(sql: str) -> pa.Table:
        return pool.run(SqlRequest(sql, VISIBLE)).read_all()

    with Catalog(Lake.open(lake), caches=VISIBLE) as catalog, ThreadPoolExecutor(4) as threads:
        for sql, answer in zip(QUESTIONS, threads.map(ask, QUESTIONS), strict=True):
            expected = catalog.query(sql)
            assert answer.schema == expected.schema, sql
            assert _close(answer.to_pylist(), expected.to_pylist()), sql
    assert len(QUESTIONS) >= 40


def test_only_the_callers_caches_are_there(lake: Path, pool: SqlPool) -> None:
    """Another cache shows in no relation: not in its rows, nor in the catalog's tables, nor in an error."""
    for relation in sorted(RELATIONS):
        caches = pool.run(SqlRequest(f"SELECT DISTINCT cache FROM {relation}", ("main",))).read_all()
        assert set(caches.column("cache").to_pylist()) <= {"main"}, relation
    with pytest.raises(QueryError) as refused:
        pool.run(SqlRequest("SELECT nothing FROM tokens", ("main",)))
    assert "hidden" not in str(refused.value)
    everything = pool.run(SqlRequest("SELECT cache FROM caches ORDER BY cache", None)).read_all()
    assert everything.column("cache").to_pylist() == ["hidden", "main", "pairs"]


def test_a_catalog_of_some_caches_holds_nothing_of_others(lake: Path) -> None:
    """Even past the gate there is no way to another cache: neither attached, nor in a table that no view shows."""
    for index in (True, False):
        with Catalog(Lake.open(lake), caches=("main",), has_index=index) as catalog:
            ask = catalog._connection.execute
            attached = {name for (name,) in ask("SELECT database_name FROM duckdb_databases()").fetchall()}
            assert attached == {"memory", "system", "temp"}
            for table in ("caches", "shards", "errors"):
                assert {name for (name,) in ask(f"SELECT cache FROM cat.{table}").fetchall()} <= {"main"}
            # The published catalog knows snapshot 1 of two units; what came since is read from the shards.
            assert ask("SELECT count(*) FROM cat.sample_index").fetchall() == [(6 if index else 0,)]


def test_no_cache_is_no_answer(pool: SqlPool) -> None:
    """Without a cache, or with one that is not there, the lake says nothing, and names no other one."""
    for caches in ((), ("nowhere",), ("main", "../hidden")):
        with pytest.raises(LakeError) as refused:
            pool.run(SqlRequest("SELECT 1", caches))
        assert "hidden'" not in str(refused.value).replace("'../hidden'", "")


def test_a_snapshot_is_asked_for_by_its_number(pool: SqlPool) -> None:
    """Snapshot 1 of a cache holds what it held, beside the newest of another; a number that is not there is named."""
    count = "SELECT count(*) AS n FROM samples WHERE cache = 'main'"
    newest = pool.run(SqlRequest(count, VISIBLE))
    assert newest.snapshot == {"main": 2, "pairs": 1}
    assert newest.read_all().to_pylist() == [{"n": 12}]
    older = pool.run(SqlRequest(count, VISIBLE, snapshot={"main": 1}))
    assert older.snapshot == {"main": 1, "pairs": 1}
    assert older.read_all().to_pylist() == [{"n": 6}]
    with pytest.raises(LakeError, match="no snapshot 7; its newest is 2"):
        pool.run(SqlRequest(count, VISIBLE, snapshot={"main": 7}))
    with pytest.raises(LakeError, match="'hidden'"):
        pool.run(SqlRequest(count, VISIBLE, snapshot={"hidden": 1}))


def test_what_is_published_meanwhile_is_not_in_the_answer(lake: Path, tmp_path: Path) -> None:
    """An answer is of one snapshot, also when a capture goes on, a snapshot and a catalog come while it is read."""
    copy = tmp_path / "lake"
    shutil.copytree(lake, copy)
    count = SqlRequest("SELECT count(*) AS n FROM samples WHERE cache = 'main'", VISIBLE)
    with SqlPool(copy, SqlLimits(num_warm=2)) as pool:
        sql = "SELECT sample_id, range FROM samples, range(20000) WHERE cache = 'main'"
        with pool.run(SqlRequest(sql, VISIBLE, max_rows=10**6)) as result:
            batches = iter(result)
            rows = next(batches).num_rows
            writer = Lake.open(copy)
            writer.cache("main").publish_unit(make_sql_unit(5))
            writer.cache("main").snapshot()
            publish_catalog(writer)
            assert rows + sum(batch.num_rows for batch in batches) == 12 * 20000
            assert result.snapshot["main"] == 2
        after = pool.run(count)
        assert after.snapshot["main"] == 3
        assert after.read_all().to_pylist() == [{"n": 15}]


def test_a_damaged_shard_is_that_questions_error(lake: Path, tmp_path: Path) -> None:
    """A byte that flipped on the disk is found by its page's checksum and named as a file of the lake, no more."""
    copy = tmp_path / "lake"
    shutil.copytree(lake, copy)
    shard = min((copy / "caches/main/shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with SqlPool(copy, SqlLimits(num_warm=2)) as pool:
        with pytest.raises(LakeCorruptError, match=f"lake/caches/main/shards/{shard.name}") as damaged:
            pool.run(SqlRequest("SELECT * FROM samples", VISIBLE)).read_all()
        assert str(copy) not in str(damaged.value)
        assert pool.run(SqlRequest("SELECT count(*) FROM pairs", VISIBLE)).read_all().num_rows == 1


def test_an_answer_is_read_once(pool: SqlPool) -> None:
    """Reading it again is an error of the reader's, not an empty answer."""
    result = pool.run(SqlRequest("SELECT 1", VISIBLE))
    assert result.read_all().num_rows == 1
    with pytest.raises(QueryError, match="read already"):
        result.read_all()
    assert not pool.cancel(result.query_id)


def test_parameters_are_values(pool: SqlPool) -> None:
    """`?` and `$name` stand for values and never for SQL."""
    by_place = SqlRequest("SELECT count(*) AS n FROM tokens WHERE task = ? AND position < ?", VISIBLE, ("caption", 2))
    assert pool.run(by_place).read_all().to_pylist() == [{"n": 8}]
    by_name = SqlRequest("SELECT $a AS a, $b + 1 AS b, $c AS c", VISIBLE, {"a": "'; DROP", "b": 1, "c": None})
    assert pool.run(by_name).read_all().to_pylist() == [{"a": "'; DROP", "b": 2, "c": None}]
    for params in ((), {"b": 1}, ("a",)):
        with pytest.raises(QueryError):
            pool.run(SqlRequest("SELECT $a + ?" if not params else "SELECT $a", VISIBLE, params))


@pytest.mark.parametrize(
    "params", [(b"x",), ([1],), "text", {1: 2}, (math.nan,), (2**200,), ("\ud800",), ("x" * 300_000,), 5]
)
def test_parameters_that_are_none_are_refused(pool: SqlPool, params: Any) -> None:
    """What JSON cannot carry exactly is refused before a worker is asked."""
    with pytest.raises(QueryError, match="params"):
        pool.run(SqlRequest("SELECT ?", VISIBLE, params))


def test_rows_are_cut_and_said_to_be(pool: SqlPool) -> None:
    """An answer of exactly the limit is whole; one row more is not there, and the answer says so."""
    whole = pool.run(SqlRequest("SELECT * FROM range(5000)", VISIBLE, max_rows=5000))
    assert whole.read_all().num_rows == 5000
    assert (whole.rows, whole.truncated) == (5000, "")
    cut = pool.run(SqlRequest("SELECT * FROM range(5001)", VISIBLE, max_rows=5000))
    assert cut.read_all().num_rows == 5000
    assert (cut.rows, cut.truncated) == (5000, "rows")
    assert cut.milliseconds > 0


def test_bytes_are_cut_at_a_row(pool: SqlPool) -> None:
    """As many whole rows as fit the bytes; a first row that does not fit is an error, not an empty answer."""
    cut = pool.run(SqlRequest("SELECT repeat('x', 1000) AS x FROM range(5000)", VISIBLE, max_bytes=100_000))
    table = cut.read_all()
    assert cut.truncated == "bytes"
    assert 90 <= table.num_rows <= 100
    assert set(table.column("x").to_pylist()) == {"x" * 1000}
    with pytest.raises(QueryTooLargeError, match="max_bytes"):
        pool.run(SqlRequest("SELECT repeat('x', 200000)", VISIBLE, max_bytes=100_000)).read_all()


@pytest.mark.parametrize("name", ["timeout_s", "max_rows", "max_bytes"])
@pytest.mark.parametrize("value", [10**12, 0, -1, True, float("nan"), "1"])
def test_limits_above_the_pools_are_refused(pool: SqlPool, name: str, value: Any) -> None:
    """A limit that is none, or above what the operator allows, is an error and not something smaller."""
    with pytest.raises(QueryError, match=name):
        pool.run(SqlRequest("SELECT 1", VISIBLE, **{name: value}))


@pytest.mark.parametrize("limits", [{"num_running": 0}, {"memory_mib": -1}, {"timeout_s": 61.0}, {"max_rows": 10**7}])
def test_limits_that_contradict_are_refused(limits: dict[str, Any]) -> None:
    """A pool of such limits is not made."""
    with pytest.raises(ValidationError, match=next(iter(limits))):
        SqlLimits(**limits)


def test_numbers_without_a_type_in_arrow_are_refused(pool: SqlPool) -> None:
    """A number that Arrow would carry wrongly is an error that says what to do; cast, it is right."""
    largest = 2**128 - 1
    for sql in (f"SELECT {largest}::UHUGEINT", f"SELECT [{largest}::UHUGEINT]", f"SELECT {2**127 - 1}::HUGEINT"):
        with pytest.raises(QueryError, match="cast it to VARCHAR"):
            pool.run(SqlRequest(sql, VISIBLE)).read_all()
    cast = pool.run(SqlRequest(f"SELECT {largest}::UHUGEINT::VARCHAR AS x", VISIBLE)).read_all()
    assert cast.to_pylist() == [{"x": str(largest)}]


def _close(got: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(got, float):
        return (
            got == expected
            or (math.isnan(got) and math.isnan(expected))
            or math.isclose(got, expected, rel_tol=_ROUNDING)
        )
    if isinstance(expected, dict) and isinstance(got, dict):
        return got.keys() == expected.keys() and all(_close(got[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        return len(got) == len(expected) and all(map(_close, got, expected))
    return bool(got == expected)
