"""Pipes to a process that may hang, die or be killed: waits that end, and words for how it ended.

The descriptors are non-blocking; a deadline is a moment of `time.monotonic`.
"""

import os
import select
import signal
import time

__all__ = ["how_it_ended", "ready_by", "write_by"]


def ready_by(handle: int, event: int, deadline: float) -> bool:
    """Whether the event of `select.poll` comes before the deadline."""
    poll = select.poll()
    poll.register(handle, event)
    left = deadline - time.monotonic()
    return left > 0 and bool(poll.poll(left * 1000))


def write_by(handle: int, data: bytes, deadline: float) -> bool:
    """Writes all of it; False where that takes longer. Raises `OSError` when nobody reads any longer."""
    left = memoryview(data)
    while left:
        if not ready_by(handle, select.POLLOUT, deadline):
            return False
        try:
            left = left[os.write(handle, left) :]
        except BlockingIOError:
            continue
    return True


def how_it_ended(code: int) -> str:
    """A process's exit code, or minus the signal, in words that continue "the process …"."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
