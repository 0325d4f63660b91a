"""SQL for many: questions over one lake, each answered by a process of its own.

    with SqlPool("lake") as pool, pool.run(SqlRequest("SELECT count(*) FROM tokens", caches=("main",))) as result:
        for batch in result: ...

A pool has one nursery, which forks workers. It keeps `num_warm` of them ready, lets `num_running` questions run, and
lets `num_waiting` more wait in the order in which they came. It promises:

* a question ends at most a second after its deadline, whatever it does: its process is killed. Parsing, `levenshtein`
  and friends cannot be interrupted, so nothing gentler would do;
* whatever happens to a worker (crash, no memory, killed by somebody) is an error of its question only;
* a place is free as soon as its question ended, also when nobody reads the answer;
* closing it leaves no process.

One thread, the keeper, has workers forked, looks after those that wait and kills those that are late; nothing that it
does takes long. Whoever asks reads the answer in their own thread. DuckDB is not imported here.
"""

import contextlib
import heapq
import itertools
import json
import logging
import math
import os
import select
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from logitlake_shared.errors import QueryBusyError, QueryCrashedError, QueryError
from logitlake_shared.sql_service.process import Nursery, TooLateError, WorkerEndedError, WorkerProcess
from logitlake_shared.sql_service.query import Query, SqlResult
from logitlake_shared.sql_service.records import ASK_LAYERS, SqlLimits, SqlRequest, frame, is_remote
from logitlake_shared.sql_service.sandbox import Layer

__all__ = ["SqlPool", "layers"]

_MAX_STARTS_FAILED = 3
_START_AGAIN_S = 0.2
# A busy machine may take its time to start Python.
_START_TIMEOUT_S = 120.0
# A killed process is gone in no time, unless the disk or the machine hangs.
_END_TIMEOUT_S = 5.0
_MAX_RETRY_AFTER_S = 60
_log = logging.getLogger(__name__)


class SqlPool:
    """The workers of one lake; may be used from many threads. Close it, or use it as a context manager."""

    def __init__(self, lake_uri: str | Path, limits: SqlLimits | None = None) -> None:
        self.limits = limits or SqlLimits()
        self._lake = _absolute(str(lake_uri))
        self._changed = threading.Condition()
        self._closed = False
        self._ready: deque[WorkerProcess] = deque()
        self._nursery: Nursery | None = None
        self._nursery_until = 0.0
        self._wanted = 0  # by questions that may run and have no worker yet
        self._failed_starts, self._start_again_at, self._last_words = 0, 0.0, ""
        self._queries: dict[str, Query] = {}
        self._num_running = 0
        self._waiting: deque[Query] = deque()
        self._deadlines: list[tuple[float, int, Query]] = []
        self._order = itertools.count()
        self._mean_s = 1.0
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        self._keeper = threading.Thread(target=self._keep, name="sql-pool", daemon=True)
        self._keeper.start()

    def run(self, request: SqlRequest) -> SqlResult:
        """Asks, and returns as soon as the answer begins; close the result, or read it to its end.

        Raises `QueryBusyError` where too many wait, `QueryRefusedError`, `QueryTimeoutError`, `QueryMemoryError`,
        `QueryCancelledError`, `QueryCrashedError`, `QueryError` for a question that is wrong, and `LakeError`. Reading
        the result raises the same.
        """
        asked = request.resolved(self.limits)
        payload = asked.to_bytes()
        query = Query(asked, self._finish)
        self._admit(query)
        try:
            worker = self._take_worker(query)
            worker.send(frame(b"Q", payload), query.deadline)
            return query.begin()
        except BaseException as error:
            query.end("timeout" if isinstance(error, TooLateError) else "failed")
            query.release()
            if isinstance(error, TooLateError | WorkerEndedError):
                raise query.explained(error) from error
            raise

    def cancel(self, query_id: str) -> bool:
        """Ends the question of this id, whether it waits or runs; False when there is none."""
        with self._changed:
            query = self._queries.get(query_id)
        return query is not None and query.end("cancelled")

    @property
    def num_running(self) -> int:
        """How many questions run now."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """How many questions wait for another one to end."""
        return len(self._waiting)

    @property
    def num_ready(self) -> int:
        """How many workers wait for a question."""
        return len(self._ready)

    def pids(self) -> list[int]:
        """The processes that there are now: the one that forks workers, and those that are ready or answer."""
        with self._changed:
            answering = [query.worker for query in self._queries.values() if query.worker is not None]
            nursery = [] if self._nursery is None else [self._nursery.pid]
            return [*nursery, *(worker.pid for worker in (*self._ready, *answering))]

    def wait_ready(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Waits until `num_warm` workers are ready. Raises `QueryCrashedError` where they do not start."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._ready) >= self.limits.num_warm or self._cannot_start() or self._closed, timeout_s
            )
            if len(self._ready) < self.limits.num_warm:
                raise self._not_started()

    def close(self) -> None:
        """Ends all questions and processes. Calling it twice is fine."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            queries = list(self._queries.values())
            self._changed.notify_all()
        for query in queries:
            query.end("closed")
        self._wake()
        self._keeper.join()
        for query in queries:
            if query.worker is not None:
                query.worker.wait(_END_TIMEOUT_S)
        for worker in self._ready:
            worker.close()
        self._ready.clear()
        if self._nursery is not None:
            self._nursery.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Who asks.

    def _admit(self, query: Query) -> None:
        """Waits until the question may run. Raises `QueryBusyError`, `QueryTimeoutError`, `QueryCancelledError`."""
        with self._changed:
            if self._closed:
                raise QueryError("the pool is closed")
            if query.query_id in self._queries:
                raise QueryError(f"query_id {query.query_id!r} is taken by a question that runs")
            if self._num_running >= self.limits.num_running or self._waiting:
                if len(self._waiting) >= self.limits.num_waiting:
                    raise self._busy()
                self._waiting.append(query)
            else:
                self._let_run(query)
            self._queries[query.query_id] = query
            heapq.heappush(self._deadlines, (query.deadline, next(self._order), query))
            self._wake()
            try:
                if not self._changed.wait_for(lambda: query.runs or query.reason, query.seconds_left()):
                    query.end("timeout")
            except BaseException:
                query.end("cancelled")
                raise
        if query.reason:
            raise query.explained(None)

    def _let_run(self, query: Query) -> None:
        query.runs = True
        self._num_running += 1
        self._wanted += 1

    def _take_worker(self, query: Query) -> WorkerProcess:
        with self._changed:
            try:
                ready = self._changed.wait_for(
                    lambda: self._ready or query.reason or self._cannot_start(), query.seconds_left()
                )
                if not ready:
                    query.end("timeout")
                if not query.reason and self._ready:
                    query.worker = self._ready.popleft()
            finally:
                self._wanted -= 1
                self._wake()
            worker = query.worker
        if query.reason:
            raise query.explained(None)
        if worker is None:
            raise self._not_started()
        return worker

    def _finish(self, query: Query) -> None:
        """Frees the place of a question that ended; called once for each."""
        with self._changed:
            self._queries.pop(query.query_id, None)
            if query.runs:
                self._num_running -= 1
                self._mean_s += 0.2 * (time.monotonic() - query.started - self._mean_s)
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(query)
            while self._waiting and self._num_running < self.limits.num_running and not self._closed:
                self._let_run(self._waiting.popleft())
            self._changed.notify_all()
        self._wake()

    def _busy(self) -> QueryBusyError:
        error = QueryBusyError(
            f"{self._num_running} questions run and {len(self._waiting)} wait, as many as may; ask again later"
        )
        seconds = self._mean_s * (len(self._waiting) + 1) / self.limits.num_running
        error.retry_after_s = min(_MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))
        return error

    def _cannot_start(self) -> bool:
        return self._failed_starts >= _MAX_STARTS_FAILED

    def _not_started(self) -> QueryCrashedError:
        return QueryCrashedError(
            f"no worker could be started ({self._last_words or 'too late'}); look whether `python -c "
            "'import logitlake_shared.sql_service.nursery'` works, and at the memory of the machine"
        )

    # The keeper.

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def _keep(self) -> None:
        while not self._closed:
            try:
                self._end_late()
                self._start_missing()
                self._watch()
            except Exception:  # without it nobody would kill what is late
                _log.exception("the keeper of a SQL pool failed, and goes on")
                time.sleep(_START_AGAIN_S)

    def _start_missing(self) -> None:
        while not self._closed and self._has_nursery():
            with self._changed:
                if len(self._ready) >= self.limits.num_warm + self._wanted:
                    return
            assert self._nursery is not None
            try:
                worker = self._nursery.spawn()
            except WorkerEndedError as error:
                self._give_up_nursery(f"it {error}")
                return
            with self._changed:
                self._failed_starts = 0
                self._ready.append(worker)
                self._changed.notify_all()

    def _has_nursery(self) -> bool:
        """Whether workers can be forked now; else one is started, or waited for, or failed."""
        nursery, now = self._nursery, time.monotonic()
        if nursery is not None and nursery.is_ready:
            return True
        if nursery is not None and nursery.is_gone:
            self._give_up_nursery(nursery.last_words())
        elif nursery is not None and now > self._nursery_until:
            self._give_up_nursery(f"it was not ready after {_START_TIMEOUT_S:g} s")
        elif nursery is None and now >= self._start_again_at:
            try:
                self._nursery = Nursery(self._lake, self.limits, self._wake)
                self._nursery_until = now + _START_TIMEOUT_S
            except OSError as error:
                self._give_up_nursery(str(error))
        return False

    def _give_up_nursery(self, words: str) -> None:
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None
        with self._changed:
            self._failed_starts += 1
            self._last_words = words
            self._start_again_at = time.monotonic() + _START_AGAIN_S * 2 ** min(self._failed_starts, 6)
            self._changed.notify_all()

    def _watch(self) -> None:
        """Waits until there is something to do."""
        poll, workers = self._watched()
        for handle, _ in poll.poll(self._pause() * 1000):
            if handle == self._wake_read:
                with contextlib.suppress(OSError):
                    os.read(self._wake_read, 4096)
            elif handle in workers:
                self._heard(workers[handle])

    def _watched(self) -> tuple[select.poll, dict[int, WorkerProcess]]:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        with self._changed:
            workers = {worker.output: worker for worker in self._ready}
        for handle in workers:
            poll.register(handle, select.POLLIN)
        return poll, workers

    def _pause(self) -> float:
        """Seconds until something is to be done that nobody wakes the keeper for."""
        now = time.monotonic()
        with self._changed:
            moments = [self._deadlines[0][0]] if self._deadlines else []
            if self._nursery is None:
                moments.append(self._start_again_at)
            elif not self._nursery.is_ready:
                moments.append(self._nursery_until)
        return max(0.0, min([moment - now for moment in moments], default=60.0))

    def _heard(self, worker: WorkerProcess) -> None:
        """A worker that waits has nothing to say, so it ended."""
        with self._changed:
            if worker not in self._ready:
                return  # somebody took it, and reads
            self._ready.remove(worker)
        worker.close()

    def _end_late(self) -> None:
        now = time.monotonic()
        late: list[Query] = []
        with self._changed:
            while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].reason):
                late.append(heapq.heappop(self._deadlines)[2])
        for query in late:
            query.end("timeout")


def layers(lake_uri: str | Path, limits: SqlLimits | None = None) -> list[Layer]:
    """The layers of the sandbox that a worker of this lake enters here: which are active, and why one is not.

    Asks a worker, which enters them. Raises `QueryCrashedError` where none can be started.
    """
    nursery = Nursery(_absolute(str(lake_uri)), limits or SqlLimits(), lambda: None)
    try:
        if not nursery.wait_ready(_START_TIMEOUT_S):
            raise WorkerEndedError(nursery.last_words())
        worker, deadline = nursery.spawn(), time.monotonic() + _START_TIMEOUT_S
        try:
            worker.send(frame(b"Q", ASK_LAYERS), deadline)
            _, payload = worker.read_frame(deadline)
        finally:
            worker.close()
        return [Layer(str(said["name"]), bool(said["active"]), str(said["detail"])) for said in json.loads(payload)]
    except (WorkerEndedError, TooLateError, ValueError, KeyError, TypeError) as error:
        raise QueryCrashedError(f"no worker could be started ({error})") from error
    finally:
        nursery.close()


def _absolute(lake: str) -> str:
    if is_remote(lake):
        return lake
    return str(Path(lake.removeprefix("file://")).expanduser().resolve())
