"""Columns that came to the format later: null where nobody captured them, in every shard and for every reader."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from logitlake_schemas import COLUMNS, CaptureSpec, ShardKind
from logitlake_shared.catalog import Catalog
from logitlake_shared.errors import LakeFormatError
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.rows import LakeSample, pairs_from_table, pairs_to_table, samples_from_table, samples_to_table
from logitlake_shared.shards import Shard, write_shard
from logitlake_shared.tools.inspect_sample import SampleView, find_sample, view_sample
from logitlake_shared.tools.inspect_text import print_sample
from logitlake_shared.tools.stats import GroupStats, cache_stats
from logitlake_shared.tools.stats_text import figure_rows

MakeUnit = Callable[..., UnitResult]
NO_IMAGE_T = np.array([-1.0, -2.0, -3.0, -4.0], np.float32)
TAIL_T = np.array([-0.5, -0.25, -0.125, -1.0], np.float32)
OPTIONAL = {kind: {column.name for column in columns if column.nullable} for kind, columns in COLUMNS.items()}


@pytest.fixture
def new_unit(make_unit: MakeUnit) -> UnitResult:
    """Unit 2: its first sample has every optional column, its second none."""
    unit = make_unit(2)
    first, second = unit.samples
    return replace(unit, samples=[_with_everything(first), second])


@pytest.fixture
def cache(tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit, new_unit: UnitResult) -> Cache:
    """A lake of one shard as it was before the columns came, and one with them."""
    cache = Lake.create(tmp_path / "lake").create_cache("main", capture_spec)
    cache.publish_unit(make_unit(1))
    cache.publish_unit(new_unit)
    cache.snapshot()
    return cache


def test_a_shard_without_any_value_leaves_the_column_out(make_unit: MakeUnit) -> None:
    """It costs nothing, and the bytes are those of a release that does not know the column."""
    stored = pq.ParquetFile(BytesIO(_written(samples_to_table(make_unit(1).samples), "samples"))).schema_arrow.names
    assert stored == [column.name for column in COLUMNS["samples"] if not column.nullable]


def test_rows_survive_the_shard(new_unit: UnitResult, make_pair_unit: Callable[[int], UnitResult]) -> None:
    """What a row has comes back bit for bit, what it does not have comes back as None."""
    first, second = samples_from_table(_stored(samples_to_table(new_unit.samples), "samples"))
    assert first.label_logprob_no_image_T is not None
    assert first.label_logprob_no_image_T.tolist() == NO_IMAGE_T.tolist()
    assert {t: tails.tolist() for t, tails in first.rows.log_tails_T.items()} == {2: TAIL_T.tolist()}
    assert second.label_logprob_no_image_T is None
    assert second.rows.log_tails_T == {}

    (plain,) = make_pair_unit(1).pairs
    rated = replace(
        plain,
        chosen_logprobs_no_image=np.array([-1, -2], np.float32),
        rejected_logprobs_no_image=np.array([-3, -4, -5], np.float32),
        chosen_rating=0.75,
        rejected_rating=-0.5,
    )
    one, other = pairs_from_table(_stored(pairs_to_table([plain, rated]), "pairs"))
    assert [getattr(one, name) for name in sorted(OPTIONAL["pairs"])] == [None] * 4
    assert (other.chosen_rating, other.rejected_rating) == (0.75, -0.5)
    assert other.rejected_logprobs_no_image is not None
    assert other.rejected_logprobs_no_image.tolist() == [-3, -4, -5]


def test_a_missing_column_that_is_not_optional_is_refused(make_unit: MakeUnit) -> None:
    """A shard without its entropy is not a shard: nothing is filled in for it."""
    file = pq.ParquetFile(BytesIO(_written(samples_to_table(make_unit(1).samples), "samples")))
    sink = BytesIO()
    with pq.ParquetWriter(sink, file.read().drop_columns(["entropy"]).schema) as writer:
        writer.write_table(file.read().drop_columns(["entropy"]))
        writer.add_key_value_metadata(file.metadata.metadata)
    shard = Shard(BytesIO(sink.getvalue()), "a shard")
    assert shard.read(["sample_id", "label_logprob_no_image"]).num_rows == 2
    with pytest.raises(LakeFormatError, match="a shard: columns entropy are missing"):
        shard.read()


def test_sql_gives_nulls_for_shards_without_them(cache: Cache) -> None:
    """One view over shards with and without: a value a token where it was captured, null elsewhere."""
    with Catalog(Lake(cache.store)) as catalog:
        tokens = catalog.query(
            "SELECT sample_id, label_logprob, label_logprob_no_image, visual_advantage, log_tail_mass_t2, "
            "log_tail_mass_t4 FROM tokens ORDER BY sample_id, position"
        ).to_pylist()
        alone = [
            catalog.query(f"SELECT {name} FROM tokens ORDER BY sample_id, position").column(0).to_pylist()
            for name in ("log_tail_mass_t2", "visual_advantage")
        ]
        kept = catalog.query("SELECT count(*) AS n FROM tokens WHERE visual_advantage IS NOT NULL").to_pylist()
    assert len(tokens) == 16
    captured = [row for row in tokens if row["sample_id"] == "sample-0020"]
    assert [row["log_tail_mass_t2"] for row in captured] == TAIL_T.tolist()
    assert [row["label_logprob_no_image"] for row in captured] == NO_IMAGE_T.tolist()
    np.testing.assert_array_equal(
        np.array([row["visual_advantage"] for row in captured], np.float32),
        np.array([row["label_logprob"] for row in captured], np.float32) - NO_IMAGE_T,
    )
    for row in tokens:
        assert row["log_tail_mass_t4"] is None
        if row not in captured:
            assert {row[name] for name in ("label_logprob_no_image", "visual_advantage", "log_tail_mass_t2")} == {None}
    assert alone == [[row[name] for row in tokens] for name in ("log_tail_mass_t2", "visual_advantage")]
    assert kept == [{"n": 4}]


def test_readers_give_nulls_for_shards_without_them(cache: Cache, tmp_path: Path) -> None:
    """A dataset over both; its record batches have one schema."""
    dataset = LakeDataset(tmp_path / "lake", "main")
    found = [dataset[position] for position in range(4)]
    assert [sample.label_logprob_no_image_T is not None for sample in found] == [False, False, True, False]
    names = ["sample_id", "label_logprob_no_image", "log_tail_mass_t2"]
    batches = list(dataset.iter_arrow(names, order="stored"))
    assert all(batch.schema.equals(dataset.arrow_schema(names)) for batch in batches)
    assert sum(batch.column(1).null_count for batch in batches) == 3


def test_pairs_without_them_are_read(tmp_path: Path, capture_spec: CaptureSpec, make_pair_unit: MakeUnit) -> None:
    """The ratings of a pair of a dataset are null in SQL and None in memory."""
    cache = Lake.create(tmp_path / "lake").create_cache("pairs", capture_spec.model_copy(update={"kind": "pairs"}))
    cache.publish_unit(make_pair_unit(1))
    cache.snapshot()
    assert PairDataset(tmp_path / "lake", "pairs")[0].chosen_rating is None
    with Catalog(Lake(cache.store)) as catalog:
        (row,) = catalog.query("SELECT * FROM pairs").to_pylist()
    assert {row[name] for name in OPTIONAL["pairs"]} == {None}


def test_inspect_shows_what_the_image_adds(cache: Cache) -> None:
    """Beside each token's logprob, and only for a sample where it was captured."""
    lake = Lake(cache.store)
    captured, plain = (view_sample(find_sample(lake, name), None, "") for name in ("sample-0020", "sample-0010"))
    tokens = captured.responses[0].tokens
    assert [token.logprob_no_image for token in tokens] == NO_IMAGE_T.tolist()
    assert {token.logprob_no_image for token in plain.responses[0].tokens} == {None}
    shown = _shown(captured)
    assert "image adds" in shown
    for token, no_image in zip(tokens, NO_IMAGE_T.tolist(), strict=True):
        assert f"{token.logprob - no_image:.3f}" in shown
    assert "image adds" not in _shown(plain)


def test_inspect_shows_how_a_pair_was_made(
    tmp_path: Path, capture_spec: CaptureSpec, make_pair_unit: Callable[[int], UnitResult]
) -> None:
    """The ratings stand beside the names, and the text that says how on a line of its own."""
    cache = Lake.create(tmp_path / "lake").create_cache("pairs", capture_spec.model_copy(update={"kind": "pairs"}))
    unit = make_pair_unit(1)
    made = replace(unit.pairs[0], made_by='{"by":"judge"}', chosen_rating=1.5, rejected_rating=-0.25)
    cache.publish_unit(replace(unit, pairs=[made]))
    cache.snapshot()
    view = view_sample(find_sample(Lake(cache.store), "pair-0001"), None, "")
    assert [response.rating for response in view.responses] == [1.5, -0.25]
    shown = _shown(view)
    assert 'made by  {"by":"judge"}' in shown
    assert "rating 1.500" in shown
    assert "rating -0.250" in shown


def test_stats_are_over_the_tokens_that_have_it(cache: Cache, tmp_path: Path) -> None:
    """The mean of what was captured, no zero for what was not, and no column where nothing was."""
    with Catalog(Lake(cache.store)) as catalog:
        by_task = cache_stats(catalog, "main")
        by_split = cache_stats(catalog, "main", by="split")
    dataset = LakeDataset(tmp_path / "lake", "main")
    sample = dataset[dataset.ids().index("sample-0020")]
    expected = float((sample.rows.label_logprob_T - NO_IMAGE_T).mean())
    assert isinstance(by_task.total, GroupStats)
    assert by_task.total.visual_advantage_mean == pytest.approx(expected, rel=1e-6)
    captured = {group.name: group for group in by_split.groups if isinstance(group, GroupStats)}
    assert captured["test"].visual_advantage_mean == pytest.approx(expected, rel=1e-6)
    assert captured["train"].visual_advantage_mean is None
    headings, rows = figure_rows(by_split)
    assert [row[headings.index("image adds, nats")] for row in rows] == [f"{expected:.4f}", "", f"{expected:.4f}"]
    without = replace(by_split, total=replace(by_task.total, visual_advantage_mean=None), groups=(captured["train"],))
    assert "image adds, nats" not in figure_rows(without)[0]


def _shown(view: SampleView) -> str:
    text = StringIO()
    print_sample(view, console=Console(file=text, width=160))
    return text.getvalue()


def _with_everything(sample: LakeSample) -> LakeSample:
    return replace(sample, label_logprob_no_image_T=NO_IMAGE_T, rows=replace(sample.rows, log_tails_T={2: TAIL_T}))


def _written(table: object, kind: ShardKind) -> bytes:
    return write_shard(table, kind, cache="c", unit="u", spec_fingerprint="f")


def _stored(table: object, kind: ShardKind) -> object:
    return Shard(BytesIO(_written(table, kind)), "here").read()
