"""The size of the caches is that of the files that their newest snapshots list, or it is not said."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from logitlake_shared.lake import Lake
from logitlake_teacher.api.cache_sizes import CacheSizes

PATIENCE_S = 60.0


def value(sizes: CacheSizes) -> float | None:
    """What a scrape would read now."""
    (family,) = sizes.collect()
    return family.samples[0].value if family.samples else None


def on_disk(lake: Path) -> int:
    """Bytes of all shards and images."""
    return sum(path.stat().st_size for path in lake.glob("caches/*/*/*.parquet"))


def test_it_is_the_size_of_the_files(small_lake: Path, make_unit: Callable[..., Any]) -> None:
    """Of all caches; a unit counts from the snapshot on that lists it; before the first look nothing is said."""
    lake = Lake.open(small_lake)
    sizes, before = CacheSizes(lake), on_disk(small_lake)
    assert value(sizes) is None
    sizes.measure()
    assert value(sizes) == before
    twin = lake.create_cache("twin", lake.cache("main").spec)
    twin.publish_unit(make_unit(4))
    sizes.measure()
    assert value(sizes) == before < on_disk(small_lake)
    twin.snapshot()
    sizes.measure()
    assert value(sizes) == on_disk(small_lake)


def test_a_lake_that_cannot_be_read_has_no_size(small_lake: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until it can; of a snapshot that was added up no byte is read again."""
    sizes = CacheSizes(Lake.open(small_lake))
    (spec,), (snapshot,) = (list(small_lake.glob(f"caches/main/{name}")) for name in ("spec.json", "snapshots/*"))
    sound = spec.read_bytes()
    sizes.measure()
    spec.write_bytes(b"{")
    sizes.measure()
    assert value(sizes) is None
    assert "spec.json" in caplog.text
    spec.write_bytes(sound)
    snapshot.write_bytes(b"{")
    sizes.measure()
    assert value(sizes) == on_disk(small_lake)


def test_it_is_looked_at_while_the_service_runs(small_lake: Path) -> None:
    """From the start, by nobody's request."""
    registry, end = CollectorRegistry(), time.monotonic() + PATIENCE_S
    with CacheSizes(Lake.open(small_lake)).running(registry):
        while registry.get_sample_value("logitlake_cache_size_bytes") is None:
            assert time.monotonic() < end
    assert registry.get_sample_value("logitlake_cache_size_bytes") == on_disk(small_lake)
