"""A lake as its readers see it: SQL views, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from logitlake_schemas import CaptureSpec, CodecPolicy
from logitlake_shared.catalog import Catalog
from logitlake_shared.errors import (
    FingerprintMismatchError,
    LakeError,
    LakeFormatError,
    QueryError,
)
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset

MakeUnit = Callable[..., UnitResult]


def test_sql_agrees_with_the_rows(small_lake: Path) -> None:
    """tokens and topk are the samples' lists unnested: counts, order and values agree with the dataset."""
    dataset = LakeDataset(small_lake, "main")
    with Catalog(Lake.open(small_lake)) as catalog:
        tokens = catalog.query("SELECT * FROM tokens WHERE sample_id = 'sample-0010' ORDER BY position").to_pylist()
        assert [row["token_id"] for row in tokens] == dataset[0].response_ids.tolist()
        assert [row["label_logprob"] for row in tokens] == dataset[0].rows.label_logprob_T.tolist()
        topk = catalog.query("SELECT * FROM topk WHERE sample_id = 'sample-0010' ORDER BY position, rank").to_pylist()
        assert [row["token_id"] for row in topk] == dataset[0].rows.topk_ids.tolist()
        assert [row["rank"] for row in topk][: tokens[0]["k"]] == list(range(1, tokens[0]["k"] + 1))
        (counts,) = catalog.query("SELECT rows, tokens, units FROM caches WHERE cache = 'main'").to_pylist()
        assert counts == {"rows": 6, "tokens": 24, "units": 3}
        (pairs,) = catalog.query("SELECT sum(chosen_score) AS score FROM pairs").to_pylist()
        assert pairs["score"] == pytest.approx(2 * -0.75)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT nothing FROM samples",
        "SELECT 1; SELECT 2",
        "COPY (SELECT 1) TO 'stolen.csv'",
        "WITH x AS (COPY (SELECT 1) TO 'stolen.csv') FROM x",
        "SELECT * FROM read_csv('/etc/passwd')",
        "ATTACH 'other.duckdb'",
        "SET memory_limit = '1GB'",
        "",
    ],
)
def test_sql_cannot_leave_the_lake(small_lake: Path, sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, networks and settings are out of reach; wrong questions get DuckDB's explanation."""
    monkeypatch.chdir(small_lake.parent)
    with Catalog(Lake.open(small_lake)) as catalog, pytest.raises(QueryError):
        catalog.query(sql)
    assert not (small_lake.parent / "stolen.csv").exists()


def test_a_question_that_fails_when_half_of_its_answer_is_out_says_why(small_lake: Path) -> None:
    """In DuckDB's words, as one that fails at once."""
    sql = "SELECT CASE WHEN range < 100000 THEN '1' ELSE 'broken' END::INT AS n FROM range(200000)"
    with Catalog(Lake.open(small_lake)) as catalog, pytest.raises(QueryError, match="Could not convert"):
        list(catalog.query_batches(sql, rows=1000))


def test_another_spec_is_refused_by_field(small_lake: Path, capture_spec: CaptureSpec) -> None:
    """The cache of one teacher does not take another's rows; the message names the fields."""
    engine = capture_spec.engine.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(FingerprintMismatchError, match=r"engine\.dtype: float32 there, bfloat16 here"):
        Lake.open(small_lake).create_cache("main", capture_spec.model_copy(update={"engine": engine}))


def test_over_budget_is_not_published(tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit) -> None:
    """A unit whose stored error exceeds the budget leaves no trace."""
    tight = capture_spec.model_copy(update={"codec": CodecPolicy(k_max=8, k_min=2, max_mean_kl=1e-9)})
    cache = Lake.create(tmp_path / "lake").create_cache("main", tight)
    with pytest.raises(LakeError, match=r"over the budget of 1\.00e-09"):
        cache.publish_unit(make_unit(1))
    assert cache.committed_units() == set()


def test_not_a_lake(tmp_path: Path) -> None:
    """A missing folder is not made by asking about it."""
    with pytest.raises(LakeFormatError, match="no such folder"):
        Lake.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
