"""Units on Ray actors, one engine each.

The driver hands each actor whose teacher is loaded a few units at a time and waits for whichever finishes first; the
actor commits its units itself, so a result that gets lost on the way costs nothing. What is handed out, when and how
often is `leases.LeaseBook`'s; which actors there are is `ray_actors.ActorPool`'s; the loop here carries what happened
from the one to the other.

Plain actors and `ray.wait`, because Ray Data's commit unit is a write task and its resume duplicates rows, while here
a lost actor costs the units on it: docs/decisions/0003.
"""

import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

from logitlake_shared.errors import EngineError, LogitLakeError
from logitlake_teacher.config import RayExecutorConfig
from logitlake_teacher.executors.base import Committed, MakeWorker, is_retryable
from logitlake_teacher.executors.leases import Death, LeaseBook
from logitlake_teacher.executors.ray_actors import Actor, ActorEnded, ActorPool
from logitlake_teacher.executors.ray_session import connected, import_ray
from logitlake_teacher.executors.stopping import StopRequest
from logitlake_teacher.items import Unit

__all__ = ["RayExecutor"]

# How often the loop looks at the ceilings while nothing happens.
_LOOK_S = 1.0


class RayExecutor:
    """Implements `executors.base.Executor`."""

    def __init__(self, config: RayExecutorConfig, engine_gpus: float = 0.0) -> None:
        """`engine_gpus`: GPUs that one engine needs where there are any. Raises `ConfigError` without Ray."""
        import_ray()
        self._config = config
        self._engine_gpus = engine_gpus

    def run(
        self, units: Iterable[Unit], make_worker: MakeWorker, stop: StopRequest | None = None
    ) -> Iterator[Committed]:
        """See `Executor.run`."""
        config = self._config
        book = LeaseBook(
            units,
            ahead=config.num_actors,
            max_attempts=config.max_attempts,
            backoff_s=config.backoff_s,
            clock=time.monotonic,
            draw=random.Random().random,
        )
        if not book.backlog:
            return
        asked = stop or StopRequest()
        # What a signal handler raises inside of Ray's C++ comes out as a SystemError, or not at all.
        asked.interrupts = False
        with connected(config.num_actors * config.cpus_per_actor) as ray:
            pool = ActorPool(ray, config, self._gpus(ray), make_worker)
            try:
                yield from self._run(ray, book, pool, asked)
            finally:
                pool.close()

    def _run(self, ray: Any, book: LeaseBook, pool: ActorPool, stop: StopRequest) -> Iterator[Committed]:
        while book.backlog:
            if stop.grace_is_over:
                return
            if stop():
                book.stop()
            pool.grow(book.backlog)
            self._hand_out(book, pool)
            for reference in self._wait(ray, book, pool):
                actor = next((one for one in pool if reference is one.starting or reference in one.running), None)
                if actor is None:
                    continue  # another of its calls told already that it ended
                if reference is actor.starting:
                    pool.started(actor)
                    continue
                done = self._result(reference, actor, book, pool)
                if done is not None:
                    yield done
            pool.end_late_starts()
            for actor in [actor for actor in pool if pool.hangs(actor)]:
                limit_s = self._config.unit_timeout_s
                how = f"the teacher gave no answer within {limit_s:g} s (executor.unit_timeout_s)"
                _end(actor, Death("teacher_timeout", how), book, pool)

    def _hand_out(self, book: LeaseBook, pool: ActorPool) -> None:
        """Gives actors work, the least loaded first; one is kept free for a task that must be alone."""
        ready = sorted(pool.ready, key=lambda actor: len(actor.running))
        kept = book.waits_for_empty_actor() and bool(ready) and bool(ready[0].running)
        for actor in ready[1:] if kept else ready:
            while len(actor.running) < self._config.units_in_flight and not _is_alone(actor):
                task = book.take(len(actor.running))
                if task is None:
                    break
                if not actor.running:
                    actor.since = time.monotonic()
                if task.probe is not None:
                    reference = actor.handle.probe.remote(task.probe)
                else:
                    reference = actor.handle.run.remote(task.unit, task.lease.crashed, task.lease.pieces)
                actor.running[reference] = task

    def _wait(self, ray: Any, book: LeaseBook, pool: ActorPool) -> list[Any]:
        """The calls that are done by now, at least one unless something else is due first."""
        references = [reference for actor in pool for reference in (actor.starting, *actor.running) if reference]
        patience_s = min(book.next_ready_s() or _LOOK_S, _LOOK_S)
        if not references:
            time.sleep(patience_s)
            return []
        done: list[Any]
        done, _ = ray.wait(references, num_returns=1, timeout=patience_s)
        if done:
            # Whatever else is done by now, too: one look for many short units.
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return done

    def _result(self, reference: Any, actor: Actor, book: LeaseBook, pool: ActorPool) -> Committed | None:
        """What became of a task, if it was a unit and is committed."""
        try:
            done: Committed | None = pool.get(reference)
        except ActorEnded as ended:
            _end(actor, pool.explain(actor, ended), book, pool)
            return None
        except LogitLakeError as error:
            if not is_retryable(error):
                raise
            actor.since = time.monotonic()
            book.failed(actor.running.pop(reference), error)
            if isinstance(error, EngineError):
                # A teacher that failed is not trusted with another unit; what else is on it did nothing.
                _end(actor, Death("lost", f"its teacher failed: {error}"), book, pool)
            return None
        actor.since = time.monotonic()
        book.finished(actor.running.pop(reference))
        return done

    def _gpus(self, ray: Any) -> float:
        if self._config.gpus_per_actor is not None:
            return self._config.gpus_per_actor
        return self._engine_gpus if ray.cluster_resources().get("GPU", 0) else 0.0


def _is_alone(actor: Actor) -> bool:
    return any(task.alone for task in actor.running.values())


def _end(actor: Actor, death: Death, book: LeaseBook, pool: ActorPool) -> None:
    pool.end(actor)
    book.died(list(actor.running.values()), death)
