"""The program of a decoder process: reads encoded images, writes pixels, and can do nothing else.

    python -m logitlake_shared.image_decoder.process <limits as JSON>

It is started afresh, with an empty environment; before it reads its first byte it takes from itself whatever decoding
does not need: memory beyond a cap, every file and socket but its two pipes, core dumps. For each image it gives itself
a little more processor time. The protocol is length-prefixed bytes both ways, nothing is unpickled:

    out  READY, once
    in   <length:8> encoded bytes
    out  <length:4> JSON header, then width * height * 3 bytes if the header has no code

It ends when its input does, so that it does not outlive the pool.
"""

import json
import math
import resource
import struct
import sys
import warnings
from typing import BinaryIO

from PIL import Image

from logitlake_shared.errors import ImageError
from logitlake_shared.image_decoder.decoding import ImageLimits, decode_with_header

__all__ = ["READY", "REPLY_LIMIT", "serve"]

READY = b"ready\n"
REPLY_LIMIT = 4096
"""bytes of a header, at most"""


def serve(requests: BinaryIO, replies: BinaryIO, limits: ImageLimits, timeout_s: float) -> None:
    """Answers requests until there are no more."""
    replies.write(READY)
    replies.flush()
    while len(prefix := requests.read(8)) == 8:
        data = requests.read(struct.unpack(">Q", prefix)[0])
        _allow_seconds(timeout_s)
        pixels = b""
        reply: dict[str, object]
        try:
            header, image = decode_with_header(data, limits)
            pixels = image.tobytes()
            reply = {**vars(header), "size": image.size}
        except ImageError as error:
            code, _, message = str(error).partition(": ")
            reply = {"code": code, "message": message[:1000]}
        except MemoryError:
            reply = {"code": "image_too_large", "message": "its pixels need more memory than a decoder may have"}
        head = json.dumps(reply).encode()
        replies.write(struct.pack(">I", len(head)) + head)
        replies.write(pixels)
        replies.flush()


def restrict(memory_bytes: int) -> None:
    """Takes from this process what decoding does not need."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The three standard streams are open; nothing else can be, no file and no socket.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _allow_seconds(seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    allowed = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))


def main() -> None:
    """The program."""
    given = json.loads(sys.argv[1])
    limits = ImageLimits(tuple(given["formats"]), given["max_bytes"], given["max_pixels"], given["max_frames"])
    # PIL warns of much that is no fault of the image; what is one, it raises.
    warnings.simplefilter("ignore")
    # Every plugin is loaded now: later no file can be opened.
    Image.init()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    restrict(given["memory_mib"] * 2**20)
    serve(requests, replies, limits, given["timeout_s"])


if __name__ == "__main__":
    main()
