"""Where attempts run, behind one interface; and what an attempt is: a command over a configuration file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from logitlake_shared.jobs.records import Job

__all__ = ["CommandOf", "Look", "Runner", "RunnerOf"]

CommandOf = Callable[[Job, Path], Sequence[str]]
"""of a job and the file of its configuration: `module:name` of a click command, and its arguments"""


@dataclass(frozen=True)
class Look:
    """What was seen of an attempt."""

    is_alive: bool
    exit_code: int | None
    """of one that is not; None if it was killed, or never began"""
    log: bytes
    """what it wrote since the offset that was asked for; not all of it where that is much"""


class Runner(Protocol):
    """Runs attempts that outlive this process. An attempt is named by its job and its number."""

    def start(self, job: Job, number: int) -> None:
        """Starts it. Raises `JobError` or `OSError` where that fails."""
        ...

    def look(self, job: Job, number: int, log_offset: int) -> Look:
        """How it is. Whatever it wrote before it ended is in its log when it is seen not to be alive."""
        ...

    def stop(self, job: Job, number: int, *, now: bool) -> None:
        """Asks it to end; with `now` it is killed with all its processes. Again is fine, and after its end."""
        ...

    def log_tail(self, job: Job, number: int, num_bytes: int) -> bytes:
        """The last bytes of its log."""
        ...


RunnerOf = Callable[[Job], Runner]
"""where the attempts of a job run; always the same for one job"""
