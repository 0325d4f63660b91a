"""The actors of a run: one teacher each, started where the cluster has room, replaced when they end.

An actor is placed first (it has a process on some node) and then loads its teacher; both waits have a ceiling, and
an actor that waits for a place holds nothing up. It never restarts or retries by itself: the driver knows what it was
doing. Calls run in threads of the actor, `units_in_flight` at a time.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from logitlake_shared.errors import EngineError, LogitLakeError
from logitlake_teacher.config import RayExecutorConfig
from logitlake_teacher.executors.base import Committed, MakeWorker, is_retryable
from logitlake_teacher.executors.leases import Death, Task
from logitlake_teacher.executors.ray_session import cluster_resources, node_is_alive
from logitlake_teacher.items import Item, Unit

__all__ = ["Actor", "ActorPool"]

# What a teacher may take to free its GPU when the run is over.
_CLOSE_S = 30.0


@dataclass(eq=False)
class Actor:
    """One actor as the driver sees it."""

    handle: Any
    since: float
    """when it was asked for; then when it was placed; then when it last finished something or got work after none"""
    starting: Any
    """reference of the call that is done when it is placed, and then of the one that loads the teacher"""
    node: str | None = None
    """the node that it was placed on"""
    ready: bool = False
    running: dict[Any, Task] = field(default_factory=dict)


class ActorPool:
    """Keeps as many actors as there is work for, at most `num_actors`."""

    def __init__(self, ray: Any, config: RayExecutorConfig, num_gpus: float, make_worker: MakeWorker) -> None:
        self._ray = ray
        self._config = config
        self._needs = {"CPU": config.cpus_per_actor, "GPU": num_gpus, **config.resources}
        self._options: dict[str, Any] = {
            "num_cpus": config.cpus_per_actor,
            "num_gpus": num_gpus,
            "resources": dict(config.resources),
            "max_restarts": 0,
            "max_task_retries": 0,
            # One thread more than units: a start that hangs must not keep `hello` from being answered.
            "max_concurrency": config.units_in_flight + 1,
        }
        if config.label_selector:
            self._options["label_selector"] = dict(config.label_selector)
        # Once: the actors share it, however much the plan of the run weighs.
        self._make_worker = ray.put(make_worker)
        self._actors: list[Actor] = []
        self._failed_starts = 0
        self._has_loaded = False
        """whether any teacher was ever loaded"""
        self._next_start = 0.0
        self._enough_since = time.monotonic()

    def __iter__(self) -> Iterator[Actor]:
        return iter(self._actors)

    @property
    def ready(self) -> list[Actor]:
        """The actors that can work."""
        return [actor for actor in self._actors if actor.ready]

    def grow(self, backlog: int) -> None:
        """Asks for actors until there are as many as can be used. Raises `EngineError` when too few can be had."""
        wanted = min(self._config.num_actors, backlog)
        now = time.monotonic()
        while len(self._actors) < wanted and now >= self._next_start:
            handle = self._ray.remote(_ActorWorker).options(**self._options).remote(self._make_worker)
            self._actors.append(Actor(handle, now, handle.place.remote()))
        enough = min(self._config.min_actors, wanted)
        # One that loads its teacher counts, it has a ceiling of its own.
        if sum(actor.node is not None for actor in self._actors) >= enough:
            self._enough_since = now
        elif now - self._enough_since > self._config.start_timeout_s:
            raise self._no_room(enough)

    def started(self, actor: Actor) -> None:
        """The actor's `starting` is done: it is placed, or its teacher is loaded, or it failed.

        Raises the error of a teacher that cannot be loaded, and `EngineError` for one that dies of it time and again.
        """
        try:
            answer = self.get(actor.starting)
        except ActorEnded as ended:
            self.end(actor)
            if self.explain(actor, ended).code != "lost":
                self._failed_start(_dies_at_start(ended))
            return
        except LogitLakeError as error:
            self.end(actor)
            # A teacher's own explanation, when none was ever loaded, is about the teacher and not about one node.
            if not is_retryable(error) or (isinstance(error, EngineError) and not self._has_loaded):
                raise
            self._failed_start(error)
            return
        actor.since = time.monotonic()
        if actor.node is None:
            actor.node, actor.starting = answer, actor.handle.start.remote()
            return
        actor.starting, actor.ready = None, True
        self._has_loaded, self._failed_starts = True, 0

    def end_late_starts(self) -> None:
        """Ends the actors whose teacher takes too long to load. Raises as `started` does."""
        late_s = self._config.start_timeout_s
        for actor in list(self._actors):
            if actor.node is not None and not actor.ready and time.monotonic() - actor.since > late_s:
                self.end(actor)
                self._failed_start(
                    EngineError(
                        f"a teacher was not loaded after {late_s:g} s (executor.start_timeout_s); raise that, or try "
                        "executor.type=inline to see what it waits for"
                    )
                )

    def hangs(self, actor: Actor) -> bool:
        """Whether it has work and finished none of it for too long."""
        return bool(actor.running) and time.monotonic() - actor.since > self._config.unit_timeout_s

    def end(self, actor: Actor) -> None:
        """Forgets the actor and ends its process at once, if there is still one."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle, no_restart=True)

    def get(self, reference: Any) -> Any:
        """The result of a call that is done. Raises `ActorEnded`, or the worker's own `LogitLakeError`."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (exceptions.ActorUnavailableError, exceptions.ActorDiedError) as error:
            raise ActorEnded(_how(error), lost=bool(getattr(error, "preempted", False))) from error
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError) as error:
            raise ActorEnded(_how(error)) from error
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, LogitLakeError):
                raise error.cause from None
            if isinstance(error.cause, MemoryError):
                raise ActorEnded("it could get no more memory from the system (MemoryError)") from error
            raise

    def explain(self, actor: Actor, ended: "ActorEnded") -> Death:
        """What is known of the end of an actor."""
        if ended.lost or (actor.node is not None and not node_is_alive(self._ray, actor.node)):
            return Death("lost", str(ended))
        return Death("teacher_crashed", f"the teacher's process ended: {ended}")

    def close(self) -> None:
        """Lets every teacher free what it holds; what does not in time is killed."""
        closing = [actor.handle.close.remote() for actor in self._actors if actor.ready and not actor.running]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
        for actor in list(self._actors):
            self.end(actor)

    def _failed_start(self, error: LogitLakeError) -> None:
        self._failed_starts += 1
        # While others work, one bad node must not end the run: it is tried again, ever more slowly.
        if self._failed_starts >= self._config.max_attempts and not self.ready:
            raise error
        self._next_start = time.monotonic() + min(self._config.backoff_s * 2.0 ** (self._failed_starts - 1), 60.0)

    def _no_room(self, enough: int) -> EngineError:
        biggest, free = cluster_resources(self._ray)
        said = "; ".join(
            f"{name}: an actor needs {amount:g}, the biggest node has {biggest.get(name, 0):g}, "
            f"free in the cluster {free.get(name, 0):g}"
            for name, amount in self._needs.items()
            if amount
        )
        labels = f"; nodes must have the labels {self._config.label_selector}" if self._config.label_selector else ""
        return EngineError(
            f"the Ray cluster had no room for {enough} actor(s) for {self._config.start_timeout_s:g} s "
            f"(executor.start_timeout_s): {said}{labels}. Add nodes, or ask for less per actor"
        )


class ActorEnded(Exception):  # noqa: N818  # not an error of its own: the pool says what it means
    """The process of an actor ended, or nobody can reach it; the message says how."""

    def __init__(self, how: str, *, lost: bool = False) -> None:
        super().__init__(how)
        self.lost = lost


class _ActorWorker:
    """The actor. The worker is made in a call and not in `__init__`, so that its errors come back as they are."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._make_worker = make_worker
        self._worker: Any = None
        self._lock = threading.Lock()

    def place(self) -> str:
        """The id of the node that it is on."""
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node

    def start(self) -> None:
        self._worker = self._make_worker()

    def run(self, unit: Unit, crashed: Mapping[str, str], pieces: int) -> Committed:
        done: Committed = self._worker.run(unit, crashed, pieces)
        return done

    def probe(self, items: Sequence[Item]) -> None:
        self._worker.probe(items)

    def close(self) -> None:
        self._worker.close()


def _dies_at_start(ended: ActorEnded) -> EngineError:
    return EngineError(
        f"the teacher's process ended while the teacher was being loaded: {ended}. Nothing was captured by it; look at "
        "the memory of the machine, or try executor.type=inline to see what happens"
    )


def _how(error: Exception) -> str:
    """What of a Ray error says how a process ended, without its table of ids and its advice."""
    text = " ".join(str(error).split())
    _, found, detail = text.partition("Worker exit detail: ")
    if not found:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    if "connection error code" in detail:
        return "without a word, as after a signal, a crash, or the system's out-of-memory killer"
    return detail.rstrip(".")
