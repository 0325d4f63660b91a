"""Units on Ray actors, one engine each. The one file of the project that imports ray.

The driver leases one unit to each actor whose teacher is loaded and waits for whichever finishes first; the actor
commits its unit itself, so a result that gets lost on the way costs nothing. An actor that dies (a teacher out of
memory, a crash in a kernel, a lost node) is replaced and its unit leased again. A unit that kills its actor
`max_attempts` times is searched by halves for the samples that do it; these get an error row (`teacher_crashed`) and
the others are captured. A teacher that dies while it is loaded is not blamed on any sample: it ends the command.

Plain actors and `ray.wait`, because Ray Data's commit unit is a write task and its resume duplicates rows, while here
a lost actor costs one unit.
"""

import collections
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from logitlake_schemas import CommitRecord
from logitlake_shared.errors import ConfigError, EngineError, LogitLakeError
from logitlake_teacher.config import RayExecutorConfig
from logitlake_teacher.executors.base import MakeWorker
from logitlake_teacher.items import Item, Unit

__all__ = ["RayExecutor"]


@dataclass
class _Lease:
    """A unit that waits for an actor or runs on one."""

    unit: Unit
    attempts: int = 0
    crashed: dict[str, str] = field(default_factory=dict)
    """items that kill the teacher, and what happened"""


class RayExecutor:
    """Implements `executors.base.Executor`."""

    def __init__(self, config: RayExecutorConfig) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                f"executor.type is 'ray', but Ray cannot be imported: {error}; install logitlake[teacher-hf], or use "
                "executor.type=inline"
            ) from error
        self._ray: Any = ray
        self._config = config

    def run(self, units: Iterable[Unit], make_worker: MakeWorker) -> Iterator[CommitRecord]:
        """See `Executor.run`."""
        with self._connected():
            yield from self._run(units, make_worker)

    def _run(self, units: Iterable[Unit], make_worker: MakeWorker) -> Iterator[CommitRecord]:
        waiting = collections.deque(_Lease(unit) for unit in units)
        starting = dict(self._start(make_worker) for _ in range(min(self._config.num_actors, len(waiting))))
        idle: list[Any] = []
        running: dict[Any, tuple[Any, _Lease]] = {}
        failed_starts = 0
        while waiting or running:
            while waiting and idle:
                actor, lease = idle.pop(), waiting.popleft()
                running[actor.run.remote(lease.unit, lease.crashed)] = (actor, lease)
            (done,), _ = self._ray.wait([*running, *starting], num_returns=1)
            if done in starting:
                actor = starting.pop(done)
                try:
                    self._get(done)
                except _ActorDiedError as death:
                    failed_starts += 1
                    if failed_starts >= self._config.max_attempts:
                        raise _cannot_start(death) from death
                    starting.update([self._start(make_worker)])
                else:
                    failed_starts = 0
                    idle.append(actor)
                continue
            actor, lease = running.pop(done)
            try:
                record: CommitRecord = self._get(done)
            except _ActorDiedError as death:
                lease.attempts += 1
                if lease.attempts >= self._config.max_attempts:
                    idle.append(self._find_poison(lease, str(death), make_worker))
                else:
                    starting.update([self._start(make_worker)])
                waiting.appendleft(lease)
                continue
            idle.append(actor)
            yield record

    def _find_poison(self, lease: _Lease, death: str, make_worker: MakeWorker) -> Any:
        """Adds the items of the lease that kill an actor to `lease.crashed`; returns an actor that is ready.

        Raises `EngineError` if the unit kills actors while none of its items does alone.
        """
        actor = self._start_and_wait(make_worker)
        found = dict(lease.crashed)
        suspects: list[Sequence[Item]] = [[item for item in lease.unit.items if item.item_id not in found]]
        while suspects:
            group = suspects.pop()
            try:
                self._get(actor.probe.remote(group))
                continue
            except _ActorDiedError as again:
                death = str(again)
            actor = self._start_and_wait(make_worker)
            if len(group) == 1:
                found[group[0].item_id] = f"the teacher's process ended each time it met this sample: {death}"
            else:
                middle = len(group) // 2
                suspects += [group[middle:], group[:middle]]
        if found == lease.crashed:
            raise EngineError(
                f"unit {lease.unit.unit_id}: its actor died {lease.attempts} times, and no single sample of it is the "
                f"cause; last death: {death}. Look at the memory of the machine; run the command again to go on"
            )
        lease.crashed, lease.attempts = found, 0
        return actor

    def _get(self, reference: Any) -> Any:
        """The result of a remote call. Raises `_ActorDiedError`, or the worker's own `LogitLakeError`."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.ActorDiedError as error:
            raise _ActorDiedError(_first_line(error)) from error
        except (exceptions.ActorUnavailableError, exceptions.WorkerCrashedError) as error:
            raise _ActorDiedError(_first_line(error)) from error
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, LogitLakeError):
                raise error.cause from None
            raise

    def _start(self, make_worker: MakeWorker) -> tuple[Any, Any]:
        """`(ready, actor)`: a new actor, and the reference that is done once its teacher is loaded.

        It never restarts or retries by itself: the driver knows what it was doing.
        """
        options = {
            "num_cpus": self._config.cpus_per_actor,
            "num_gpus": self._config.gpus_per_actor,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        actor = self._ray.remote(_ActorWorker).options(**options).remote(make_worker)
        return actor.start.remote(), actor

    def _start_and_wait(self, make_worker: MakeWorker) -> Any:
        ready, actor = self._start(make_worker)
        try:
            self._get(ready)
        except _ActorDiedError as death:
            raise _cannot_start(death) from death
        return actor

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """The cluster that `RAY_ADDRESS` names, or a local one of the size that the actors need; left at the end."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        address = os.environ.get("RAY_ADDRESS")
        if address:
            try:
                self._ray.init(**quiet)
            except ConnectionError as error:
                raise ConfigError(f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there: {error}") from error
        else:
            num_cpus = self._config.num_actors * self._config.cpus_per_actor
            self._ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, **quiet)
        try:
            yield
        finally:
            self._ray.shutdown()


class _ActorDiedError(Exception):
    """The process of an actor ended; the message says how."""


class _ActorWorker:
    """The actor. The worker is made in a call and not in `__init__`, so that its errors come back as they are."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._make_worker = make_worker
        self._worker: Any = None

    def start(self) -> None:
        self._worker = self._make_worker()

    def run(self, unit: Unit, crashed: dict[str, str]) -> CommitRecord:
        record: CommitRecord = self._worker.run(unit, crashed)
        return record

    def probe(self, items: Sequence[Item]) -> None:
        self._worker.probe(items)


def _cannot_start(death: Exception) -> EngineError:
    return EngineError(
        f"the teacher's process ended while the teacher was being loaded: {death}. Nothing was captured by it; look at "
        "the memory of the machine, or try executor.type=inline to see what happens"
    )


def _first_line(error: Exception) -> str:
    """The sentence of a Ray error that says what happened, without its table of ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
