"""Units one after the other in the command's own process: no Ray, nothing to start, the easiest to debug.

A sample that kills the teacher kills the command; run it under `ray` to have such samples found and set aside.
"""

from collections.abc import Iterable, Iterator

from logitlake_teacher.executors.base import Committed, MakeWorker
from logitlake_teacher.executors.stopping import StopRequest
from logitlake_teacher.items import Unit

__all__ = ["InlineExecutor"]


class InlineExecutor:
    """Implements `executors.base.Executor`."""

    def run(
        self, units: Iterable[Unit], make_worker: MakeWorker, stop: StopRequest | None = None
    ) -> Iterator[Committed]:
        """See `Executor.run`."""
        worker = make_worker()
        try:
            for unit in units:
                if stop is not None and stop():
                    return
                yield worker.run(unit, {})
        finally:
            worker.close()
