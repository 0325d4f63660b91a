"""A bounded number of bytes of decoded values, made once however many threads want them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar, cast

__all__ = ["Held"]

Value = TypeVar("Value")


class Held:
    """Values by key. When their bytes exceed `max_bytes`, the least recently used leave; the newest always stays."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Future[tuple[Any, int]]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """The bytes of all values held now."""
        return self._num_bytes

    def get(self, key: Hashable, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of `key`; `make` gives it and its bytes when it is not held. What `make` raises is raised here."""
        mine: Future[tuple[Any, int]] | None = None
        with self._lock:
            future = self._values.get(key)
            if future is None:
                future = mine = self._values[key] = Future()
            else:
                self._values.move_to_end(key)
        if mine is not None:
            self._make(key, mine, make)
        return cast(Value, future.result()[0])

    def _make(self, key: Hashable, mine: Future[tuple[Any, int]], make: Callable[[], tuple[Value, int]]) -> None:
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._values[key]
            mine.set_exception(error)
            return
        mine.set_result(made)
        with self._lock:
            self._num_bytes += made[1]
            for old, future in list(self._values.items()):
                if self._num_bytes <= self._max_bytes or old == key:
                    break
                if future.done():  # what is being made now counts when it is there
                    del self._values[old]
                    self._num_bytes -= future.result()[1]
