"""Ray Core actors beside Ray Data `map_batches`, on the same made-up units: the figures of docs/decisions/0003.

    python -m benchmarks.ray_spike            # about two minutes
    python -m benchmarks.ray_spike --units 50

Both run two workers on two cores of a local Ray. A unit costs a fixed time of CPU and "commits" itself as one file that
is created once, as the product's units do. Measured: the time beyond the units' own, what a killed worker costs (units
done again, seconds), the driver's memory, and what a run finds to do after its driver was stopped half way.
"""

import argparse
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COST_S = 0.02
BIG_COST_S = 0.2


class MadeWorker:
    """Burns CPU, writes a file for each unit; the worker that meets `die_at` ends its process, once or each time."""

    def __init__(self, folder: str, die_at: int, dies_once: bool) -> None:
        self.folder, self.die_at, self.dies_once = Path(folder), die_at, dies_once

    def unit(self, number: int, cost_s: float) -> None:
        with (self.folder / f"tries-{os.getpid()}").open("a") as tries:
            tries.write(f"{number}\n")
        end = time.thread_time() + cost_s
        while time.thread_time() < end:
            pass
        if number == self.die_at and not (self.folder / "died").exists():
            if self.dies_once:
                (self.folder / "died").touch()
            os._exit(1)
        (self.folder / f"unit-{number:06d}").touch()

    # Ray Data calls the worker with a batch of rows.
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number, cost_s in zip(batch["id"].tolist(), batch["cost"].tolist(), strict=True):
            self.unit(number, cost_s)
        return {"id": batch["id"]}


class CoreWorker(MadeWorker):
    """The same as an `executors.base.Worker`."""

    def __init__(self, folder: str, die_at: int, dies_once: bool, costs: dict[int, float]) -> None:
        super().__init__(folder, die_at, dies_once)
        self.costs = costs
        self.turn = threading.Lock()

    def run(self, unit: Any, crashed: Any, pieces: int) -> int:  # noqa: ARG002  # the protocol's
        self.probe([item for item in unit.items if item.item_id not in crashed])
        return int(unit.unit_id)

    def probe(self, items: Any) -> None:
        """One teacher, asked by one thread at a time."""
        with self.turn:
            for item in items:
                self.unit(int(item.item_id), self.costs[int(item.item_id)])

    def close(self) -> None:
        """Nothing is held."""


def by_core(units: list[tuple[int, float]], folder: Path, die_at: int = -1, dies_once: bool = True) -> Iterator[int]:
    """The product's executor."""
    from logitlake_teacher.config import RayExecutorConfig
    from logitlake_teacher.executors import build_executor
    from logitlake_teacher.items import Unit

    executor = build_executor(RayExecutorConfig(num_actors=2, backoff_s=0.1))
    item: Any = SimpleNamespace
    made = (Unit(str(number), (item(item_id=str(number)),)) for number, _ in units)
    records: Any = executor.run(made, partial(CoreWorker, str(folder), die_at, dies_once, dict(units)))
    yield from records


def by_data(units: list[tuple[int, float]], folder: Path, die_at: int = -1, dies_once: bool = True) -> Iterator[int]:
    """Ray Data: one row a unit, one row a batch, an actor pool of two that may restart, as its own LLM stages have."""
    import logging

    import ray

    ray.init(address="local", include_dashboard=False, num_cpus=4, logging_level=logging.ERROR, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        rows = ray.data.from_items([{"id": number, "cost": cost_s} for number, cost_s in units])
        done = rows.repartition(len(units)).map_batches(
            MadeWorker,
            fn_constructor_args=(str(folder), die_at, dies_once),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=1,
            # Its default is to try for ever; a sample that always kills would then never end.
            max_restarts=4,
            max_task_retries=4,
        )
        for row in done.iter_rows():
            yield int(row["id"])
    finally:
        ray.shutdown()


def measure(
    run: Any, units: list[tuple[int, float]], die_at: int = -1, dies_once: bool = True, stop_after: int | None = None
) -> dict[str, Any]:
    """One run in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start, first, seen, error = time.monotonic(), 0.0, 0, ""
        try:
            for _ in run(units, folder, die_at, dies_once):
                first = first or time.monotonic()
                seen += 1
                if seen == stop_after:
                    break
        except Exception as failed:
            error = type(failed).__name__
        tries = sum(len(path.read_text().splitlines()) for path in folder.glob("tries-*"))
        done = len(list(folder.glob("unit-*")))
        seconds = time.monotonic() - first
        return {
            "start_s": first - start,
            "s": seconds,
            "done": done,
            "again": tries - done,
            "told": seen,
            "error": error,
        }


def main() -> None:
    """Prints the figures, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=400)
    number = parser.parse_args().units
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = [(unit, COST_S) for unit in range(number)]
    big = [(unit, BIG_COST_S) for unit in range(number // 10)]
    middle = len(big) // 2
    for name, run in (("core", by_core), ("data", by_data)):
        plain = measure(run, small)
        overhead_ms = 1e3 * (plain["s"] - number * COST_S / 2) / number
        print(f"{name}: start {plain['start_s']:.1f} s, overhead {overhead_ms:.2f} ms a unit")
        for what, once in (("dies once", True), ("dies each time", False)):
            killed = measure(run, big, die_at=middle, dies_once=once)
            print(f"{name}: a worker that {what}: {killed}")
        print(f"{name}: stopped half way: {measure(run, big, stop_after=middle)}")
        print(f"{name}: driver's peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
