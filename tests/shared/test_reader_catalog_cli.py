"""A lake as its readers see it: datasets, SQL views, the command line, and what a flipped bit does."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from logitlake_schemas import CaptureSpec, CodecPolicy
from logitlake_shared import cli
from logitlake_shared.catalog import Catalog
from logitlake_shared.errors import (
    DataError,
    FingerprintMismatchError,
    LakeCorruptError,
    LakeError,
    LakeFormatError,
    QueryError,
)
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.rows import LakeSample
from logitlake_shared.topk import TeacherRows, encode

MakeUnit = Callable[..., UnitResult]


@pytest.fixture
def lake_dir(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit, make_pair_unit: Callable[[int], UnitResult]
) -> Path:
    """A lake with a cache of samples (three units) and one of pairs (two units)."""
    root = tmp_path / "lake"
    lake = Lake.create(root)
    samples = lake.create_cache("main", capture_spec)
    pairs = lake.create_cache("pairs", capture_spec.model_copy(update={"kind": "pairs"}))
    for number in (3, 1, 2):
        samples.publish_unit(make_unit(number))
    for number in (1, 2):
        pairs.publish_unit(make_pair_unit(number))
    samples.snapshot()
    pairs.snapshot()
    return root


def test_dataset_order_is_that_of_ids_and_values_survive(lake_dir: Path, make_unit: MakeUnit) -> None:
    """Items come by id whatever the commit order, equal to what was published, with the image's bytes."""
    dataset = LakeDataset(lake_dir, "main")
    assert dataset.ids() == sorted(dataset.ids())
    assert len(dataset) == 6
    published = make_unit(1)
    item, expected = dataset[0], published.samples[0]
    assert item.sample_id == expected.sample_id == "sample-0010"
    assert item.messages == expected.messages
    assert item.images == (published.images[0].data,)
    for name, value in vars(expected.rows).items():
        np.testing.assert_array_equal(getattr(item.rows, name), value, err_msg=name)


def test_dataset_filters_by_split_and_task(lake_dir: Path) -> None:
    """Filters are exact; what selects nothing is refused with the filters named."""
    assert {item.split for item in _items(LakeDataset(lake_dir, "main", split="test"))} == {"test"}
    captions = LakeDataset(lake_dir, "main", tasks=["caption"])
    assert len(captions) == 3
    with pytest.raises(DataError, match="tasks=\\['nothing'\\]"):
        LakeDataset(lake_dir, "main", tasks=["nothing"])
    with pytest.raises(LakeError, match="holds samples, expected pairs"):
        PairDataset(lake_dir, "main")
    with pytest.raises(LakeError, match="no cache 'mian'; caches in this lake: main, pairs"):
        LakeDataset(lake_dir, "mian")


def test_pairs_round_trip(lake_dir: Path, make_pair_unit: Callable[[int], UnitResult]) -> None:
    """Both responses and the teacher's logprobs come back exactly."""
    dataset = PairDataset(lake_dir, "pairs")
    expected = make_pair_unit(1).pairs[0]
    np.testing.assert_array_equal(dataset[0].chosen_logprobs, expected.chosen_logprobs)
    np.testing.assert_array_equal(dataset[0].rejected_ids, expected.rejected_ids)
    assert len(dataset) == 2


def test_sql_agrees_with_the_rows(lake_dir: Path) -> None:
    """tokens and topk are the samples' lists unnested: counts, order and values agree with the dataset."""
    dataset = LakeDataset(lake_dir, "main")
    with Catalog(Lake.open(lake_dir)) as catalog:
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
def test_sql_cannot_leave_the_lake(lake_dir: Path, sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, networks and settings are out of reach; wrong questions get DuckDB's explanation."""
    monkeypatch.chdir(lake_dir.parent)
    with Catalog(Lake.open(lake_dir)) as catalog, pytest.raises(QueryError):
        catalog.query(sql)
    assert not (lake_dir.parent / "stolen.csv").exists()


def test_every_flipped_bit_of_a_shard_is_caught(lake_dir: Path) -> None:
    """sha256 stands before any decoding: no flipped bit reaches a reader."""
    (shard, *_) = sorted(lake_dir.glob("caches/main/shards/*.parquet"))
    good = shard.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(good), 20):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(generator.integers(8))
        shard.write_bytes(bytes(damaged))
        with pytest.raises(LakeCorruptError, match="sha256"):
            LakeDataset(lake_dir, "main")
    shard.write_bytes(good[:-1])
    with pytest.raises(LakeCorruptError, match=f"got {len(good) - 1} bytes"):
        LakeDataset(lake_dir, "main")
    shard.unlink()
    with pytest.raises(LakeCorruptError, match="committed but missing"):
        LakeDataset(lake_dir, "main")


def test_another_spec_is_refused_by_field(lake_dir: Path, capture_spec: CaptureSpec) -> None:
    """The cache of one teacher does not take another's rows; the message names the fields."""
    engine = capture_spec.engine.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(FingerprintMismatchError, match=r"engine\.dtype: float32 there, bfloat16 here"):
        Lake.open(lake_dir).create_cache("main", capture_spec.model_copy(update={"engine": engine}))


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


def test_command_line_answers(lake_dir: Path) -> None:
    """ls, sql in three formats, verify."""
    runner = CliRunner()
    assert "main" in _output(runner, "ls", str(lake_dir))
    question = "SELECT task, count(*) AS n FROM samples GROUP BY task ORDER BY task"
    assert "caption" in _output(runner, "sql", str(lake_dir), question)
    answer = [json.loads(line) for line in _output(runner, "sql", str(lake_dir), question, "-o", "json").splitlines()]
    assert answer == [{"task": "caption", "n": 3}, {"task": "reading", "n": 3}]
    assert _output(runner, "sql", str(lake_dir), question, "-o", "csv").splitlines() == [
        "task,n",
        "caption,3",
        "reading,3",
    ]
    assert "5 units verified, no problem" in _output(runner, "verify", str(lake_dir))


def test_verify_sees_broken_laws(tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit) -> None:
    """A unit whose bytes are sound but whose rows are not: EOS missing, mass over one, an image that is not there."""
    unit = make_unit(1)
    sample = unit.samples[0]
    heavy = encode(_rows_over_one(), capture_spec.codec)
    bad = [
        type(sample)(**{**vars(sample), "response_ids": np.array([7, 8, 9, 10], np.int32)}),
        type(sample)(**{**vars(sample), "sample_id": "heavy", "rows": heavy}),
    ]
    cache = Lake.create(tmp_path / "lake").create_cache("main", capture_spec)
    cache.publish_unit(UnitResult(unit="u", samples=bad))
    cache.snapshot()
    result = CliRunner().invoke(cli.cli, ["verify", str(tmp_path / "lake")])
    assert isinstance(result.exception, LakeCorruptError)
    for said in ("does not end with EOS", "heavy: token 0: top-k and tail sum to", "stored nowhere"):
        assert said in result.output


def _rows_over_one() -> TeacherRows:
    half = np.log(np.full((4, 2), 0.5, np.float32))
    return TeacherRows(
        topk_ids_TK=np.tile(np.array([3, 4], np.int32), (4, 1)),
        topk_logprobs_TK=half,
        label_logprob_T=half[:, 0],
        label_rank_T=np.ones(4, np.int32),
        log_tail_mass_T=np.log(np.full(4, 0.5, np.float32)),
    )


def _items(dataset: LakeDataset) -> list[LakeSample]:
    return [dataset[i] for i in range(len(dataset))]


def _output(runner: CliRunner, *arguments: str) -> str:
    result = runner.invoke(cli.cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
