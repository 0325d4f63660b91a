"""Where units run, behind one interface.

An executor gets a maker of workers and the units that are left, one after the other as it asks for them (a plan can
be larger than memory), and yields one `Committed` for each unit, in the order in which they finish. The bytes in
the lake do not depend on the executor. `LogitLakeError`s of a worker end the run and reach the caller as they are,
those that may go away (`is_retryable`) after some tries where the executor makes any; units that are committed by then
stay.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from logitlake_schemas import CommitRecord
from logitlake_shared.errors import EngineError, LakeError, LogitLakeError
from logitlake_teacher.executors.stopping import StopRequest
from logitlake_teacher.items import Item, Unit

__all__ = ["Committed", "Executor", "MakeWorker", "UnitCost", "Worker", "is_retryable"]


@dataclass(frozen=True)
class UnitCost:
    """What a unit took the worker that committed it."""

    batches_s: tuple[float, ...]
    """seconds of each call of the teacher, in their order; the wait for its turn is none of them"""
    tokens: Mapping[str, int]
    """of all sequences that the teacher answered: `prompt` (text), `image` (as it expanded them), `response`"""
    commit_s: float
    """seconds that writing its shards and its record took"""


@dataclass(frozen=True)
class Committed:
    """A unit that is in the lake."""

    record: CommitRecord
    cost: UnitCost | None
    """None where it was committed already"""


class Worker(Protocol):
    """Captures unit after unit."""

    def run(self, unit: Unit, crashed: Mapping[str, str], pieces: int = 1) -> Committed:
        """Captures and commits the unit; may be called from several threads at once.

        The items in `crashed` (id -> `code: what happened`) are left out, with an error row. With `pieces` the teacher
        is asked about the unit's items in so many calls, which changes the memory it needs and no byte of the answer.
        """
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

    def run(
        self, units: Iterable[Unit], make_worker: MakeWorker, stop: StopRequest | None = None
    ) -> Iterator[Committed]:
        """Runs all units; `make_worker` is called once in each process that runs some. Raises `LogitLakeError`s.

        Units are taken only as far ahead as there are workers to run them. Once `stop` asks for it, those that run are
        finished within the grace and no other is begun.
        """
        ...


def is_retryable(error: LogitLakeError) -> bool:
    """Whether the same unit may succeed if it is tried again: the lake's store, or the teacher's process, failed.

    What a lake refuses (corrupt, in conflict, of another fingerprint) is a subclass of its own and stays refused.
    """
    return type(error) is LakeError or isinstance(error, EngineError)
