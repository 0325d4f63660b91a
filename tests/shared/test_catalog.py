"""The catalog's views and look-ups: equal to the rows, whatever is published; nothing opened in vain or changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from logitlake_schemas import CaptureSpec, CodecPolicy, UnitError
from logitlake_shared.catalog import Catalog, publish_catalog
from logitlake_shared.catalog.scan import flatten_lists
from logitlake_shared.errors import LakeCorruptError, LakeError, QueryError
from logitlake_shared.lake import Lake, UnitResult

MakeUnit = Callable[..., UnitResult]

QUESTIONS = (
    "SELECT * FROM samples ORDER BY cache, sample_id",
    "SELECT * FROM tokens ORDER BY cache, sample_id, position",
    "SELECT * FROM topk ORDER BY cache, sample_id, position, rank",
    "SELECT * FROM pairs ORDER BY cache, pair_id",
    "SELECT * FROM images ORDER BY cache, image_sha256",
    "SELECT * EXCLUDE (shard, first_id, last_id) FROM shards ORDER BY path",
    "SELECT * FROM errors ORDER BY cache, sample_id",
    "SELECT * FROM caches ORDER BY cache",
    "SELECT * FROM sample_index ORDER BY cache, sample_id",
)


@pytest.fixture
def lake(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit, make_pair_unit: Callable[[int], UnitResult]
) -> Lake:
    """Two caches of samples with the same ids, one with an error, and one of pairs. Nothing is published."""
    lake = Lake.create(tmp_path / "lake")
    main = lake.create_cache("main", capture_spec)
    other = lake.create_cache("other", capture_spec.model_copy(update={"codec": CodecPolicy(k_max=8, k_min=3)}))
    pairs = lake.create_cache("pairs", capture_spec.model_copy(update={"kind": "pairs"}))
    for number in (3, 1, 2):
        main.publish_unit(make_unit(number))
    error = UnitError(sample_id="lost", code="image_decode", message="not an image")
    unit = make_unit(1)
    other.publish_unit(
        UnitResult(unit.unit, unit.samples, images=unit.images, errors=[error], stored_error=unit.stored_error)
    )
    for number in (1, 2):
        pairs.publish_unit(make_pair_unit(number))
    for cache in (main, other, pairs):
        cache.snapshot()
    return lake


def test_answers_do_not_depend_on_what_is_published(lake: Lake, make_unit: MakeUnit) -> None:
    """No catalog, a current one and a stale one give equal answers to every view."""
    with Catalog(lake) as catalog:
        before = [catalog.query(question) for question in QUESTIONS]
    assert publish_catalog(lake) == 1
    with Catalog(lake) as catalog:
        assert [catalog.query(question) for question in QUESTIONS] == before
    lake.cache("main").publish_unit(make_unit(4))
    lake.cache("main").snapshot()
    with Catalog(lake) as catalog:
        stale = [catalog.query(question) for question in QUESTIONS]
    assert publish_catalog(lake) == 2
    with Catalog(lake) as catalog:
        assert [catalog.query(question) for question in QUESTIONS] == stale
    assert [table.num_rows for table in stale] != [table.num_rows for table in before]


def test_tokens_and_topk_are_the_lists_unnested(lake: Lake) -> None:
    """The flattened views equal what DuckDB's own unnest makes of the samples' lists."""
    owner = "cache, sample_id, task, source, split"
    with Catalog(lake) as catalog:
        tokens = catalog.query(f"SELECT {owner}, position, token_id, k, entropy FROM tokens ORDER BY ALL")
        unnested = catalog.query(
            f"SELECT {owner}, unnest(range(len(k)))::INTEGER AS position, unnest(response_ids) AS token_id, "
            "unnest(k) AS k, unnest(entropy) AS entropy FROM samples ORDER BY ALL"
        )
        assert _plain(tokens) == _plain(unnested)
        topk = catalog.query(f"SELECT {owner}, position, rank, token_id, logprob FROM topk ORDER BY ALL")
        unnested = catalog.query(
            f"SELECT {owner}, place.p::INTEGER AS position, place.r::INTEGER AS rank, token_id, logprob FROM "
            "(SELECT *, unnest(flatten(list_transform(range(len(k)), lambda t: list_transform(range(k[t + 1]), "
            "lambda r: {'p': t, 'r': r + 1})))) AS place, unnest(topk_ids) AS token_id, "
            "unnest(topk_logprobs) AS logprob FROM samples) ORDER BY ALL"
        )
        assert _plain(topk) == _plain(unnested)
        assert topk.num_rows > tokens.num_rows > 0


@pytest.mark.parametrize(
    ("view", "condition"),
    [
        ("samples", "sample_id = 'sample-0010'"),
        ("samples", "sample_id IN ('sample-0010', 'sample-0031') AND cache = 'main'"),
        ("samples", "sample_id > 'sample-0011' OR task = 'reading'"),
        ("samples", "len(response_ids) > 3 AND cache <> 'main'"),
        ("tokens", "sample_id = 'sample-0010' AND entropy > 1"),
        ("tokens", "label_rank > 1 AND task = 'caption'"),
        ("tokens", "position BETWEEN 1 AND 2 AND split LIKE 'te%'"),
        ("topk", "rank = 1 AND logprob > -0.5"),
        ("topk", "sample_id = 'sample-0020' AND token_id % 2 = 0"),
        ("pairs", "pair_id = 'pair-0002'"),
        ("images", "width = 4 AND cache = 'pairs'"),
        ("sample_index", "sample_id = 'sample-0010'"),
    ],
)
def test_filters_select_what_they_say(lake: Lake, view: str, condition: str) -> None:
    """A filter that the scan applies gives the rows that DuckDB's own filter over everything gives."""
    publish_catalog(lake)
    with Catalog(lake) as catalog:
        pushed = catalog.query(f"SELECT * FROM {view} WHERE {condition} ORDER BY ALL")
        # A condition on a row number is applied by DuckDB itself, after the scan.
        numbered = f"SELECT *, row_number() OVER () AS n FROM {view}"
        behind = catalog.query(f"SELECT * EXCLUDE (n) FROM ({numbered}) WHERE {condition} ORDER BY ALL")
    assert pushed == behind
    assert pushed.num_rows > 0


def test_a_point_question_opens_one_shard(lake: Lake, make_unit: MakeUnit) -> None:
    """With every other shard gone, a sample is still found by its id, and a question for all is refused."""
    publish_catalog(lake)
    with Catalog(lake) as catalog:
        (place,) = catalog.find("sample-0010", cache="main")
    for cache in ("main", "other"):
        for path in lake.store.names(f"caches/{cache}/shards"):
            if path != place.entry.path:
                lake.store.delete(path)
    with Catalog(lake) as catalog:
        question = "SELECT sample_id FROM {} WHERE sample_id = 'sample-0010' AND cache = 'main'"
        assert catalog.query(question.format("samples")).num_rows == 1
        assert catalog.query(question.format("tokens")).num_rows == 4
        assert catalog.query("SELECT count(*) AS n FROM sample_index").to_pylist() == [{"n": 10}]
        with pytest.raises(LakeCorruptError, match="committed but missing"):
            catalog.query("SELECT count(*) FROM samples")


@pytest.mark.parametrize("published", [False, True])
def test_find_names_the_row(lake: Lake, make_unit: MakeUnit, published: bool) -> None:
    """Each place is that of the id's row, in every cache that has it; what came after publishing is found too."""
    if published:
        publish_catalog(lake)
    lake.cache("main").publish_unit(make_unit(4))
    lake.cache("main").snapshot()
    with Catalog(lake) as catalog:
        for sample_id, caches in {
            "sample-0011": ["main", "other"],
            "sample-0030": ["main"],
            "sample-0040": ["main"],
        }.items():
            places = catalog.find(sample_id)
            assert [place.cache for place in places] == caches
            for place in places:
                rows = lake.cache(place.cache).read(place.entry)
                assert rows.column("sample_id")[place.row].as_py() == sample_id
                assert place.row_group == 0
        assert [place.cache for place in catalog.find("pair-0002")] == ["pairs"]
        assert catalog.find("sample-0011", cache="pairs") == []
        assert catalog.find("nobody") == []


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    "statement",
    [
        "COPY (SELECT 1) TO 'stolen.csv'",
        "WITH x AS (COPY (SELECT 1) TO 'stolen.csv') FROM x",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO 'stolen.csv'",
        "COPY samples TO 'lake/lake.json'",
        "WITH x AS (INSERT INTO cat.errors SELECT * FROM cat.errors RETURNING *) FROM x",
        "WITH x AS (DELETE FROM late_shards RETURNING *) FROM x",
        "INSERT INTO cat.errors SELECT * FROM cat.errors",
        "CREATE TABLE cat.more (a INTEGER)",
        "CREATE TABLE more (a INTEGER)",
        "CREATE OR REPLACE TEMP VIEW samples AS SELECT 99 AS sample_id",
        "DROP VIEW samples",
        "DETACH cat",
        "ATTACH 'other.duckdb'",
        "EXPORT DATABASE 'stolen'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "CHECKPOINT cat",
        "PRAGMA enable_profiling = 'json'",
        "SET threads = 1",
        "SET VARIABLE x = 1",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_parquet('lake/caches/main/shards/*.parquet')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('*')",
        "PREPARE p AS SELECT 1",
        "CALL force_checkpoint()",
    ],
)
def test_a_question_changes_nothing(
    lake: Lake, tmp_path: Path, statement: str, published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statements that write, read other files or change settings are refused, and leave every file as it was."""
    if published:
        publish_catalog(lake)
    monkeypatch.chdir(tmp_path)
    before = _files(tmp_path)
    with Catalog(lake) as catalog:
        with pytest.raises(QueryError):
            catalog.query(statement)
        assert catalog.query("SELECT count(*) AS n FROM samples").to_pylist() == [{"n": 8}]
    assert _files(tmp_path) == before


def test_sql_catches_flipped_bits(lake: Lake) -> None:
    """A flipped bit of a shard is refused by SQL or changes no answer (it then lies where nothing is read)."""
    publish_catalog(lake)
    question = "SELECT * FROM samples WHERE sample_id = 'sample-0010' AND cache = 'main'"
    with Catalog(lake) as catalog:
        truth = catalog.query(question)
        (place,) = catalog.find("sample-0010", cache="main")
    shard = Path(lake.store.uri) / place.entry.path
    good, refused = shard.read_bytes(), 0
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * len(good), 60):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << int(bit % 8)
        shard.write_bytes(bytes(damaged))
        with Catalog(lake) as catalog:
            try:
                assert catalog.query(question) == truth
            except LakeError:
                refused += 1
    assert refused > 30  # half of the bits at least lie in pages and footer


def test_batches_are_the_answer_in_pieces(lake: Lake) -> None:
    """A streamed answer equals the whole one; what goes wrong while it is read is explained too."""
    question = "SELECT * FROM topk ORDER BY ALL"
    with Catalog(lake) as catalog:
        assert catalog.query_batches(question).read_all() == catalog.query(question)
        assert catalog.query_batches("SELECT * FROM topk WHERE rank = 0").read_all().num_rows == 0
        with pytest.raises(QueryError, match="Could not convert"):
            catalog.query_batches("SELECT task::INTEGER FROM samples").read_all()


def test_a_lake_may_be_moved(lake: Lake, tmp_path: Path) -> None:
    """A lake with its catalog answers the same from another folder: no path in it is absolute."""
    publish_catalog(lake)
    with Catalog(lake) as catalog:
        before = [catalog.query(question) for question in QUESTIONS]
    shutil.move(tmp_path / "lake", tmp_path / "elsewhere")
    with Catalog(Lake.open(tmp_path / "elsewhere")) as catalog:
        assert [catalog.query(question) for question in QUESTIONS] == before


def test_a_lake_without_snapshot_is_explained(tmp_path: Path, capture_spec: CaptureSpec) -> None:
    """There is nothing to ask before a snapshot; the message says what to wait for."""
    lake = Lake.create(tmp_path / "lake")
    lake.create_cache("main", capture_spec)
    with pytest.raises(LakeError, match="no cache has a snapshot yet"):
        Catalog(lake)
    with pytest.raises(LakeError, match="no cache has a snapshot yet"):
        publish_catalog(lake)


def test_a_null_list_becomes_nulls() -> None:
    """A list that a row does not have flattens to as many nulls as the row's other lists have elements."""
    lists = pa.array([[1, 2], None, [3]], pa.list_(pa.int32()))
    assert flatten_lists(lists, np.array([2, 3, 1])).to_pylist() == [1, 2, None, None, None, 3]


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionaries and nullability, which two ways to the same values need not share."""
    return pa.table({name: table.column(name).to_pylist() for name in table.schema.names})


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
