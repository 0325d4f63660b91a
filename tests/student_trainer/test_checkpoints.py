"""A checkpoint is complete or it is not there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from logitlake_shared.errors import CheckpointError
from logitlake_student.checkpoints import newest_checkpoint, prune_checkpoints, publish_folder


def publish(stage: Path, step: int) -> Path:
    """A checkpoint of two files, one of them in a folder."""
    built = stage / ".building" / f"checkpoint-{step}"
    (built / "deep").mkdir(parents=True)
    (built / "weights").write_bytes(bytes(range(64)))
    (built / "deep" / "state").write_bytes(b"state of step %d" % step)
    publish_folder(built, stage / built.name)
    return stage / built.name


def test_the_newest_is_the_one_with_the_largest_step(tmp_path: Path) -> None:
    """By number, not by name: 10 comes after 9."""
    assert newest_checkpoint(tmp_path) is None
    publish(tmp_path, 9)
    tenth = publish(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == (10, tenth)


def test_publishing_twice_replaces(tmp_path: Path) -> None:
    """A checkpoint that is made again takes the place of the first."""
    publish(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "weights").write_bytes(b"damaged")
    publish(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == (1, tmp_path / "checkpoint-1")


def flip_a_byte(folder: Path) -> str:
    """One bit of the weights."""
    data = bytearray((folder / "weights").read_bytes())
    data[10] ^= 1
    (folder / "weights").write_bytes(bytes(data))
    return "weights is not what was written"


def truncate(folder: Path) -> str:
    """The file's end is gone."""
    path = folder / "deep" / "state"
    path.write_bytes(path.read_bytes()[:-3])
    return "deep/state is not what was written"


def remove_a_file(folder: Path) -> str:
    """A whole file is gone."""
    (folder / "deep" / "state").unlink()
    return "deep/state is missing"


def remove_the_digests(folder: Path) -> str:
    """Nothing says what the files should be."""
    (folder / "digests.json").unlink()
    return "digests.json is missing"


def scribble_on_the_digests(folder: Path) -> str:
    """The digests are half a document."""
    (folder / "digests.json").write_text('{"weights": "')
    return "digests.json is not a JSON object"


def another_document(folder: Path) -> str:
    """JSON, but no digests."""
    (folder / "digests.json").write_text("[1]")
    return "digests.json is not a JSON object"


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, truncate, remove_a_file, remove_the_digests, scribble_on_the_digests, another_document],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    """The one before it is used, the warning names folder and file, and the damaged one is left as it is."""
    good = publish(tmp_path, 2)
    problem = damage(publish(tmp_path, 4))
    with pytest.warns(UserWarning, match=rf"checkpoint-4: not used: {problem}"):
        assert newest_checkpoint(tmp_path) == (2, good)
    assert (tmp_path / "checkpoint-4").is_dir()


def test_no_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    """The stage is not begun again without being asked."""
    flip_a_byte(publish(tmp_path, 2))
    with (
        pytest.warns(UserWarning, match="checkpoint-2"),
        pytest.raises(CheckpointError, match=r"none of its checkpoints is whole \(checkpoint-2; the oldest: weights"),
    ):
        newest_checkpoint(tmp_path)


def test_what_is_being_built_is_not_seen(tmp_path: Path) -> None:
    """Neither the hidden folder of a killed writer nor a folder of another name counts."""
    good = publish(tmp_path, 2)
    shutil.copytree(good, tmp_path / ".building" / "checkpoint-4")
    shutil.copytree(good, tmp_path / "checkpoint-6.tmp")
    assert newest_checkpoint(tmp_path) == (2, good)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    """By number; other folders stay."""
    for step in (8, 9, 10, 11):
        publish(tmp_path, step)
    (tmp_path / "model").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-11", "model", ".building"}


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes has no name any more before its first file is gone, and the next removal takes the rest along."""
    for step in (2, 4):
        publish(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (tmp_path / ".checkpoint-2").is_dir()
    prune_checkpoints(tmp_path, keep=1)
    assert not (tmp_path / ".checkpoint-2").exists()


def interrupted(folder: Path) -> None:
    """Removes one file, and no more."""
    (folder / "digests.json").unlink()
    raise KeyboardInterrupt


def test_every_file_has_a_digest(tmp_path: Path) -> None:
    """So that none can be damaged unseen."""
    folder = publish(tmp_path, 1)
    digests = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
    assert set(digests) == {"weights", "deep/state"}
