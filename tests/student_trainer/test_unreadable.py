"""C5 and C8: shards that go bad in the middle of an epoch, and how much of the teacher the lake holds."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitlake_shared.errors import LakeCorruptError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_student.config import TrainConfig

Metrics = Callable[[Path], list[dict[str, Any]]]

# The session's 13 samples and as many copies of one of them in a unit of its own.
NUM_GOOD, NUM_BAD = 13, 4
# Means of float32 shares.
TOLERANCE = 1e-6
D2D = {"type": "d2d", "steps": 6, "batch_size": 8, "log_every": 1, "save_every": 1}


@pytest.fixture
def damaged_lake(student_lake: Path, tmp_path: Path) -> Path:
    """A copy of the session's lake with a unit more, in whose rows a bit has flipped."""
    lake = tmp_path / "lake"
    shutil.copytree(student_lake, lake)
    sample = LakeDataset(lake, "main", split="train")[4]
    cache = Lake.open(lake).cache("main")
    copies = [replace(sample, sample_id=f"z{number}", image_sha256=()) for number in range(NUM_BAD)]
    cache.publish_unit(UnitResult(unit="999999-later", samples=copies))
    cache.snapshot()
    (shard,) = (lake / "caches" / "main" / "shards").glob("999999-later-*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 4] ^= 1  # in a page of rows: the footer, which is read first, is whole
    shard.write_bytes(data)
    return lake


def config_of(student_world: Any, lake: Path, **data: Any) -> TrainConfig:
    document = student_world.document(D2D)
    return TrainConfig.model_validate(document | {"data": {"lake": str(lake), "samples": "main"} | data})


def test_the_first_unreadable_sample_stops_the_stage(student_world: Any, damaged_lake: Path) -> None:
    """By default: with the shard, the samples it holds, and what to do."""
    with pytest.raises(LakeCorruptError, match=r"999999-later.*1 of 17 items cannot be read.*verify --repair"):
        student_world.train(config_of(student_world, damaged_lake))


def test_within_the_share_they_are_left_out_and_counted(
    student_world: Any, damaged_lake: Path, metrics_of: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three epochs over 17 samples of which four are gone: every step is taken, the count ends at four, and the shard
    is named once on the terminal."""
    capsys.readouterr()
    folder = student_world.train(config_of(student_world, damaged_lake, max_unreadable=0.3))
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["unreadable"] == NUM_BAD
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert capsys.readouterr().err.count("left out: ") == 1


def test_one_too_many_stops_the_stage(student_world: Any, damaged_lake: Path) -> None:
    """4 of 17 is more than a fifth."""
    with pytest.raises(LakeCorruptError, match=r"4 of 17 items cannot be read, `data.max_unreadable` is 0.2"):
        student_world.train(config_of(student_world, damaged_lake, max_unreadable=0.2))


def test_the_cached_mass_is_told(student_world: Any, metrics_of: Metrics, tmp_path: Path, capture_samples: Any) -> None:
    """The mean over response tokens of what the cached entries hold: all of it with the whole vocabulary, less with
    two entries a token, and what the lake's own columns say."""
    lake = tmp_path / "few"
    capture_samples(lake, "main", codec={"k_max": 2, "p_min": 0.0, "grid": "exact", "max_mean_kl": 1.0})
    document = student_world.document(D2D | {"steps": 1, "batch_size": NUM_GOOD})
    for path, output in ((student_world.lake, "whole"), (lake, "few")):
        config = document | {"data": {"lake": str(path), "samples": "main"}, "output": str(tmp_path / output)}
        line = metrics_of(student_world.train(TrainConfig.model_validate(config)))[0]
        dataset = LakeDataset(path, "main", split="train")
        tails = np.concatenate([dataset[place].rows.log_tail_mass_T for place in range(len(dataset))])
        assert line["cached_mass"] == pytest.approx(float(np.mean(1 - np.exp(tails))), abs=TOLERANCE * 100)
    assert line["cached_mass"] < 0.9


def test_samples_of_which_little_is_cached_are_told_by_name(
    student_world: Any, tmp_path: Path, capture_samples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """C8: before the first step; those below the threshold, the least first, with what the lake's own rows say."""
    lake = tmp_path / "few"
    capture_samples(lake, "main", codec={"k_max": 2, "p_min": 0.0, "grid": "exact", "max_mean_kl": 1.0})
    dataset = LakeDataset(lake, "main", split="train")
    samples = [dataset[place] for place in range(len(dataset))]
    masses = {s.sample_id: float(np.mean(1 - np.exp(s.rows.log_tail_mass_T.astype(np.float64)))) for s in samples}
    ascending = sorted(masses, key=lambda sample_id: masses[sample_id])
    threshold = (masses[ascending[2]] + masses[ascending[3]]) / 2

    capsys.readouterr()
    data = {"lake": str(lake), "samples": "main", "min_cached_mass": threshold}
    document = student_world.document(D2D | {"steps": 1}) | {"data": data}
    folder = student_world.train(TrainConfig.model_validate(document))
    told = json.loads((folder / "cached-mass.json").read_text())
    assert list(told["lowest"]) == ascending[:3]
    assert told["lowest"] == pytest.approx({sample_id: masses[sample_id] for sample_id in ascending[:3]}, abs=TOLERANCE)
    assert (told["num_below"], told["num_samples"]) == (3, NUM_GOOD)
    bins = np.histogram(list(masses.values()), len(told["samples_by_mass"]), (0, 1))[0]
    assert told["samples_by_mass"] == bins.tolist()
    err = capsys.readouterr().err
    assert "of 3 of 13 samples" in err
    assert str(folder / "cached-mass.json") in err


def test_a_lake_that_holds_enough_is_not_warned_of(student_world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    folder = student_world.train(student_world.train_config(D2D | {"steps": 1}))
    assert json.loads((folder / "cached-mass.json").read_text())["num_below"] == 0
    assert "cached-mass" not in capsys.readouterr().err
