"""How many bytes the caches of a lake hold, for `/metrics`: looked at now and then, never while Prometheus waits.

It is what the newest snapshots list, as `/v1/caches` has it by cache; a snapshot that was added up once is not read
again. What none of them lists is not in it. While the lake cannot be read nothing is said.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from logitlake_shared.cache_figures import cache_figures
from logitlake_shared.errors import LakeError
from logitlake_shared.lake import Cache, Lake

__all__ = ["CacheSizes"]

_log = logging.getLogger("logitlake.caches")

_EVERY_S = 60.0


class CacheSizes(Collector):
    """Those of one lake."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._bytes: dict[tuple[str, str, int], int] = {}
        """by a cache's name and fingerprint and the number of its newest snapshot"""
        self._total: int | None = None
        self._closing = threading.Event()

    @contextmanager
    def running(self, registry: CollectorRegistry) -> Iterator[None]:
        """Looks once a minute, in a thread that nobody waits for: a store may take minutes to say that it is gone."""
        registry.register(self)
        threading.Thread(target=self._work, name="cache-sizes", daemon=True).start()
        try:
            yield
        finally:
            self._closing.set()

    def measure(self) -> None:
        """Looks now."""
        try:
            found = dict(self._size(self._lake.cache(name)) for name in self._lake.cache_names())
        except (LakeError, OSError) as error:
            _log.warning("the sizes of the caches are not known: %s", error)
            self._total = None
        else:
            self._bytes, self._total = found, sum(found.values())

    def collect(self) -> Iterator[Metric]:
        """As of the last look."""
        yield GaugeMetricFamily(
            "logitlake_cache_size_bytes", "Bytes of all caches, by their newest snapshots.", self._total
        )

    def _size(self, cache: Cache) -> tuple[tuple[str, str, int], int]:
        number = cache.newest_snapshot_number()
        key = cache.name, cache.fingerprint, number
        if number and key not in self._bytes:
            return key, cache_figures(cache, cache.open_snapshot(number)).bytes
        return key, self._bytes.get(key, 0)

    def _work(self) -> None:
        while not self._closing.is_set():
            self.measure()
            self._closing.wait(_EVERY_S)
