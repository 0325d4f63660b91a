"""Where units run, behind one interface.

An executor gets a maker of workers and the units that are left, one after the other as it asks for them (a plan can
be larger than memory), and yields one commit record for each unit, in the order in which they finish. The bytes in
the lake do not depend on the executor. `LogitLakeError`s of a worker end the run and reach the caller as they are;
units that are committed by then stay.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from logitlake_schemas import CommitRecord
from logitlake_teacher.items import Item, Unit

__all__ = ["Executor", "MakeWorker", "Worker"]


class Worker(Protocol):
    """Captures unit after unit."""

    def run(self, unit: Unit, crashed: Mapping[str, str]) -> CommitRecord:
        """Captures and commits the unit, leaving out the items in `crashed` (id -> what happened) with an error row."""
        ...

    def probe(self, items: Sequence[Item]) -> None:
        """Scores the items and forgets the answers."""
        ...

    def close(self) -> None:
        """Frees what the worker holds."""
        ...


MakeWorker = Callable[[], Worker]


class Executor(Protocol):
    """Runs units."""

    def run(self, units: Iterable[Unit], make_worker: MakeWorker) -> Iterator[CommitRecord]:
        """Runs all units; `make_worker` is called once in each process that runs some. Raises `LogitLakeError`s.

        Units are taken only as far ahead as there are workers to run them.
        """
        ...
