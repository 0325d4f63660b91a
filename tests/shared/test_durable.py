"""Folders get their names when they are whole. (Files: `tests/faults`, where every call to the disk is broken.)"""

from pathlib import Path

import pytest

from logitlake_shared import durable
from logitlake_shared.durable import publish_folder


def build(folder: Path) -> Path:
    """Two files, one of them in a folder."""
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w")
    (folder / "deep" / "state").write_bytes(b"s")
    return folder


def test_all_is_synced_before_the_name_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a folder before the folder, all of it before the rename, and the folder above last."""
    calls: list[str] = []
    sync = durable.sync

    def noted(path: Path) -> None:
        calls.append(f"{path.relative_to(tmp_path)} {(tmp_path / 'name').exists()}")
        sync(path)

    monkeypatch.setattr(durable, "sync", noted)
    publish_folder(build(tmp_path / ".built"), tmp_path / "name")
    assert sorted(calls[:2]) == [".built/deep/state False", ".built/weights False"]
    assert calls[2:] == [".built/deep False", ".built False", ". True"]


def test_what_was_there_is_replaced(tmp_path: Path) -> None:
    """Whole: no file of the old folder stays in the new one."""
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "old").write_bytes(b"")
    publish_folder(build(tmp_path / ".built"), tmp_path / "name")
    assert {path.name for path in (tmp_path / "name").iterdir()} == {"deep", "weights"}
    assert not (tmp_path / ".built").exists()
