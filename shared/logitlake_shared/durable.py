"""Files that are there whole or not at all, whatever stops the machine.

The bytes go to a hidden name (`<name>#<n>`, which no listing of obstore shows), are synced, and only then appear
under their own name by one link or rename; the folder is synced last, and so is every folder that had to be made, up
to the first that was there. So a name never stands for fewer bytes than were written, even after a power loss, and a
sync that fails leaves nothing behind: its file is given up, not synced again. A folder of many files is built under
another name and gets its own (`publish_folder`) when all below it is synced.
"""

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

__all__ = ["create_file", "make_folder", "publish_folder", "remove_staged", "replace_file", "sync"]


def create_file(path: Path, data: bytes) -> bool:
    """Creates `path` with these bytes; returns False, changing nothing, when it exists. Raises `OSError`."""
    staged = _stage(path, data)
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    finally:
        staged.unlink(missing_ok=True)
    sync(path.parent)
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Creates or replaces `path`: a reader sees the old bytes or the new ones. Raises `OSError`."""
    _stage(path, data).replace(path)
    sync(path.parent)


def publish_folder(built: Path, name: Path) -> None:
    """Gives a finished folder its name, next to it or elsewhere on the same file system. Raises `OSError`.

    What was there under that name goes first: after a crash in between there is neither.
    """
    for path in sorted(built.rglob("*"), reverse=True):  # what is in a folder before the folder
        sync(path)
    sync(built)
    if name.exists():
        shutil.rmtree(name)
    built.rename(name)
    sync(name.parent)


def remove_staged(folder: Path) -> None:
    """Removes what killed writers of files left in a folder where nobody writes now."""
    for staged in folder.glob("*#*"):
        staged.unlink()


def _stage(path: Path, data: bytes) -> Path:
    make_folder(path.parent)
    staged = path.with_name(f"{path.name}#{secrets.randbits(48)}")
    try:
        with staged.open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    return staged


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it, each entered durably in the one above."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, will outlast a power loss. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
