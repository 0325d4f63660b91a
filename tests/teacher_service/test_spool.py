"""The out-of-core sort: whatever goes in comes out once, in order, some of it at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from logitlake_teacher.items import PlannedSample
from logitlake_teacher.planning import spool as spool_module
from logitlake_teacher.planning.rows import DIGEST_BYTES, Draft, plan_schema, rows_of
from logitlake_teacher.planning.spool import NUM_BUCKETS, Spool


def batch(numbers: list[int]) -> pa.RecordBatch:
    """Text-only samples, one for each number."""
    return rows_of("samples", [Draft(f"made: {number}", _sample(number)) for number in numbers])


def _sample(number: int) -> PlannedSample:
    ids = np.array([number], np.int32)
    one = np.array([1], np.int32)
    return PlannedSample(f"s{number}", "chat", "made", "train", [], ids, one, ids, one, (), ())


def read(spool: Spool) -> list[tuple[bytes, str]]:
    """Order key and id of every row, in the order of the buckets."""
    rows: list[tuple[bytes, str]] = []
    for table in spool.buckets():
        rows += zip(table.column("order_key").to_pylist(), table.column("item_id").to_pylist(), strict=True)
    return rows


@pytest.mark.parametrize("table_bytes", [1, 10_000, 1 << 30])
@pytest.mark.parametrize("buffer_bytes", [1, 20_000, 1 << 30])
def test_everything_comes_out_once_and_sorted(
    tmp_path: Path, buffer_bytes: int, table_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By order key and id, whether nothing, some or every batch was written, and however many are read at once."""
    monkeypatch.setattr(spool_module, "_BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(spool_module, "_TABLE_BYTES", table_bytes)
    with Spool(tmp_path / "spool", plan_schema("samples")) as spool:
        for start in range(0, 3000, 100):
            spool.append(batch(list(range(start, start + 100))[::-1]))
        rows = read(spool)
    assert rows == sorted(rows)
    assert sorted(item_id for _, item_id in rows) == sorted(f"s{number}" for number in range(3000))


def test_the_order_of_the_batches_does_not_matter(tmp_path: Path) -> None:
    """Two roads to one sequence."""
    sequences = []
    for name, order in (("one", [1, 2, 3, 4]), ("other", [3, 1, 4, 2])):
        with Spool(tmp_path / name, plan_schema("samples")) as spool:
            for number in order:
                spool.append(batch([number]))
            sequences.append(read(spool))
    assert sequences[0] == sequences[1]


def test_a_key_is_in_one_table(tmp_path: Path) -> None:
    """Equal questions have equal keys; a table that holds one of them holds all: units group by them."""
    with Spool(tmp_path / "spool", plan_schema("samples")) as spool:
        for copy in range(50):
            drafts = [Draft("", _renamed(_sample(number), f"{number}-{copy}")) for number in range(40)]
            spool.append(rows_of("samples", drafts))
        tables = list(spool.buckets())
    for table in tables:
        keys = table.column("order_key").to_pylist()
        assert all(keys.count(key) == 50 for key in set(keys))
    assert len(tables) <= NUM_BUCKETS


def _renamed(sample: PlannedSample, sample_id: str) -> PlannedSample:
    return PlannedSample(**{**vars(sample), "sample_id": sample_id})


def test_an_empty_spool_has_no_tables(tmp_path: Path) -> None:
    """Nothing in, nothing out."""
    with Spool(tmp_path / "spool", plan_schema("samples")) as spool:
        assert list(spool.buckets()) == []


def test_what_was_read_is_gone(tmp_path: Path) -> None:
    """The disk holds each row once: as a bucket, or in what the caller makes of it."""
    with Spool(tmp_path / "spool", plan_schema("samples")) as spool:
        spool.append(batch(list(range(100))))
        for _ in spool.buckets():
            pass
    assert list((tmp_path / "spool").iterdir()) == []


def test_keys_have_the_length_that_buckets_are_cut_by() -> None:
    """A law between two files: the first byte of each key is found by its length."""
    keys: Any = batch([1, 2, 3]).column("order_key")
    assert {len(key.as_py()) for key in keys} == {DIGEST_BYTES}
