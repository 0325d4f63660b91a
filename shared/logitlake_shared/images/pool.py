"""Images decoded in disposable processes: a decoder that dies or hangs costs its image and nothing else.

A decoder process (`logitlake_shared.image_decoder.process`) has a cap on memory and time, an empty environment and no
files. The pool believes nothing it says: lengths and sizes are checked against the limits before a byte is kept. A
process that dies is replaced and its image tried once more, because the machine may have killed it for somebody else's
memory; one that takes too long is killed and its image given up.
"""

import contextlib
import json
import os
import queue
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from logitlake_schemas import sha256_hex
from logitlake_shared.errors import ConfigError, ImageError
from logitlake_shared.image_decoder.decoding import ImageHeader, ImageLimits
from logitlake_shared.image_decoder.process import READY, REPLY_LIMIT
from logitlake_shared.images.records import DecodedImage
from logitlake_shared.pipes import how_it_ended, ready_by, write_by

__all__ = ["DecoderPool"]

# A busy machine may take its time to start Python.
_START_TIMEOUT_S = 120.0
_ATTEMPTS = 2
_CODE_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz_")


class DecoderPool:
    """Decodes on all its processes at once; may be used from several threads."""

    def __init__(
        self,
        limits: ImageLimits = ImageLimits.DEFAULT,
        *,
        num_processes: int = 2,
        memory_mib: int = 2048,
        timeout_s: float = 20.0,
    ) -> None:
        self._limits = limits
        self._timeout_s = timeout_s
        # The child's own cap on processor time comes second, for the case that this process is gone.
        self._arguments = json.dumps({**vars(limits), "memory_mib": memory_mib, "timeout_s": 2 * timeout_s})
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="decoder")
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        self._closed = False
        for _ in range(num_processes):
            self._idle.put(_Decoder(self._arguments))
        self._num_processes = num_processes

    def decode_all(self, images: Sequence[bytes]) -> list[DecodedImage | ImageError]:
        """For each image its pixels or why there are none, in order.

        Codes: those of `decode_image`, and `image_timeout`. Raises `ConfigError` if no decoder can be started.
        """
        return list(self._threads.map(self._decode, images))

    def close(self) -> None:
        """Ends the processes. Calling it twice is fine."""
        self._threads.shutdown()
        if not self._closed:
            self._closed = True
            for _ in range(self._num_processes):
                self._idle.get().kill()

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self, data: bytes) -> DecodedImage | ImageError:
        if len(data) > self._limits.max_bytes:
            return ImageError(f"image_too_large: {len(data)} bytes, at most {self._limits.max_bytes} are read")
        died: Exception | None = None
        decoder = self._idle.get()
        try:
            for _ in range(_ATTEMPTS):
                try:
                    decoder.wait_ready()
                    return decoder.decode(data, self._limits, time.monotonic() + self._timeout_s)
                except _TooSlowError:
                    decoder = self._replaced(decoder)
                    return ImageError(f"image_timeout: decoding took longer than {self._timeout_s:g} s")
                except DecoderDiedError as error:
                    died = error
                    decoder = self._replaced(decoder)
            if isinstance(died, _DidNotStartError):
                raise ConfigError(
                    f"no image can be decoded: a decoder process {died} while it started, {_ATTEMPTS} times; look "
                    "whether `python -c 'import PIL'` works, and at the memory of the machine"
                )
            return ImageError(f"image_decode: the decoder {died}, {_ATTEMPTS} times")
        finally:
            self._idle.put(decoder)

    def _replaced(self, decoder: "_Decoder") -> "_Decoder":
        decoder.kill()
        return _Decoder(self._arguments)


class _TooSlowError(Exception):
    """The decoder did not answer in time."""


class DecoderDiedError(Exception):
    """The decoder ended, or said what no decoder says; the message continues "the decoder …"."""


class _DidNotStartError(DecoderDiedError):
    """The decoder ended before it was given an image."""


@dataclass(frozen=True)
class Reply:
    """A header that was checked."""

    header: ImageHeader
    width: int
    height: int


class _Decoder:
    """One process and the pipes to it."""

    def __init__(self, arguments: str) -> None:
        # No secret of this process reaches the decoder; it finds the same modules and libraries.
        environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
        if libraries := os.environ.get("LD_LIBRARY_PATH"):
            environment["LD_LIBRARY_PATH"] = libraries
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "logitlake_shared.image_decoder.process", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the command, which then closes the pool
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._ready = False

    def wait_ready(self) -> None:
        """Raises `_DidNotStartError`: that is no image's fault."""
        if self._ready:
            return
        try:
            said = self._read(len(READY), time.monotonic() + _START_TIMEOUT_S).tobytes()
        except (DecoderDiedError, _TooSlowError) as error:
            raise _DidNotStartError(str(error)) from error
        self._ready = said == READY

    def decode(self, data: bytes, limits: ImageLimits, deadline: float) -> DecodedImage | ImageError:
        """One image. Raises `_TooSlowError`, `DecoderDiedError`."""
        self._write(struct.pack(">Q", len(data)) + data, deadline)
        length = struct.unpack(">I", self._read(4, deadline).tobytes())[0]
        if length > REPLY_LIMIT:
            raise DecoderDiedError("gave an answer that is none")
        reply = checked_reply(self._read(length, deadline).tobytes(), limits)
        if isinstance(reply, ImageError):
            return reply
        rgb = self._read(reply.width * reply.height * 3, deadline)
        return DecodedImage(sha256_hex(data), rgb.reshape(reply.height, reply.width, 3), reply.header)

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._process.wait()

    def _write(self, data: bytes, deadline: float) -> None:
        try:
            if not write_by(self._in, data, deadline):
                raise _TooSlowError("did not answer")
        except OSError as error:
            raise DecoderDiedError(self._how_it_ended()) from error

    def _read(self, size: int, deadline: float) -> npt.NDArray[np.uint8]:
        buffer = np.empty(size, np.uint8)
        left = memoryview(buffer.data)
        while left:
            if not ready_by(self._out, select.POLLIN, deadline):
                raise _TooSlowError("did not answer")
            try:
                count = os.readv(self._out, [left])
            except BlockingIOError:
                continue
            if not count:
                raise DecoderDiedError(self._how_it_ended())
            left = left[count:]
        return buffer

    def _how_it_ended(self) -> str:
        return how_it_ended(self._process.wait())


def checked_reply(head: bytes, limits: ImageLimits) -> Reply | ImageError:
    """The decoder's header as far as it can be one. Raises `DecoderDiedError`."""
    try:
        said: dict[str, Any] = json.loads(head)
        if "code" in said:
            code, message = str(said["code"]), str(said["message"])
            if not code.startswith("image_") or not _CODE_LETTERS.issuperset(code):
                raise ValueError(code)
            # Libraries quote what they read; no terminal is to obey it.
            return ImageError(f"{code}: {''.join(char if char.isprintable() else '?' for char in message)}")
        width, height = (int(side) for side in said["size"])
        header = ImageHeader(str(said["format"]), int(said["width"]), int(said["height"]))
        if min(width, height) < 1 or width * height > limits.max_pixels or header.format not in limits.formats:
            raise ValueError("sizes")
    except (ValueError, KeyError, TypeError) as error:
        raise DecoderDiedError("gave an answer that is none") from error
    return Reply(header, width, height)
