"""The events of jobs as they come, for as many as listen.

Whoever listens names the last event that they have, and gets every later one once and in order, whether it happened
before, while they were away, or happens now. A job's newest events are read once for all who listen to it; only who
comes from further back asks the store.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from logitlake_shared.jobs.records import Event
from logitlake_shared.jobs.store import JobStore

__all__ = ["Feed"]

# Events of one job that are kept for those who listen to it.
_KEPT = 1000
_AT_ONCE = 500


class _Channel:
    """One job's."""

    def __init__(self) -> None:
        self.since: int | None = None
        """every event after this one is in `newest`; None before they were read"""
        self.newest: list[Event] = []
        self.changed = asyncio.Event()
        self.listening = 0
        self.reading = asyncio.Lock()

    @property
    def last(self) -> int:
        """The id of the newest event that is here."""
        return self.newest[-1].id if self.newest else self.since or 0

    def take(self, events: Sequence[Event]) -> None:
        """Adds what is new, and wakes those who wait."""
        self.newest += events
        for forgotten in self.newest[:-_KEPT]:
            self.since = forgotten.id
        del self.newest[:-_KEPT]
        self.changed.set()
        self.changed = asyncio.Event()


class Feed:
    """The events of a store's jobs; belongs to one event loop."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._channels: dict[str, _Channel] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    def open(self) -> None:
        """Begins, on the loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._store.on_change = self._from_any_thread

    def end(self) -> None:
        """Ends every feed; may be called from any thread, and from a signal handler."""
        self._ended = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._wake_all)

    async def follow(self, job_id: str, after: int, heartbeat_s: float) -> AsyncGenerator[list[Event]]:
        """A job's events after the event `after`, as they come; an empty list every `heartbeat_s` without any.

        Goes on until the service ends or nobody listens any more.
        """
        channel = self._channels.setdefault(job_id, _Channel())
        channel.listening += 1
        try:
            if channel.since is None:
                await self._read(job_id, channel)
            while not self._ended:
                changed = channel.changed
                events = await self._after(job_id, channel, after)
                if events:
                    after = max(after, events[-1].id)
                    yield events
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), heartbeat_s)
                except TimeoutError:
                    yield []
        finally:
            channel.listening -= 1
            if not channel.listening:
                self._channels.pop(job_id, None)

    async def _after(self, job_id: str, channel: _Channel, after: int) -> list[Event]:
        if channel.since is None or after < channel.since:
            return await run_in_threadpool(self._store.events, job_id, after, _AT_ONCE)
        return [event for event in channel.newest if event.id > after]

    async def _read(self, job_id: str, channel: _Channel) -> None:
        async with channel.reading:
            if channel.since is None:
                job = await run_in_threadpool(self._store.find, job_id)
                channel.since = 0 if job is None else job.last_event
            channel.take(await run_in_threadpool(self._store.events, job_id, channel.last, _KEPT))

    def _from_any_thread(self, job_id: str) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._changed, job_id)

    def _changed(self, job_id: str) -> None:
        if (channel := self._channels.get(job_id)) is not None:
            task = asyncio.create_task(self._read(job_id, channel))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _wake_all(self) -> None:
        for channel in self._channels.values():
            channel.take([])
