"""A20, A21: where a lake lies and what time it is there change no byte of it, and hostile places are named."""

import os
import unicodedata
from dataclasses import replace
from errno import EACCES, EDQUOT, EROFS
from pathlib import Path

import pytest
from tests.faults.conftest import Bench
from tests.faults.harness import Fault
from tests.faults.laws import assert_finished, tree

from logitlake_shared.errors import LakeError, LakeFormatError
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset

REASONS = {"EROFS": os.strerror(EROFS), "EACCES": os.strerror(EACCES), "EDQUOT": os.strerror(EDQUOT)}
YEAR_S = 365 * 24 * 3600
# A name that is two strings in Unicode and one to the eye.
COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize("clock", [-3600, 24 * 3600, 20 * YEAR_S, -20 * YEAR_S])
def test_the_time_is_in_no_byte(bench: Bench, finished: dict[str, bytes], clock: int) -> None:
    """A capture whose clock is wrong by an hour or twenty years writes the same bytes."""
    outcome = bench.run("capture", Fault(clock=clock))
    assert outcome.ended == "done", outcome.said
    assert tree(bench.root) == finished


@pytest.mark.parametrize("clock", [-24 * 3600, 24 * 3600])
def test_a_clock_that_jumps_between_two_runs_loses_nothing(
    bench: Bench, finished: dict[str, bytes], clock: int
) -> None:
    """Two machines, two times: the second carries on where the first was killed."""
    assert bench.run("capture", Fault("kill_before", 50)).ended == "killed"
    assert bench.run("capture", Fault(clock=clock)).ended == "done"
    assert_finished(bench.root, bench.units, finished)


@pytest.mark.parametrize("errno", ["EROFS", "EACCES"])
def test_reading_changes_nothing(bench: Bench, errno: str) -> None:
    """A lake on a read-only disk is read like any other: the reader makes no call that changes anything."""
    assert bench.run("capture").ended == "done"
    for job in ("read", "ask"):
        outcome = bench.run(job, Fault(errno, 1, lasting=True))
        assert outcome.ended == "done", outcome.said
        assert outcome.calls == []


@pytest.mark.parametrize("errno", ["EROFS", "EACCES", "EDQUOT"])
def test_a_place_that_takes_nothing_is_named(bench: Bench, errno: str) -> None:
    """No lake can be made there: an error with the place and the system's reason, and nothing was left."""
    error = bench.run("capture", Fault(errno, 1, lasting=True)).error
    assert error["raised"] == "LakeError"
    assert str(bench.root) in error["message"]
    assert REASONS[errno] in error["message"]
    assert not bench.root.exists()


@pytest.mark.parametrize("part", ["lake", "caches", "caches/main", "caches/main/shards", "caches/main/commits"])
def test_a_file_where_a_folder_is_expected(bench: Bench, part: str) -> None:
    """An error that names the place, not a half-made lake."""
    blocked = bench.root if part == "lake" else bench.root / part
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way", encoding="utf-8")
    error = bench.run("capture").error
    assert error["explained"], error["traceback"]
    assert str(bench.root) in error["message"]
    assert blocked.read_text(encoding="utf-8") == "in the way"


@pytest.mark.parametrize("part", ["lake.json", "caches/main/spec.json", "caches/main/commits/000001-test.json"])
def test_a_folder_where_a_file_is_expected(bench: Bench, part: str) -> None:
    """The other way round."""
    (bench.root / part).mkdir(parents=True)
    error = bench.run("capture").error
    assert error["explained"], error["traceback"]
    assert str(bench.root) in error["message"]


def test_a_path_that_is_too_long_is_an_error_of_ours(bench: Bench) -> None:
    """Longer names than a file system has, and deeper folders."""
    for root in (bench.root / ("x" * 300), Path(str(bench.root) + "/deep" * 1000)):
        error = bench.run("capture", root=root).error
        assert error["explained"], error["traceback"]
        with pytest.raises(LakeFormatError):
            Lake.open(root)


@pytest.mark.parametrize(
    "name",
    ["with spaces and 'quotes\"", "señor/ñandú 日本", "per%20cent+plus", "hash#1", "back\\slash", "; $(x) *?", "-rf"],
)
def test_any_folder_will_do(bench: Bench, finished: dict[str, bytes], name: str) -> None:
    """A lake below a folder of any name: the same bytes, read by the dataset and by SQL, collected without loss."""
    root = bench.root.parent / name / "the lake"
    for job in ("capture", "gc", "read", "catalog", "ask"):
        outcome = bench.run(job, root=root)
        assert outcome.ended == "done", outcome.said
    files = {path: data for path, data in tree(root).items() if not path.startswith("catalog/")}
    assert files == finished
    assert len(outcome.all("rows")[0]) == 4


def test_two_spellings_of_a_folder_are_not_one_lake(bench: Bench) -> None:
    """Composed and decomposed names are two folders here, and a lake never confuses them."""
    composed, decomposed = bench.root.with_name(COMPOSED), bench.root.with_name(DECOMPOSED)
    assert bench.run("capture", root=composed).ended == "done"
    if not decomposed.exists():  # a file system that normalises names shows one folder, and that is one lake
        with pytest.raises(LakeFormatError):
            Lake.open(decomposed)
    assert len(LakeDataset(composed, "main")) == 4


@pytest.mark.parametrize(
    "name",
    [COMPOSED, DECOMPOSED, "", ".", "..", "a/b", "../up", "a b", "-a", ".a", "a\x00b", "a\nb", "x" * 101, "日本"],
)
def test_a_cache_is_named_in_plain_letters(bench: Bench, name: str) -> None:
    """What two file systems could spell, fold or split differently names no cache."""
    lake = Lake.create(bench.root)
    with pytest.raises(LakeError, match="cache name"):
        lake.create_cache(name, bench.spec)
    assert set(tree(bench.root)) == {"lake.json"}


def test_names_that_differ_in_case_alone_are_not_confused(bench: Bench) -> None:
    """Two caches where the file system tells their names apart, and a refusal where it does not."""
    lake = Lake.create(bench.root)
    lake.create_cache("main", bench.spec)
    other = bench.spec.model_copy(update={"kind": "pairs"})
    assert lake.create_cache("Main", other).spec.kind == "pairs"
    assert lake.cache("main").spec.kind == "samples"


@pytest.mark.parametrize("unit", ["", "../../escape", "a/b", "a\x00b", "x" * 300, COMPOSED])
def test_a_unit_cannot_leave_its_folder(bench: Bench, unit: str) -> None:
    """Unit names come from a planner; a wrong one is refused before anything is written."""
    cache = Lake.create(bench.root).create_cache("main", bench.spec)
    before = tree(bench.root)
    with pytest.raises(LakeError):
        cache.publish_unit(replace(bench.units[0], unit=unit))
    assert {path.name for path in bench.root.parent.iterdir()} <= {"lake", "scenario.pickle", "undisturbed"}
    assert tree(bench.root) == before
