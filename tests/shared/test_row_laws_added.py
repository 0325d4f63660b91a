"""The laws of what was added to a row: each is reported where it breaks, and sound rows break none."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from logitlake_schemas import PAIR_COLUMNS, SAMPLE_COLUMNS, CaptureSpec, CodecPolicy, arrow_schema
from logitlake_shared.lake import UnitResult
from logitlake_shared.rows import pairs_to_table, samples_to_table
from logitlake_shared.tools.row_laws import check_pairs, check_samples

MakeUnit = Callable[..., UnitResult]
Row = dict[str, Any]
CODEC = CodecPolicy(k_max=8, k_min=8, temperatures=(2,))


@pytest.fixture
def spec(capture_spec: CaptureSpec) -> CaptureSpec:
    """Tails at T = 2 were captured, and a second pass without images."""
    return capture_spec.model_copy(update={"codec": CODEC, "no_image_pass": True})


@pytest.fixture
def rows(make_unit: MakeUnit) -> list[Row]:
    """Three sound samples of four tokens; the first has no image, the last was stopped by length."""
    samples = [
        replace(
            sample,
            label_logprob_no_image_T=np.array([-1, -2, -3, -4], np.float32),
            rows=replace(sample.rows, log_tails_T={2: sample.rows.log_tail_mass_T / np.float32(2)}),
        )
        for sample in make_unit(1, codec=CODEC.model_copy(update={"temperatures": ()}), num_samples=3).samples
    ]
    samples[0] = replace(samples[0], image_sha256=(), label_logprob_no_image_T=None)
    table = samples_to_table(samples).to_pylist()
    table[2] |= {"finish_reason": "length"}
    table[2]["response_ids"][3] = 10
    # The label's figures are those of an entry outside the stored ones.
    table[2]["label_rank"][3] = 39
    if 10 in table[2]["topk_ids"][24:]:
        table[2]["topk_ids"][24 + table[2]["topk_ids"][24:].index(10)] = 39
    return list(table)


BREAKS: dict[str, tuple[str, int, Callable[[Row], object]]] = {
    "shorter than the response": ("lengths", 1, lambda row: row["label_logprob_no_image"].pop()),
    "longer than the response": ("lengths", 1, lambda row: row["log_tail_mass_t2"].append(-0.1)),
    "second pass missing": ("present", 1, lambda row: row.update(label_logprob_no_image=None)),
    "second pass of nothing": ("present", 0, lambda row: row.update(label_logprob_no_image=[-1.0] * 4)),
    "tail at 2 missing": ("present", 1, lambda row: row.update(log_tail_mass_t2=None)),
    "tail at 4 that nobody asked for": ("present", 1, lambda row: row.update(log_tail_mass_t4=[-0.1] * 4)),
    "NaN without the image": ("finite", 1, lambda row: _set(row, "label_logprob_no_image", np.nan)),
    "above 1 without the image": ("finite", 1, lambda row: _set(row, "label_logprob_no_image", 0.5)),
    "NaN tail at 2": ("finite", 1, lambda row: _set(row, "log_tail_mass_t2", np.nan)),
    "tail at 2 is everything": ("mass", 1, lambda row: _set(row, "log_tail_mass_t2", 0.0)),
    "tail at 2 below that at 1": ("mass", 1, lambda row: _set(row, "log_tail_mass_t2", row["log_tail_mass"][2] - 1)),
    "no EOS, and not by length": ("eos", 1, lambda row: row["response_ids"].__setitem__(3, 39)),
    "EOS missing and a reason of the data": ("eos", 2, lambda row: row.update(finish_reason="given")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_law_is_reported_where_it_breaks(spec: CaptureSpec, rows: list[Row], name: str) -> None:
    """One value of one row is changed: its law is reported for that row alone."""
    law, place, change = BREAKS[name]
    assert _broken(rows, spec) == []
    change(rows[place])
    broken = check_samples(_table(rows), spec)
    assert law in {one.law for one in broken}
    assert {row for one in broken for row in one.rows.tolist()} == {place}


def test_a_spec_that_asked_for_nothing_wants_nothing(capture_spec: CaptureSpec, rows: list[Row]) -> None:
    """What is there although the spec did not ask is of another capture."""
    plain = capture_spec.model_copy(update={"codec": CodecPolicy(k_max=8, k_min=8)})
    broken = check_samples(_table(rows), plain)
    assert {one.law for one in broken} == {"present"}
    assert sorted(row for one in broken for row in one.rows.tolist()) == [0, 1, 1, 2, 2]


PAIR_BREAKS: dict[str, tuple[str, Callable[[Row], object]]] = {
    "shorter than the response": ("lengths", lambda row: row["rejected_logprobs_no_image"].pop()),
    "NaN without the image": ("finite", lambda row: row["chosen_logprobs_no_image"].__setitem__(0, np.nan)),
    "above 1 without the image": ("finite", lambda row: row["chosen_logprobs_no_image"].__setitem__(0, 0.5)),
    "one side only": ("present", lambda row: row.update(rejected_logprobs_no_image=None)),
    "one rating only": ("present", lambda row: row.update(chosen_rating=None)),
    "NaN rating": ("finite", lambda row: row.update(chosen_rating=np.nan)),
}


@pytest.mark.parametrize("name", PAIR_BREAKS)
def test_laws_of_pairs(capture_spec: CaptureSpec, make_pair_unit: MakeUnit, name: str) -> None:
    """The second of three pairs is changed; the first has none of it, and breaks nothing."""
    (pair,) = make_pair_unit(1).pairs
    rated = replace(
        pair,
        chosen_logprobs_no_image=np.array([-1, -2], np.float32),
        rejected_logprobs_no_image=np.array([-1, -2, -3], np.float32),
        chosen_rating=2.0,
        rejected_rating=1.0,
    )
    rows = pairs_to_table([pair, rated, rated]).to_pylist()
    schema = arrow_schema(PAIR_COLUMNS)
    assert check_pairs(pa.Table.from_pylist(rows, schema), capture_spec) == []
    law, change = PAIR_BREAKS[name]
    change(rows[1])
    broken = check_pairs(pa.Table.from_pylist(rows, schema), capture_spec)
    assert {one.law for one in broken} == {law}
    assert {row for one in broken for row in one.rows.tolist()} == {1}


def _set(row: Row, name: str, value: float) -> None:
    row[name][2] = value


def _table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, arrow_schema(SAMPLE_COLUMNS))


def _broken(rows: list[Row], spec: CaptureSpec) -> list[str]:
    return [f"{one.law}: {one.says}" for one in check_samples(_table(rows), spec)]
