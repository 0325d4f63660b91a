"""SIGTERM and Ctrl-C while units run: the work under way is finished and kept, nothing new is begun.

The first signal asks the executor to hand out no more units. Those that run may finish within the grace period (a
spot node gives its own notice, some 30 to 120 seconds); what is not finished by then is dropped, as if killed, and
costs only itself. A second signal ends the process at once, as if nobody had caught it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from logitlake_shared.stopped import RunStopped

__all__ = ["StopRequest", "stop_on_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the run is to end; what `Executor.run` asks between units. A new one says that it goes on."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """what asked for it"""
        self.grace_is_over = False
        """whether the units under way are to be dropped, too"""
        self.interrupts = True
        """whether the end of the grace raises, wherever the executor is; False: the executor looks by itself"""

    def __call__(self) -> bool:
        """Whether no more units are to be begun."""
        return self.signal is not None


class _GraceOver(BaseException):
    """Ends the run from within a signal handler; nothing between there and `stop_on_signals` may catch it."""


@contextmanager
def stop_on_signals(grace_s: float) -> Iterator[StopRequest]:
    """The request that SIGTERM and SIGINT make within the block; raises `RunStopped` behind it if one came.

    Outside the main thread, where Python hears no signals, it never comes.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    main = threading.get_ident()

    def end_grace() -> None:
        stop.grace_is_over = True
        # By a signal, too: that alone wakes a main thread that waits in C++.
        signal.pthread_kill(main, signal.SIGTERM)

    timer = threading.Timer(grace_s, end_grace)
    timer.daemon = True

    def on_signal(number: int, _: FrameType | None) -> None:
        if stop.signal is None:
            stop.signal = signal.Signals(number)
            timer.start()
        elif stop.grace_is_over and number == signal.SIGTERM:
            if stop.interrupts:
                raise _GraceOver
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        yield stop
    except _GraceOver:
        pass
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.signal is not None:
        raise RunStopped(stop.signal.name)
