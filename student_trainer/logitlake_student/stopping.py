"""SIGTERM while a stage trains: the step under way is finished, a checkpoint is written, and the run ends.

So a job that is paused, or a node that is taken back, costs one step and not those since the last checkpoint. Of one
process alone: several ranks would have to agree on the step, and their launcher starts them again from a checkpoint.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from logitlake_shared.stopped import RunStopped
from logitlake_student.ranks import world_size

__all__ = ["StopRequest", "stop_on_sigterm"]


class StopRequest:
    """Whether the run is to end."""

    def __init__(self) -> None:
        self.is_made = False

    def check(self) -> None:
        """Raises `RunStopped` if it is."""
        if self.is_made:
            raise RunStopped("SIGTERM")


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """The request that SIGTERM makes within the block. It never comes to a rank of several, nor outside the main
    thread, where Python hears no signals."""
    request = StopRequest()
    if world_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(*_: object) -> None:
        request.is_made = True
        signal.signal(signal.SIGTERM, before)  # a second one ends the process at once

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
