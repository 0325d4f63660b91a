"""C15: pairs that say nothing, or of which the teacher said nothing, are left out with a code, and dilute no figure."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitlake_shared.errors import DataError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import PairDataset
from logitlake_shared.rows import LakePair
from logitlake_student.usable_pairs import UsablePairs, code_of

Metrics = Callable[[Path], list[dict[str, Any]]]

PREFERENCE = {"type": "preference", "batch_size": 6, "steps": 3}
NOTHING = np.zeros(0, np.int32), np.zeros(0, np.float32)


def side(*ids: int, logprob: float = -1.0) -> tuple[Any, Any]:
    """Token ids and a logprob for each."""
    return np.array(ids, np.int32), np.full(len(ids), logprob, np.float32)


def one_sided(pair: LakePair) -> LakePair:
    """No rejected response."""
    return replace(pair, rejected_ids=NOTHING[0], rejected_logprobs=NOTHING[1])


def equal(pair: LakePair) -> LakePair:
    """Twice the chosen response."""
    return replace(pair, rejected_ids=pair.chosen_ids, rejected_logprobs=pair.chosen_logprobs)


def not_scored(pair: LakePair) -> LakePair:
    """A logprob that is no number."""
    logprobs = pair.chosen_logprobs.copy()
    logprobs[1] = np.nan
    return replace(pair, chosen_logprobs=logprobs)


CODES = {"pair_one_sided": one_sided, "pair_equal": equal, "pair_not_scored": not_scored}


@pytest.fixture
def lake_with_bad_pairs(student_lake: Path, tmp_path: Path) -> Path:
    """The session's six pairs and one of each kind that cannot be learned from, named so that they come in between."""
    lake = tmp_path / "lake"
    shutil.copytree(student_lake, lake)
    pairs = PairDataset(lake, "preference")
    bad = [
        replace(spoil(pairs[place]), pair_id=f"{pairs[place].pair_id}-{code}")
        for place, (code, spoil) in enumerate(CODES.items())
    ]
    bad = [replace(pair, image_sha256=(), images=()) for pair in bad]
    cache = Lake.open(lake).cache("preference")
    cache.publish_unit(UnitResult(unit="999999-bad", pairs=bad))
    cache.snapshot()
    return lake


@pytest.mark.parametrize(
    ("sides", "code"),
    [
        ([side(4, 5), side(4, 6)], None),
        ([side(4, 5), side(4)], None),
        ([NOTHING, side(4)], "pair_one_sided"),
        ([side(4), NOTHING], "pair_one_sided"),
        ([NOTHING, NOTHING], "pair_one_sided"),
        ([side(4, 5), side(4, 5, logprob=-2)], "pair_equal"),
        ([side(4, 5), side(6, logprob=float("-inf"))], "pair_not_scored"),
        ([(side(4, 5)[0], NOTHING[1]), side(6)], "pair_not_scored"),
    ],
)
def test_the_code_of_a_pair(sides: Any, code: str | None) -> None:
    """The first that holds; a stage that does not measure by the teacher does not need its logprobs."""
    assert code_of(sides, measured_by_teacher=True) == code
    assert code_of(sides, measured_by_teacher=False) == (None if code == "pair_not_scored" else code)


def test_they_are_left_out_counted_and_named(
    student_world: Any, lake_with_bad_pairs: Path, metrics_of: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage takes the steps of one whose lake holds no such pair: every figure of every line, and the weights."""
    expected = student_world.train(student_world.train_config(PREFERENCE, output=str(student_world.folder / "good")))
    assert "left out" not in capsys.readouterr().err
    folder = student_world.train(student_world.train_config(PREFERENCE, data={"lake": str(lake_with_bad_pairs)}))
    assert "3 of 9 pairs are left out (pair_equal 1, pair_not_scored 1, pair_one_sided 1)" in capsys.readouterr().err
    counts = dict.fromkeys(sorted(CODES), 1)
    assert json.loads((folder / "done.json").read_text())["figures"]["pairs_left_out"] == counts
    assert "pairs_left_out" not in json.loads((expected / "done.json").read_text())["figures"]
    named = json.loads((folder / "left-out.json").read_text())
    assert sorted(named.values()) == sorted(CODES)
    assert all(pair_id.endswith(code) for pair_id, code in named.items())
    # Another row group, another order: what an epoch, a batch of all six, says of them is the same.
    first, same = metrics_of(folder)[0], metrics_of(expected)[0]
    for name in ("margin", "chosen_reward", "rejected_reward", "preferred", "nll", "loss"):
        assert first[name] == pytest.approx(same[name], abs=1e-5)


def test_a_stage_that_measures_by_itself_needs_no_teacher(lake_with_bad_pairs: Path) -> None:
    """Then only what says nothing is left out."""
    pairs = PairDataset(lake_with_bad_pairs, "preference")
    assert len(UsablePairs(pairs, measured_by_teacher=True)) == 6
    usable = UsablePairs(pairs, measured_by_teacher=False)
    assert usable.counts() == {"pair_equal": 1, "pair_one_sided": 1}
    assert len(usable) == len(usable.layout) == 7
    assert [usable[place].pair_id for place in range(7)] == [
        pair_id for pair_id in pairs.ids() if pair_id not in usable.left_out
    ]
    assert [pair.pair_id for pair in usable.__getitems__([6, 0])] == [usable[6].pair_id, usable[0].pair_id]


def test_nothing_left_is_an_error(student_world: Any, lake_with_bad_pairs: Path) -> None:
    """Before the first step, with the codes and what to do."""
    lake = Lake.open(lake_with_bad_pairs)
    (bad,) = [pair for pair in PairDataset(lake, "preference").ids() if pair.endswith("pair_equal")]
    pairs = PairDataset(lake, "preference")
    cache = lake.create_cache("bad", lake.cache("preference").spec)
    cache.publish_unit(UnitResult(unit="000000-bad", pairs=[pairs[pairs.ids().index(bad)]]))
    cache.snapshot()
    config = student_world.train_config(PREFERENCE, data={"lake": str(lake_with_bad_pairs), "pairs": "bad"})
    with pytest.raises(DataError, match=r"none of 1 pairs can be learned from: {'pair_equal': 1}"):
        student_world.train(config)
    assert not (student_world.output / "preference").exists()
