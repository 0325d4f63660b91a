"""A file of scores says what was written, of the sample that was asked for, or that it cannot."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tests.shared.conftest import made_scores

from logitlake_schemas import SCORE_COLUMNS, ScoresRecord, arrow_schema
from logitlake_shared.cli import cli
from logitlake_shared.errors import ConfigError, DataError, LogitLakeError
from logitlake_shared.lake import Lake
from logitlake_shared.reader import PairDataset
from logitlake_shared.student_scores import (
    LinkedStudents,
    ScoredSample,
    Scores,
    read_record,
    scores_of,
    scores_path,
    write_scores,
)


def are_equal(one: ScoredSample, other: ScoredSample) -> bool:
    """In every figure, bit by bit."""
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "demo" / "d2s" / "scores" / "main.parquet"


def test_what_was_written_is_read(small_lake: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it in order, and each sample by its id, in whatever row group it lies."""
    monkeypatch.setattr("logitlake_shared.student_scores._GROUP_ENTRIES", 20)
    written = made_scores(small_lake, path)
    scores = Scores(path)
    assert pq.ParquetFile(path).num_row_groups > 2
    assert all(map(are_equal, scores, written))
    assert len(list(scores)) == len(written)
    for sample in written:
        found = scores.find(sample.sample_id)
        assert found is not None
        assert are_equal(found, sample)
    for absent in ("", "a", written[0].sample_id + "0", "zzz"):
        assert scores.find(absent) is None
    assert [path.name for path in path.parent.iterdir()] == ["main.parquet"]


def test_any_reader_of_parquet_takes_it(small_lake: Path, path: Path) -> None:
    """The declared columns, and lists of a length that plain SQL can count on."""
    import duckdb

    (*_, last) = made_scores(small_lake, path)
    assert pq.read_schema(path).names == arrow_schema(SCORE_COLUMNS).names
    asked = f"SELECT sum(list_sum(forward_kl)), sum(len(topk_ids)), sum(list_sum(k)) FROM '{path}' WHERE sample_id = ?"
    kl, num_entries, k = duckdb.execute(asked, [last.sample_id]).fetchall()[0]
    assert kl == pytest.approx(float(last.forward_kl_T.sum()))
    assert num_entries == k == last.topk_ids_TK.size


def test_one_sample_costs_as_little_where_many_choices_are_kept(path: Path) -> None:
    """A row group, which is read for it, has as many bytes with a thousand choices of each token as with eight."""
    facts = {"student": "demo/d2s", "model_sha256": "0" * 64, "dtype": "float32", "cache": "main", "snapshot": 1}
    record = ScoresRecord.model_validate(facts | {"spec_fingerprint": "1" * 64, "split": None, "top": 1000})
    figures_T, entries_TK = np.zeros(100, np.float32), np.zeros((100, 1000), np.float32)
    with write_scores(path, record) as scores:
        for number in range(10):
            scores.add(
                [
                    ScoredSample(
                        f"s{number}", "t", figures_T, figures_T.astype(np.int32), figures_T, figures_T,
                        entries_TK.astype(np.int32), entries_TK,
                    )
                ]
            )  # fmt: skip
    assert pq.ParquetFile(path).metadata.num_row_groups == 4  # of 300,000 entries, the first that are over 2**18
    assert Scores(path).find("s9") is not None


def test_of_two_writers_one_is_refused(small_lake: Path, path: Path) -> None:
    made_scores(small_lake, path)
    with write_scores(path, read_record(path)), pytest.raises(ConfigError, match="another process is writing"):
        made_scores(small_lake, path)
    assert list(Scores(path)) == []  # that of the one that ended last


def test_a_writer_that_is_killed_leaves_what_was_there(small_lake: Path, path: Path) -> None:
    """SIGKILL in the middle: the old scores stay, and the next writer is not kept out by what is left of it."""
    written = made_scores(small_lake, path)
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from logitlake_shared.student_scores import read_record, write_scores; path = Path(sys.argv[1])\n"
        "with write_scores(path, read_record(path)):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], timeout=60, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(path.parent.iterdir())) == 2
    assert all(map(are_equal, Scores(path), written))
    made_scores(small_lake, path, num_samples=1)
    assert len(list(Scores(path))) == 1
    assert len(list(path.parent.iterdir())) == 1


def test_no_flipped_bit_is_believed(small_lake: Path, path: Path) -> None:
    """Every byte of the file, one after the other: an error, or the same scores."""
    written = made_scores(small_lake, path, num_samples=2)
    data = path.read_bytes()
    num_errors = 0
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        try:
            read = list(Scores(path))
        except LogitLakeError:
            num_errors += 1
        else:
            assert len(read) == len(written)
            assert all(map(are_equal, read, written)), place
    assert num_errors > len(data) / 7 / 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b"PAR1"), "cannot be read as scores"),
        (lambda path: pq.write_table(pq.read_table(path).select(["task"]), path), "not a file of scores"),
    ],
)
def test_what_is_no_scores_is_said(small_lake: Path, path: Path, spoil: Any, says: str) -> None:
    made_scores(small_lake, path)
    spoil(path)
    with pytest.raises(LogitLakeError, match=says):
        scores_of(path, Lake.open(small_lake).cache("main"), "sample-0010")


def test_students_are_linked_by_the_fingerprint(
    small_lake: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By run and stage; those of another cache are not there, and a damaged file hides nobody else."""
    runs, main = tmp_path / "runs", Lake.open(small_lake).cache("main")
    first, *_, last = made_scores(small_lake, scores_path(runs / "b" / "d2s", "main", None))
    made_scores(small_lake, scores_path(runs / "a" / "d2d", "main", "test"), num_samples=1, split="test")
    made_scores(small_lake, scores_path(runs / "c" / "d2d", "main", None), spec_fingerprint="another")
    made_scores(small_lake, scores_path(runs / "e" / "d2d", "main", None), format_version=2)
    damaged = scores_path(runs / "d" / "d2d", "main", None)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no")
    linked = LinkedStudents(runs, main)
    assert linked.names == ["a/d2d", "b/d2s"]
    assert (linked.scored_on("test"), linked.scored_on("train")) == (["a/d2d", "b/d2s"], ["b/d2s"])
    assert str(damaged) in caplog.text
    assert "format version 2, this release reads 1" in caplog.text
    assert are_equal(linked.find("b/d2s", last.sample_id), last)
    assert are_equal(linked.find("a/d2d", first.sample_id), first)
    with pytest.raises(DataError, match=r"samples of split 'test' of snapshot 1, and .* is none of them"):
        linked.find("a/d2d", last.sample_id)
    with pytest.raises(DataError, match="no student 'c/d2d' was scored on this cache; there are a/d2d, b/d2s"):
        linked.find("c/d2d", last.sample_id)
    assert LinkedStudents(tmp_path / "nowhere", main).names == []


def test_scores_of_one_cache_are_never_in_the_place_of_anothers(tmp_path: Path) -> None:
    """Whatever caches and splits are called: each has its own file, where the viewer looks for it."""
    of = [("main", None), ("main", "test"), ("main-test", None), ("main.test", None), ("main", "a/b"), ("main", "../x")]
    paths = {scores_path(tmp_path / "runs" / "demo" / "d2s", cache, split) for cache, split in of}
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert paths == set((tmp_path / "runs").glob("*/*/scores/*.parquet"))
    assert len(paths) == len(of)


def test_a_folder_of_many_runs_is_read_once(
    small_lake: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at a sample asks for the students of the cache; only files that are new are opened."""
    made_scores(small_lake, path)
    runs, main = tmp_path / "runs", Lake.open(small_lake).cache("main")
    for number in range(1100):
        stage = runs / f"run-{number:04}" / "d2s"
        scores_path(stage, "main", None).parent.mkdir(parents=True)
        scores_path(stage, "main", None).hardlink_to(path)
    assert len(LinkedStudents(runs, main).names) == 1101
    monkeypatch.setattr("logitlake_shared.student_scores._opened", lambda path: pytest.fail(f"{path} is opened"))
    assert len(LinkedStudents(runs, main).names) == 1101


def test_scores_that_are_removed_meanwhile_are_not_there(small_lake: Path, path: Path) -> None:
    """Between the list of students and the look at one."""
    (written, *_) = made_scores(small_lake, path)
    linked = LinkedStudents(path.parents[3], Lake.open(small_lake).cache("main"))
    path.unlink()
    with pytest.raises(DataError, match="score it again"):
        linked.find("demo/d2s", written.sample_id)


def test_inspect_shows_a_student_beside_the_teacher(small_lake: Path, path: Path) -> None:
    """As JSON every figure of the file; on a terminal the two choices beside each other."""
    written = made_scores(small_lake, path)[0]
    command = ["inspect", str(small_lake), written.sample_id, "--scores", str(path)]
    alone = json.loads(run(*command[:3], "-o", "json"))
    beside = json.loads(run(*command, "-o", "json", "--top", "2"))
    assert (alone["student"], beside["student"]) == (None, "demo/d2s")
    for t, token in enumerate(beside["responses"][0]["tokens"]):
        student = token["student"]
        assert student["logprob"] == pytest.approx(float(written.label_logprob_T[t]))
        assert student["forward_kl"] == pytest.approx(float(written.forward_kl_T[t]))
        assert (student["rank"], student["entropy"]) == (written.label_rank_T[t], pytest.approx(written.entropy_T[t]))
        assert [choice["token_id"] for choice in student["alternatives"]] == written.topk_ids_TK[t, :2].tolist()
        assert {name: token[name] for name in ("logprob", "rank")} == {
            name: alone["responses"][0]["tokens"][t][name] for name in ("logprob", "rank")
        }
    shown = run(*command)
    assert "demo/d2s" in shown
    assert "the student's" in shown
    assert f"{written.forward_kl_T[0]:.3f}" in shown


def test_scores_of_other_samples_are_not_shown(small_lake: Path, path: Path) -> None:
    """Of another cache, of a pair, of a sample that was not scored: each is told, none is shown."""
    *_, last = made_scores(small_lake, path, num_samples=2)
    pair = PairDataset(small_lake, "pairs").ids()[0]
    for sample, says in (("sample-0031", "is none of them"), (pair, "scores of cache 'main'")):
        with pytest.raises(DataError, match=says):
            run("inspect", str(small_lake), sample, "--scores", str(path))
    assert last.sample_id in run("inspect", str(small_lake), last.sample_id, "--scores", str(path))


def run(*arguments: str) -> str:
    """What a command prints. Raises what it raises."""
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False, standalone_mode=False, terminal_width=200)
    if result.exception is not None:
        raise result.exception
    return result.output
