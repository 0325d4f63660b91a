"""Scoring and sampling never share a step of vLLM: who may run now, among calls from several threads.

vLLM computes prompt logprobs for every token of a step in which one request asks for them, and with the largest k of
the step: mixed phases would cost memory that nobody planned for, and make rows depend on their neighbours.
"""

import collections
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

__all__ = ["Phase", "PhaseGate"]

Phase = Literal["score", "sample"]


@dataclass(frozen=True, eq=False)
class _Ticket:
    phase: Phase


class PhaseGate:
    """Calls of one phase run together; a call of the other waits until they are through.

    First come, first served: a call behind a waiting one waits too, so that neither phase starves.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: collections.deque[_Ticket] = collections.deque()
        self._phase: Phase | None = None
        self._num_running = 0

    @property
    def waiting(self) -> list[Phase]:
        """Phases of the calls that wait, in the order in which they came."""
        with self._changed:
            return [ticket.phase for ticket in self._queue]

    @contextmanager
    def enter(self, phase: Phase) -> Iterator[None]:
        """Holds the phase while the block runs."""
        ticket = _Ticket(phase)
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._queue[0] is ticket and (not self._num_running or self._phase == phase)
                )
                self._phase = phase
                self._num_running += 1
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()
