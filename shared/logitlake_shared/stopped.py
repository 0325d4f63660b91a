"""The end of a command that was asked to end, and kept what it had."""

import signal

__all__ = ["RunStopped"]


class RunStopped(Exception):  # noqa: N818  # it was asked for
    """A run that ended because a signal asked for it; `str` is the signal's name."""

    @property
    def exit_code(self) -> int:
        """128 plus the signal, as shells report it."""
        return 128 + signal.Signals[str(self)]
