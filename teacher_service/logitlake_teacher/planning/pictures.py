"""What planning must know of an image: its digest, its size, and that it can be had at all.

Each image of a bucket is read once, several at a time; its bytes are forgotten again. It is not decoded: that is done
once, under guard, when its unit is captured.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from logitlake_schemas import sha256_hex
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.errors import ImageError
from logitlake_shared.images import inspect_image
from logitlake_teacher.config import ImagesConfig
from logitlake_teacher.engines.checkpoint import CountImageTokens

__all__ = ["Picture", "Pictures", "images_unchanged"]

# Threads that ask a file system for the size and time of files.
_READERS = 8
_STAMPS = "images.arrow"
_STAMP_SCHEMA = pa.schema([("path", pa.string()), ("bytes", pa.int64()), ("modified_ns", pa.int64())])


@dataclass(frozen=True)
class Picture:
    """One image as planning sees it."""

    sha256: str
    num_bytes: int
    num_tokens: int
    problem: tuple[str, str] | None
    """code and message, if it cannot be used"""


class Pictures:
    """Looks at images, several at a time, and notes in the plan's folder how each file was. To be closed."""

    def __init__(self, count_tokens: CountImageTokens, images: ImagesConfig, folder: Path) -> None:
        self._count_tokens = count_tokens
        self._limits = images.limits()
        self._loader = images.open_loader()
        self._pool = ThreadPoolExecutor(images.load_threads)
        self._stamps = pa.ipc.new_stream(folder / _STAMPS, _STAMP_SCHEMA)

    def look_at(self, references: Iterable[ImageRef]) -> dict[ImageRef, Picture]:
        """Every distinct image once."""
        distinct = list(dict.fromkeys(references))
        paths = [str(reference.path) for reference in distinct if reference.path is not None]
        # Before they are read: a file that changes in between is then seen to have changed.
        if paths:
            self._stamps.write_batch(_stamped(paths, self._pool))
        return dict(zip(distinct, self._pool.map(self._look, distinct), strict=True))

    def close(self) -> None:
        """Ends the threads; the stamps are complete."""
        self._pool.shutdown()
        self._loader.close()
        self._stamps.close()

    def _look(self, reference: ImageRef) -> Picture:
        digest, num_bytes = "", 0
        try:
            data = self._loader.load(reference)
            digest, num_bytes = sha256_hex(data), len(data)
            image = inspect_image(data, self._limits)
            return Picture(digest, num_bytes, self._count_tokens(image.width, image.height), None)
        except ImageError as error:
            code, _, message = str(error).partition(": ")
            return Picture(digest, num_bytes, 0, (code, message))


def images_unchanged(folder: Path) -> bool:
    """Whether every image file that the plan in `folder` was made from has the size and time that it had."""
    with pa.ipc.open_stream(folder / _STAMPS) as stamps, ThreadPoolExecutor(_READERS) as pool:
        return all(batch.equals(_stamped(batch.column("path").to_pylist(), pool)) for batch in stamps)


def _stamped(paths: list[str], pool: ThreadPoolExecutor) -> pa.RecordBatch:
    sizes, times = zip(*pool.map(_stamp, paths), strict=True)
    return pa.RecordBatch.from_arrays(
        [pa.array(paths), pa.array(sizes, pa.int64()), pa.array(times, pa.int64())], schema=_STAMP_SCHEMA
    )


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116  # a million of them
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns
