"""Who does what next: the rules of a run on actors, without actors.

A `LeaseBook` takes units one after the other from the plan, hands out tasks, and is told how they ended. What it
promises, whatever happens to the actors:

* a unit is out once at a time, and is handed out until it is committed, or the run ends with an error;
* never more than `ahead` units are taken from the plan before somebody can run them;
* a unit that was on an actor when it died is suspected and runs alone on an actor of its own; if that one dies too,
  the unit is searched by halves for the items that do it (`probe` tasks), these are set aside, the rest is captured;
* a unit that dies as a whole while each half of it survives is too big for the machine's memory: it is scored in twice
  as many pieces from then on, down to one item at a time;
* every number of tries has a ceiling, and between two tries stands a wait that doubles, with jitter.

There is no clock, process or randomness of its own in it: tests drive it through every order of events.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from logitlake_shared.errors import EngineError, LogitLakeError
from logitlake_teacher.items import Item, Unit

__all__ = ["Death", "LeaseBook", "Task"]

_MAX_BACKOFF_S = 60.0
# Losses of a node that one unit may see: far beyond what spot markets do, yet an end.
_MAX_LOSSES = 100
# Actors that may die in a row with nothing finished in between, before it is the machine and not a sample. The search
# for one sample in a unit of 2^n is over after n + 3, and no unit has 2^29 items.
_MAX_DEATHS_IN_A_ROW = 32


@dataclass(frozen=True)
class Death:
    """How an actor ended."""

    code: Literal["teacher_crashed", "teacher_timeout", "lost"]
    """`lost`: with its node; nothing on it is to blame"""
    how: str


@dataclass(eq=False)
class _Lease:
    """A unit from the plan to its commit."""

    unit: Unit
    crashed: dict[str, str] = field(default_factory=dict)
    """items that are set aside: `code: what happened`"""
    failures: int = 0
    losses: int = 0
    suspected: bool = False
    pieces: int = 1
    """it is scored in as many calls of the engine"""
    probes: int = 0
    """probes of it that are waiting or out"""
    found: dict[str, str] = field(default_factory=dict)
    """what the search under way has found"""


@dataclass(eq=False)
class Task:
    """What an actor is asked to do: capture a unit, or find out whether the teacher survives some items of it."""

    lease: _Lease
    probe: tuple[Item, ...] | None = None
    repeated: bool = False
    """whether the probe is of one item that an actor died on once"""
    ready_at: float = 0.0

    @property
    def unit(self) -> Unit:
        """The unit it is about."""
        return self.lease.unit

    @property
    def alone(self) -> bool:
        """Whether it must have an actor to itself: if that one dies, it is known who did it."""
        return self.probe is not None or self.lease.suspected


class LeaseBook:
    """See the module. `clock` gives monotonic seconds, `draw` numbers in [0, 1)."""

    def __init__(
        self,
        units: Iterable[Unit],
        *,
        ahead: int,
        max_attempts: int,
        backoff_s: float,
        clock: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        self._units = iter(units)
        self._ahead: collections.deque[_Lease] = collections.deque()
        self._num_ahead = ahead
        self._again: list[Task] = []
        self._out = 0
        self._stopped = False
        self._deaths_in_a_row = 0
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s
        self._clock = clock
        self._draw = draw
        self._fill()

    @property
    def backlog(self) -> int:
        """Tasks that are out or known to be waiting; 0 when all is done."""
        return len(self._ahead) + len(self._again) + self._out

    def take(self, load: int = 0) -> Task | None:
        """A task for an actor that has `load` others, or None: there is nothing for it now."""
        now = self._clock()
        for task in self._again:
            if task.ready_at <= now and not (task.alone and load):
                self._again.remove(task)
                break
        else:
            if not self._ahead:
                return None
            task = Task(self._ahead.popleft())
            self._fill()
        self._out += 1
        return task

    def stop(self) -> None:
        """Hands out nothing more: what is out may finish, the rest is for the next run."""
        self._stopped = True
        self._ahead.clear()
        self._again.clear()

    def waits_for_empty_actor(self) -> bool:
        """Whether a task is ready that must have an actor to itself."""
        return any(task.alone and task.ready_at <= self._clock() for task in self._again)

    def next_ready_s(self) -> float | None:
        """Seconds until the next wait of a task is over; None when none waits."""
        now = self._clock()
        waits = [task.ready_at - now for task in self._again if task.ready_at > now]
        return min(waits, default=None)

    def finished(self, task: Task) -> None:
        """The unit is committed, or the probed items are innocent."""
        self._out -= 1
        self._deaths_in_a_row = 0
        if task.probe is not None:
            self._probed(task.lease)

    def failed(self, task: Task, error: LogitLakeError) -> None:
        """The task raised an error that may go away. Raises it when it did so `max_attempts` times."""
        self._out -= 1
        lease = task.lease
        lease.failures += 1
        if lease.failures >= self._max_attempts:
            raise error
        self._wait(task, lease.failures)

    def died(self, tasks: Sequence[Task], death: Death) -> None:
        """An actor ended with these tasks on it. Raises `EngineError` when that cannot go on."""
        self._out -= len(tasks)
        if death.code != "lost":
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row > _MAX_DEATHS_IN_A_ROW:
                raise EngineError(
                    f"{self._deaths_in_a_row} actors died in a row and nothing was finished in between, so it is not "
                    f"a sample that does it; last death: {death.how}. Look at the machine's memory and at the "
                    "teacher's own log; what is committed stays, run the command again to go on"
                )
        for task in tasks:
            if death.code == "lost":
                self._lost(task, death)
            elif task.probe is not None:
                self._guilty(task, task.probe, death)
            elif not task.lease.suspected:
                task.lease.suspected = True
                self._wait(task, 1)
            else:
                self._search(task.lease)

    def _lost(self, task: Task, death: Death) -> None:
        task.lease.losses += 1
        if task.lease.losses > _MAX_LOSSES:
            raise EngineError(
                f"unit {task.unit.unit_id} lost its node {task.lease.losses} times; last: {death.how}. The nodes of "
                "this cluster do not live as long as a unit takes: make units smaller (plan.unit_tokens)"
            )
        self._wait(task, min(task.lease.losses, self._max_attempts))

    def _search(self, lease: _Lease) -> None:
        """Begins to look for the items that kill the teacher."""
        lease.found = {}
        items = tuple(item for item in lease.unit.items if item.item_id not in lease.crashed)
        self._probe(lease, *_halves(items))

    def _guilty(self, task: Task, items: tuple[Item, ...], death: Death) -> None:
        if len(items) > 1:
            self._probe(task.lease, *_halves(items))
        elif not task.repeated:
            # Once may be an accident, and setting aside is for good.
            self._probe(task.lease, items, repeated=True)
        else:
            task.lease.found[items[0].item_id] = f"{death.code}: {death.how}"
        self._probed(task.lease)

    def _probe(self, lease: _Lease, *groups: tuple[Item, ...], repeated: bool = False) -> None:
        lease.probes += len(groups)
        self._again += [Task(lease, group, repeated, self._clock()) for group in groups]

    def _probed(self, lease: _Lease) -> None:
        """One probe is over; after the last, the unit is handed out again, without what was found."""
        lease.probes -= 1
        if lease.probes:
            return
        if not lease.found:
            if lease.pieces == len(lease.unit.items):
                lease.failures += 1
            if lease.failures >= self._max_attempts:
                raise EngineError(
                    f"unit {lease.unit.unit_id}: actors die of it, though no sample of it kills one alone and it was "
                    "scored one sample at a time; look at the machine's memory, then run the command again to go on"
                )
            lease.pieces = min(2 * lease.pieces, len(lease.unit.items))
        lease.crashed |= lease.found
        # It stays alone: were it still deadly, a neighbour would be suspected for it.
        self._wait(Task(lease), 1)

    def _wait(self, task: Task, times: int) -> None:
        wait_s = min(self._backoff_s * 2.0 ** (times - 1), _MAX_BACKOFF_S) * (0.5 + self._draw())
        task.ready_at = self._clock() + wait_s
        self._again.append(task)

    def _fill(self) -> None:
        if self._stopped:
            return
        self._ahead += map(_Lease, itertools.islice(self._units, self._num_ahead - len(self._ahead)))


def _halves(items: tuple[Item, ...]) -> tuple[tuple[Item, ...], ...]:
    """The items in two groups; one item is a group of its own."""
    middle = len(items) // 2
    return (items[:middle], items[middle:]) if middle else (items,)
