"""What a gate cannot see: time, memory, the size of an answer. Each question ends by itself or by its limit."""

import time
from contextlib import suppress
from dataclasses import replace

import pytest
from tests.shared.sql_service.conftest import VISIBLE
from tests.shared.sql_service.corpus import CUT, LARGE, MEMORY, PARSER, TIMEOUT

from logitlake_shared.errors import (
    QueryCrashedError,
    QueryError,
    QueryMemoryError,
    QueryTimeoutError,
    QueryTooLargeError,
)
from logitlake_shared.sql_service import SqlPool, SqlRequest

# What is promised: a question ends at most a second after its deadline.
_LATE_S = 1.0
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.mark.parametrize("sql", TIMEOUT, ids=lambda sql: sql[:60])
def test_time(pool: SqlPool, sql: str) -> None:
    """What cannot be interrupted ends at its deadline, and its place is free for the next one."""
    pool.wait_ready()
    started = time.monotonic()
    with pytest.raises(QueryTimeoutError, match=r"1\.5 s"):
        pool.run(SqlRequest(sql, VISIBLE, timeout_s=1.5)).read_all()
    assert 1.5 <= time.monotonic() - started < 1.5 + _LATE_S
    assert pool.num_running == 0
    assert pool.run(SqlRequest("SELECT 1 AS x", VISIBLE)).read_all().to_pylist() == [{"x": 1}]


@pytest.mark.parametrize("sql", MEMORY, ids=lambda sql: sql[:60])
def test_memory(pool: SqlPool, sql: str) -> None:
    """What needs more memory than a worker may have ends its worker or itself, and nothing else."""
    with pytest.raises((QueryMemoryError, QueryCrashedError, QueryTimeoutError)):
        pool.run(SqlRequest(sql, VISIBLE, timeout_s=5.0)).read_all()
    assert pool.num_running == 0


def test_memory_is_named(pool: SqlPool) -> None:
    """One value of 3 GB is told as what it is; DuckDB's own limit does not see it."""
    with pytest.raises(QueryMemoryError, match="more memory than it may have"):
        pool.run(SqlRequest(MEMORY[0], VISIBLE))


@pytest.mark.parametrize("sql", LARGE, ids=lambda sql: sql[:60])
def test_one_row_too_large(pool: SqlPool, sql: str) -> None:
    """A row cap alone would let it through: the bytes are counted."""
    with pytest.raises((QueryTooLargeError, QueryMemoryError)):
        pool.run(SqlRequest(sql, VISIBLE)).read_all()


@pytest.mark.parametrize("sql", CUT, ids=lambda sql: sql[:60])
def test_answers_without_end(pool: SqlPool, sql: str) -> None:
    """They are cut at the rows or bytes, long before their end, and say so."""
    result = pool.run(SqlRequest(sql, VISIBLE))
    table = result.read_all()
    assert result.truncated in ("rows", "bytes")
    assert 0 < table.num_rows <= pool.limits.max_rows
    assert table.nbytes <= pool.limits.max_bytes


@pytest.mark.parametrize("sql", PARSER, ids=lambda sql: sql[:60])
def test_texts_that_are_hard_to_read(pool: SqlPool, sql: str) -> None:
    """Parsing, judging, binding and planning are inside the deadline, too."""
    started = time.monotonic()
    with suppress(QueryError):
        pool.run(SqlRequest(sql, VISIBLE, timeout_s=5.0)).read_all()
    assert time.monotonic() - started < 5.0 + _LATE_S
    assert pool.num_running == 0


def test_time_counts_until_the_answer_is_read(pool: SqlPool) -> None:
    """Who does not read loses the place at the deadline, and is told when reading goes on."""
    request = SqlRequest("SELECT repeat('x', 1000) AS x FROM range(1000000)", VISIBLE, timeout_s=1.5, max_rows=10**6)
    result = pool.run(replace(request, max_bytes=pool.limits.max_bytes_cap))
    with pool._changed:
        assert pool._changed.wait_for(lambda: pool.num_running == 0, timeout=1.5 + _LATE_S)
    with pytest.raises(QueryTimeoutError):
        result.read_all()
