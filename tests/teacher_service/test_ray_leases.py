"""The rules of a run on actors, in every order of events that a seed gives, without an actor.

A fleet of made-up actors takes tasks from a real `LeaseBook` under a clock of our own. Which task ends next, which
actor dies, which lake fails is drawn; what must hold at the end does not depend on it.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from logitlake_shared.errors import EngineError, LakeError
from logitlake_teacher.executors.leases import Death, LeaseBook, Task
from logitlake_teacher.items import PlannedSample, Unit

CRASH = Death("teacher_crashed", "it ended")
LOST = Death("lost", "its node is gone")
IDS = np.zeros(1, np.int32)


def made_item(item_id: str) -> PlannedSample:
    """A sample of two tokens."""
    return PlannedSample(item_id, "t", "s", "train", [], IDS, IDS, IDS, IDS, (), ())


def made_unit(number: int, num_items: int = 8) -> Unit:
    """`u3` with the items `u3-0` to `u3-7`."""
    return Unit(f"u{number}", tuple(made_item(f"u{number}-{place}") for place in range(num_items)))


class Clock:
    """Seconds that pass when we say so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def made_book(units: Iterator[Unit] | list[Unit], clock: Clock, **changes: object) -> LeaseBook:
    """A book with the rules of a real run."""
    rules: dict[str, object] = {"ahead": 2, "max_attempts": 4, "backoff_s": 1.0, "clock": clock, "draw": lambda: 0.5}
    return LeaseBook(units, **(rules | changes))


def taken(book: LeaseBook, clock: Clock, load: int = 0) -> Task:
    """The next task, after its wait."""
    clock.now += book.next_ready_s() or 0.0
    task = book.take(load)
    assert task is not None
    return task


@dataclass
class Fleet:
    """Actors that work on tasks, and a seed that says what happens next."""

    book: LeaseBook
    clock: Clock
    draw: random.Random
    deadly: frozenset[str]
    """items that kill an actor whenever it works on them"""
    num_actors: int = 3
    in_flight: int = 2
    accidents: int = 6
    """actors that die for no reason, nodes that go, lakes that fail, while there are any left"""
    running: dict[int, list[Task]] = field(default_factory=dict)
    committed: list[str] = field(default_factory=list)
    set_aside: dict[str, str] = field(default_factory=dict)
    out: set[int] = field(default_factory=set)
    deaths_alone: Counter[str] = field(default_factory=Counter)
    """by item: actors that died with nothing else on them"""

    def run(self) -> None:
        """To the end, or to the book's error."""
        while self.book.backlog:
            for actor in range(self.num_actors):
                self._hand_out(self.running.setdefault(actor, []))
            busy = [actor for actor, tasks in self.running.items() if tasks]
            if busy:
                self._something_happens(self.draw.choice(busy))
            else:
                wait_s = self.book.next_ready_s()
                assert wait_s is not None, "nothing runs, nothing waits, and yet it is not done"
                self.clock.now += wait_s

    def _hand_out(self, tasks: list[Task]) -> None:
        while len(tasks) < self.in_flight and not any(task.alone for task in tasks):
            task = self.book.take(len(tasks))
            if task is None:
                return
            assert not (task.alone and tasks), "a task that must be alone is not"
            assert task.probe is not None or id(task.lease) not in self.out, "a unit is out twice"
            self.out.add(id(task.lease))
            tasks.append(task)

    def _something_happens(self, actor: int) -> None:
        tasks = self.running[actor]
        task = self.draw.choice(tasks)
        items = task.unit.items if task.probe is None else task.probe
        if self.deadly & {item.item_id for item in items} - task.lease.crashed.keys():
            self._dies(actor, CRASH)
        elif self.accidents and self.draw.random() < 0.2:
            self.accidents -= 1
            accident = self.draw.randrange(3)
            if accident == 2:
                self._ends(tasks, task)
                self.book.failed(task, LakeError("503"))
            else:
                self._dies(actor, (CRASH, LOST)[accident])
        else:
            self._ends(tasks, task)
            self.book.finished(task)
            if task.probe is None:
                self.committed.append(task.unit.unit_id)
                self.set_aside |= task.lease.crashed

    def _dies(self, actor: int, death: Death) -> None:
        tasks = self.running.pop(actor)
        for task in tasks:
            self.out.discard(id(task.lease))
            if task.probe is not None and len(task.probe) == 1:
                self.deaths_alone[task.probe[0].item_id] += 1
        self.book.died(tasks, death)

    def _ends(self, tasks: list[Task], task: Task) -> None:
        tasks.remove(task)
        self.out.discard(id(task.lease))


@pytest.mark.parametrize("seed", range(300))
def test_whatever_dies_every_unit_is_committed_once_and_only_killers_are_set_aside(seed: int) -> None:
    """Poison, accidents, lost nodes and a failing lake in a drawn order: nothing lost, nothing twice, every killer
    set aside, and nobody else unless actors died twice that had no other item."""
    draw = random.Random(seed)
    units = [made_unit(number, draw.choice([1, 2, 5, 8])) for number in range(12)]
    items = [item.item_id for unit in units for item in unit.items]
    deadly = frozenset(draw.sample(items, draw.choice([0, 1, 3])))
    clock = Clock()
    # More tries than there are accidents.
    book = made_book(units, clock, draw=draw.random, max_attempts=8)
    fleet = Fleet(book, clock, draw, deadly, in_flight=draw.choice([1, 2, 3]))
    fleet.run()
    assert sorted(fleet.committed) == sorted(unit.unit_id for unit in units)
    assert fleet.set_aside.keys() >= deadly
    assert all(fleet.deaths_alone[item_id] >= 2 for item_id in fleet.set_aside)


@pytest.mark.parametrize("seed", range(50))
def test_without_accidents_exactly_the_killers_are_set_aside(seed: int) -> None:
    """The search by halves finds all of them and nobody else, in every order of its probes."""
    draw = random.Random(seed)
    units = [made_unit(number, 16) for number in range(6)]
    deadly = frozenset(draw.sample([item.item_id for unit in units for item in unit.items], 4))
    clock = Clock()
    fleet = Fleet(made_book(units, clock), clock, draw, deadly, accidents=0)
    fleet.run()
    assert fleet.set_aside.keys() == deadly


def test_a_plan_is_taken_only_as_far_as_it_is_needed() -> None:
    """Two units wait in the book, however long the plan is; a third is taken when one is handed out."""
    made = []

    def endless() -> Iterator[Unit]:
        while True:
            made.append(made_unit(len(made), 1))
            yield made[-1]

    book = made_book(endless(), Clock())
    assert len(made) == 2
    for number in range(1, 10):
        task = book.take()
        assert task is not None
        assert len(made) == number + 2
        book.finished(task)


def test_the_wait_doubles_and_ends_with_the_error() -> None:
    """A lake that fails four times: waits of 1, 2 and 4 seconds, then the lake's own error."""
    clock = Clock()
    book = made_book([made_unit(0)], clock)
    waits = []
    error = LakeError("503")
    for _ in range(3):
        book.failed(taken(book, clock), error)
        waits.append(book.next_ready_s())
    assert waits == [1.0, 2.0, 4.0]
    with pytest.raises(LakeError, match="503"):
        book.failed(taken(book, clock), error)


def test_jitter_is_half_to_one_and_a_half_of_the_wait() -> None:
    """Units that failed together are not tried together."""
    for drawn, wait_s in ((0.0, 0.5), (0.5, 1.0), (0.999, 1.499)):
        book = made_book([made_unit(0)], Clock(), draw=lambda drawn=drawn: drawn)
        book.failed(taken(book, Clock()), LakeError("503"))
        assert book.next_ready_s() == pytest.approx(wait_s)


def test_units_that_were_together_when_an_actor_died_run_alone() -> None:
    """One of the two is guilty, nobody knows which: neither gets a neighbour until it is committed."""
    clock = Clock()
    book = made_book([made_unit(0), made_unit(1), made_unit(2)], clock)
    first, second = taken(book, clock), taken(book, clock, load=1)
    book.died([first, second], CRASH)
    clock.now += 10
    assert book.waits_for_empty_actor()
    assert taken(book, clock, load=1).unit.unit_id == "u2"
    assert taken(book, clock).unit.unit_id == "u0"
    assert taken(book, clock).unit.unit_id == "u1"


def test_a_lost_node_makes_nobody_suspect() -> None:
    """Its units are handed out again beside others, and nothing is searched."""
    clock = Clock()
    book = made_book([made_unit(0)], clock)
    for _ in range(10):
        task = taken(book, clock, load=1)
        assert not task.alone
        book.died([task], LOST)


def test_a_unit_too_big_for_memory_is_scored_in_ever_more_pieces() -> None:
    """As a whole it kills, each half survives: 2 pieces, then 4; nobody is set aside."""
    clock = Clock()
    book = made_book([made_unit(0)], clock)
    pieces = []
    while book.backlog:
        task = taken(book, clock)
        if task.probe is None and task.lease.pieces < 4:
            pieces.append(task.lease.pieces)
            book.died([task], CRASH)
        else:
            book.finished(task)
    assert pieces == [1, 1, 2]
    assert not task.lease.crashed
    assert task.lease.pieces == 4


def test_a_machine_that_kills_everything_ends_the_run() -> None:
    """Deaths in a row with nothing finished between them are the machine's: the search of 64 samples does not go on
    to set aside each of them."""
    clock = Clock()
    book = made_book([made_unit(number, 64) for number in range(4)], clock)

    def kill_all() -> None:
        while book.backlog:
            book.died([taken(book, clock)], CRASH)

    with pytest.raises(EngineError, match="died in a row"):
        kill_all()


def test_a_stopped_book_waits_only_for_what_is_out() -> None:
    """Nothing is begun after `stop`, not even what failed by then."""
    clock = Clock()
    book = made_book([made_unit(number) for number in range(5)], clock)
    task, other = taken(book, clock), taken(book, clock)
    book.stop()
    assert book.take() is None
    assert book.backlog == 2
    book.finished(task)
    book.failed(other, LakeError("503"))
    book.stop()
    assert book.backlog == 0
