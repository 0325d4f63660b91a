"""Whether a lake can be written where it lies, and whether the clocks of both sides agree.

Everything a lake promises stands on three things of its storage: bytes are durable before their name is there, of two
writers of a name exactly one wins, and a reader sees the old bytes or the new ones. Each is tried here with an object
of its own in a folder of its own, which is removed again. Where there is no lake yet, the nearest folder that exists is
tried, and nothing is made; a lake that a service hands out is only read.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from logitlake_schemas import layout
from logitlake_shared.doctor.records import Check, blocked, ok, warn
from logitlake_shared.durable import sync
from logitlake_shared.errors import LakeError, LakeFormatError
from logitlake_shared.ids import new_id
from logitlake_shared.lake import Lake
from logitlake_shared.store import ObjectStore, open_store

__all__ = [
    "check_clock",
    "check_create_once",
    "check_durable",
    "check_file_system",
    "check_lake",
    "check_replace",
    "check_space",
    "check_write",
    "storage_checks",
]

T = TypeVar("T")

# An object store that is not there is tried again and again by its client, for minutes.
_ANSWER_S = 30.0
_RACERS = 8
_SLOW_SYNC_S = 0.25
_LEAST_BYTES = 100 * 2**20
_FEW_BYTES = 10 * 2**30
# Collection gives writers hours, tokens expire by the minute, and S3 refuses requests that are off by a quarter.
_CLOCK_OFF_S = 60.0
_CLOCK_WRONG_S = 900.0
# No release of LogitLake is older: a clock that says less was never set.
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
_GONE_WITH = {
    "tmpfs": "memory: it is gone when the machine restarts",
    "ramfs": "memory: it is gone when the machine restarts",
    "overlay": "a container's own layer: it is gone with the container",
}


def storage_checks(lake: str | None) -> Iterator[Check]:
    """All of them, for the lake at this address; without one there is only this machine's clock to look at."""
    compared = False
    for check in () if lake is None else _lake_checks(lake):
        compared |= check.name == "clock"
        yield check
    if not compared:
        yield check_clock(time.time())


def _lake_checks(lake: str) -> Iterator[Check]:
    if lake.startswith(("http://", "https://")):
        yield check_lake(lake)
    elif "://" in lake and not lake.startswith("file://"):
        yield from _probed(lake)
    else:
        folder = Path(lake.removeprefix("file://")).expanduser().absolute()
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir():
            yield blocked("lake", f"{there}: not a folder", "name a folder, or s3://bucket/prefix")
        else:
            if there != folder:
                yield ok("lake", f"{lake}: nothing there yet; {there} is looked at")
            yield from _probed(lake, there, has_lake=there == folder)


def _probed(lake: str, folder: Path | None = None, *, has_lake: bool = True) -> Iterator[Check]:
    """`folder` is what is tried of a local lake."""
    if has_lake:
        yield (found := check_lake(lake))
        if found.status == "blocked":
            return
    probe = new_id("doctor")
    place = lake if folder is None else str(folder / f".logitlake-{probe}")
    prefix = f"doctor/{probe}" if folder is None else "probe"
    is_writable = False
    try:
        yield (written := check_write(place, prefix))
        is_writable = written.status != "blocked"
        if not is_writable:
            return
        store = open_store(place)
        yield check_create_once(store, f"{prefix}/once")
        yield check_replace(store, f"{prefix}/replaced")
        if folder is not None:
            yield check_durable(Path(place))
            yield check_file_system(_file_system(folder))
            yield check_space(shutil.disk_usage(folder).free)
        try:
            newest = _within(_ANSWER_S, lambda: _newest(lake)) if has_lake else None
            yield check_clock(time.time(), _modified(store, prefix), newest)
        except LakeError as error:
            yield warn("clock", f"not compared with the storage's: {_said(error)}", "see that both are set (chrony)")
    finally:
        if folder is not None:
            shutil.rmtree(place, ignore_errors=True)
        elif is_writable:
            _removed(open_store(place), prefix)


def check_lake(lake: str) -> Check:
    """Whether there is a lake of a format that is known; none yet is fine."""
    try:
        found = _within(_ANSWER_S, lambda: Lake.open(lake).cache_names())
    except LakeFormatError as error:
        if f"{layout.LAKE_MANIFEST} is missing" in str(error) and not lake.startswith("http"):
            return ok("lake", f"{lake}: none there yet")
        return blocked("lake", str(error), "name a lake of this release's format")
    except LakeError as error:
        return blocked("lake", _said(error), "make it readable: address, credentials, network")
    return ok("lake", f"{lake}: {len(found)} cache{'' if len(found) == 1 else 's'}")


def check_write(place: str, prefix: str) -> Check:
    """Whether an object can be created and read back."""
    data = os.urandom(64)

    def write_and_read() -> bytes | None:
        store = open_store(place)
        store.put_new(f"{prefix}/written", data)
        return store.get(f"{prefix}/written")

    try:
        started = time.perf_counter()
        if _within(_ANSWER_S, write_and_read) != data:
            return blocked("write", f"{place}: what was written is not what is read", "use another storage")
    except (LakeError, OSError) as error:
        return blocked("write", _said(error), "make it writable for this user, or name a place that is")
    return ok("write", f"written and read back in {_milliseconds(time.perf_counter() - started)}")


def check_create_once(store: ObjectStore, name: str) -> Check:
    """Whether a name is given once: to one writer after another, and to one of several at the same time."""
    advice = "use a store with conditional writes (If-None-Match), or a file system with hard links"
    try:
        first, second = store.put_new(name, b"first"), store.put_new(name, b"second")
        if not first or second or store.get(name) != b"first":
            return blocked("create once", f"{store.uri}: one name was created twice", advice)
        with ThreadPoolExecutor(_RACERS) as racers:
            won = list(racers.map(lambda number: store.put_new(f"{name}-race", b"%d" % number), range(_RACERS)))
        if won.count(True) != 1 or store.get(f"{name}-race") != b"%d" % won.index(True):
            return blocked("create once", f"{store.uri}: of {_RACERS} writers at once {won.count(True)} won", advice)
    except LakeError as error:
        return blocked("create once", _said(error), advice)
    return ok("create once", f"the second writer loses, and of {_RACERS} at once one wins")


def check_replace(store: ObjectStore, name: str) -> Check:
    """Whether an object is replaced as a whole, and whether it can be removed."""
    try:
        store.overwrite(name, b"old" * 1000)
        store.overwrite(name, b"new")
        read = store.get(name)
        store.delete(name)
        left = store.get(name)
    except LakeError as error:
        return blocked("replace", _said(error), "let this user rename and delete there: repair and `gc` do")
    if read != b"new" or left is not None:
        return blocked("replace", f"{store.uri}: a replaced or deleted object is still there", "use another storage")
    return ok("replace", "renamed over the old one, and removed")


def check_durable(folder: Path) -> Check:
    """Whether files and folders can be synced, and how long it takes."""
    path = folder / "synced"
    try:
        path.write_bytes(os.urandom(2**16))
        started = time.perf_counter()
        sync(path)
        sync(folder)
        seconds = time.perf_counter() - started
    except OSError as error:
        return blocked(
            "fsync",
            f"{folder.parent}: fsync failed: {error}",
            "use a file system that syncs: without it a power loss takes what was committed",
        )
    if seconds > _SLOW_SYNC_S:
        return warn(
            "fsync", f"{_milliseconds(seconds)} for a small file", "use a faster disk, or larger units: each one waits"
        )
    return ok("fsync", f"{_milliseconds(seconds)} for a small file and its folder")


def check_file_system(kind: str | None) -> Check:
    """Whether what is written outlives the machine or the container."""
    if kind is None:
        return warn("file system", "unknown: /proc/self/mountinfo does not tell", "see that it outlives the machine")
    if kind in _GONE_WITH:
        return warn("file system", f"{kind}, {_GONE_WITH[kind]}", "put a lake that is to stay on a disk or a volume")
    return ok("file system", kind)


def check_space(free: int) -> Check:
    """Bytes that are left."""
    shown = f"{free / 2**30:,.1f} GiB free"
    if free < _LEAST_BYTES:
        return blocked("space", shown, "free some, or name another disk: a capture ends when it is full")
    if free < _FEW_BYTES:
        return warn("space", shown, "see with `logitlake-teacher plan` what the capture will need")
    return ok("space", shown)


def check_clock(now: float, written_at: float | None = None, newest: float | None = None) -> Check:
    """This machine's clock, against the store's (of something just written) and the newest commit's time."""
    advice = "set the clock (chrony, systemd-timesyncd); tokens, ages for `gc` and S3 signatures go by it"
    if now < _EPOCH:
        return blocked("clock", f"{_shown(now)}, before this release was made", advice)
    off = abs(now - written_at) if written_at is not None else 0.0
    early = max(newest - now, 0.0) if newest is not None else 0.0
    found = []
    if off > _CLOCK_OFF_S:
        found.append(f"{off:,.0f} s from the storage's")
    if early > _CLOCK_OFF_S:
        found.append(f"{early:,.0f} s before the newest commit")
    if found:
        level = blocked if max(off, early) > _CLOCK_WRONG_S else warn
        return level("clock", f"{_shown(now)}, {' and '.join(found)}", advice)
    compared = {"the storage": written_at, "the newest commit": newest}
    against = [name for name, seconds in compared.items() if seconds is not None]
    return ok("clock", f"{_shown(now)}{', agrees with ' + ' and '.join(against) if against else ''}")


def _modified(store: ObjectStore, prefix: str) -> float | None:
    """When the probe was written, by the store's clock."""
    return max((entry.modified.timestamp() for entry in store.entries(prefix)), default=None)


def _newest(lake: str) -> float | None:
    """When the newest commit record was written, by the store's clock."""
    store = open_store(lake)
    caches = [folder.rsplit("/", 1)[-1] for folder in store.folders(layout.cache_names_prefix())]
    commits = [entry for cache in caches for entry in store.entries(layout.commits_prefix(cache))]
    return max((entry.modified.timestamp() for entry in commits), default=None)


def _removed(store: ObjectStore, prefix: str) -> None:
    for name in store.names(prefix):
        store.delete(name)


def _file_system(folder: Path, mounts: Sequence[str] | None = None) -> str | None:
    """The kind of the file system that a folder is on; `mounts` are the lines of `/proc/self/mountinfo`."""
    if mounts is None:
        table = Path("/proc/self/mountinfo")
        mounts = table.read_text().splitlines() if table.is_file() else []
    best: tuple[int, str] | None = None
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        place = Path(re.sub(r"\\([0-7]{3})", lambda escaped: chr(int(escaped[1], 8)), fields.split()[4]))
        # Of two on one place the later one hides the earlier.
        if folder.resolve().is_relative_to(place) and (best is None or len(place.parts) >= best[0]):
            best = (len(place.parts), rest.split()[0])
    return None if best is None else best[1]


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What the function returns or raises; `LakeError` where that takes longer."""
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)  # one that hangs must not keep the command from ending
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not result:
        raise LakeError(f"no answer within {seconds:.0f} s")
    return result[0]


def _said(error: Exception) -> str:
    """Without the structure behind it that an object store's client adds for its own makers."""
    return re.split(r"\s+Debug source:", str(error))[0]


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"
