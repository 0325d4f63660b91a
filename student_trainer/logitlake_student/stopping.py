"""SIGTERM while a stage trains: the step under way is finished, a checkpoint is written, and the run ends.

So a job that is paused, or a node that is taken back, costs one step and not those since the last checkpoint. Several
ranks end together, whichever of them heard it: a rank alone could neither finish a step nor write a checkpoint. In a
step they agree by a sum that is taken anyway, so it costs nothing.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logitlake_shared.stopped import RunStopped
from logitlake_student.ranks import world_size

__all__ = ["StopRequest", "stop_on_sigterm"]


class StopRequest:
    """Whether the run is to end."""

    def __init__(self, file: Path | None) -> None:
        """`file`: where it is left for processes that hear no signal."""
        self._file, self._is_heard = file, False

    @property
    def is_made(self) -> bool:
        """Whether it came to this rank."""
        return self._is_heard or (self._file is not None and self._file.exists())

    def make(self) -> None:
        """Makes it."""
        self._is_heard = True
        if self._file is not None:
            self._file.touch()

    def check(self) -> None:
        """Raises `RunStopped` if it came to any rank, on all of them; each has to call it, and waits for the others."""
        import torch

        from logitlake_student.objectives.sums import sum_over_ranks

        if sum_over_ranks({"stops": torch.tensor(float(self.is_made))})["stops"]:
            raise RunStopped("SIGTERM")


@contextmanager
def stop_on_sigterm(file: Path | None = None) -> Iterator[StopRequest]:
    """The request that SIGTERM makes within the block. Outside the main thread, where Python hears no signals, it comes
    by `file` alone."""
    request = StopRequest(file)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(*_: object) -> None:
        request.make()
        # A second one ends the process at once. A rank may get several, from its launcher and from whoever asked the
        # launcher; that ends ranks by SIGKILL.
        if world_size() == 1:
            signal.signal(signal.SIGTERM, before)

    before = after = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield request
    except RunStopped:
        if world_size() > 1:
            after = signal.SIG_IGN  # the launcher asks the other ranks to end when the first has, and they are about to
        raise
    finally:
        signal.signal(signal.SIGTERM, after)
