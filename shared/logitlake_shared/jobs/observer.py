"""Who wants to know what becomes of the jobs of a store; the store knows nothing else of them."""

from logitlake_shared.jobs.measured import Measured
from logitlake_shared.jobs.records import Counts, JobState

__all__ = ["Observer"]


class Observer:
    """Is told of each change once it is on disk, by the thread that made it, with what was there before; this one does
    nothing with that. Must not raise, and must not keep anybody waiting."""

    def moved(self, before: JobState | None, after: JobState) -> None:
        """A job came from one state into another; from none when it was submitted."""

    def counted(self, before: Counts, after: Counts) -> None:
        """A job's attempt told what is done."""

    def measured(self, before: Measured, after: Measured) -> None:
        """An attempt told what it measured."""
