"""Units on Ray actors, one engine each. The one file of the project that imports ray.

The driver leases one unit to each idle actor and waits for whichever finishes first; the actor commits its unit
itself, so a result that gets lost on the way costs nothing. An actor that dies (a teacher out of memory, a crash in
a kernel, a lost node) is replaced and its unit leased again. A unit that kills its actor `max_attempts` times is
searched by halves for the samples that do it; these get an error row (`teacher_crashed`) and the others are captured.

Plain actors and `ray.wait`, because Ray Data's commit unit is a write task and its resume duplicates rows,
while here a lost actor costs one unit.
"""

import collections
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from logitlake_schemas import CommitRecord
from logitlake_shared.errors import ConfigError, EngineError, LogitLakeError
from logitlake_teacher.config import RayExecutorConfig
from logitlake_teacher.executors.base import MakeWorker
from logitlake_teacher.planner import Item, Unit

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

    def run(self, units: Sequence[Unit], make_worker: MakeWorker) -> Iterator[CommitRecord]:
        """See `Executor.run`."""
        with self._connected():
            yield from self._run(units, make_worker)

    def _run(self, units: Sequence[Unit], make_worker: MakeWorker) -> Iterator[CommitRecord]:
        waiting = collections.deque(_Lease(unit) for unit in units)
        idle = [self._start(make_worker) for _ in range(min(self._config.num_actors, len(units)))]
        running: dict[Any, tuple[Any, _Lease]] = {}
        while waiting or running:
            while waiting and idle:
                actor, lease = idle.pop(), waiting.popleft()
                running[actor.run.remote(lease.unit, lease.crashed)] = (actor, lease)
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            actor, lease = running.pop(done)
            try:
                record: CommitRecord = self._get(done)
            except _ActorDiedError as death:
                lease.attempts += 1
                actor = self._start(make_worker)
                if lease.attempts >= self._config.max_attempts:
                    actor = self._find_poison(actor, lease, str(death), make_worker)
                waiting.appendleft(lease)
                idle.append(actor)
                continue
            idle.append(actor)
            yield record

    def _find_poison(self, actor: Any, lease: _Lease, death: str, make_worker: MakeWorker) -> Any:
        """Adds the items of the lease that kill an actor to `lease.crashed`; returns a living actor.

        Raises `EngineError` if the unit kills actors while none of its items does alone.
        """
        found = dict(lease.crashed)
        suspects: list[Sequence[Item]] = [[item for item in lease.unit.items if item.item_id not in found]]
        while suspects:
            group = suspects.pop()
            try:
                self._get(actor.probe.remote(group))
                continue
            except _ActorDiedError as again:
                actor, death = self._start(make_worker), str(again)
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

    def _start(self, make_worker: MakeWorker) -> Any:
        """A new actor. It never restarts or retries by itself: the driver knows what it was doing."""
        options = {
            "num_cpus": self._config.cpus_per_actor,
            "num_gpus": self._config.gpus_per_actor,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        return self._ray.remote(_ActorWorker).options(**options).remote(make_worker)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """The cluster that `RAY_ADDRESS` names, or a local one of the size that the actors need; left at the end."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if os.environ.get("RAY_ADDRESS"):
            self._ray.init(**quiet)
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
    """The actor: a worker that is made on the first call, so that what goes wrong comes back as an ordinary error."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._make_worker = make_worker
        self._worker: Any = None

    def run(self, unit: Unit, crashed: dict[str, str]) -> CommitRecord:
        record: CommitRecord = self._made().run(unit, crashed)
        return record

    def probe(self, items: Sequence[Item]) -> None:
        self._made().probe(items)

    def _made(self) -> Any:
        if self._worker is None:
            self._worker = self._make_worker()
        return self._worker


def _first_line(error: Exception) -> str:
    """The sentence of a Ray error that says what happened, without its table of ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
