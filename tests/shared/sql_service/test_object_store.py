"""A lake in an object store: the same answers, with the layers that a network leaves."""

import pytest
from tests.shared.sql_service.conftest import VISIBLE, fill
from tests.shared.sql_service.questions import QUESTIONS

from logitlake_shared.catalog import Catalog
from logitlake_shared.errors import LakeError, QueryRefusedError
from logitlake_shared.lake import Lake
from logitlake_shared.sql_service import SqlLimits, SqlPool, SqlRequest


def test_a_lake_in_a_store_answers(s3_bucket: str) -> None:
    """Questions are answered as in process, other caches are not there, and no message tells where the lake lies."""
    uri = f"s3://{s3_bucket}/lake"
    lake = Lake.create(uri)
    fill(lake)
    with SqlPool(uri, SqlLimits(num_warm=2, timeout_s=30.0)) as pool:
        with Catalog(lake, caches=VISIBLE) as catalog:
            for sql in QUESTIONS[:20:4]:
                assert pool.run(SqlRequest(sql, VISIBLE)).read_all().schema == catalog.query(sql).schema
            index = "SELECT sample_id, path, row_group FROM sample_index ORDER BY ALL"
            assert pool.run(SqlRequest(index, VISIBLE)).read_all().equals(catalog.query(index))
        caches = pool.run(SqlRequest("SELECT DISTINCT cache FROM sample_index", ("main",))).read_all()
        assert caches.to_pylist() == [{"cache": "main"}]
        with pytest.raises(QueryRefusedError):
            pool.run(SqlRequest("SELECT getenv('AWS_SECRET_ACCESS_KEY')", VISIBLE))
        with pytest.raises(LakeError, match="no cache 'nowhere'") as refused:
            pool.run(SqlRequest("SELECT 1", ("nowhere",)))
        assert s3_bucket not in str(refused.value)


def test_a_store_that_is_away_is_that_questions_error(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody answers the question fails by its deadline."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with SqlPool(f"s3://{s3_bucket}/lake", SqlLimits(num_warm=1)) as pool, pytest.raises(LakeError) as failed:
        pool.run(SqlRequest("SELECT 1", VISIBLE, timeout_s=30.0))
    assert s3_bucket not in str(failed.value)
    assert "127.0.0.1" not in str(failed.value)
