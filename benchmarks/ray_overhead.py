"""What Ray costs: two actors on two cores, against two independent processes that do the same units.

    python -m benchmarks.ray_overhead              # half a minute
    python -m benchmarks.ray_overhead --cost 1.0   # seconds of CPU of one unit

Both are timed while they work, from the first unit that is done to the last: what it takes to start is said beside it.
A unit is CPU time and not wall time, so that whatever Ray itself takes of the two cores shows as units not done.
"""

import argparse
import multiprocessing
import tempfile
import time
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil

from benchmarks.ray_spike import MadeWorker, by_core

NUM_WORKERS = 2
# Units at either end that are not counted: actors that are still importing, or that have nothing left to do.
_WARM = 20


def throughput_ratio(num_units: int = 120, cost_s: float = 0.2) -> dict[str, float]:
    """Units/s of two actors and of two processes, and the first over the second; the figure to reach is 0.9.

    `cpu_ratio` is the most that can be on two cores: the CPU time of units over all that Ray and its actors spent
    while they were done. On a machine that others use, it is the steadier of the two.
    """
    units = [(number, cost_s) for number in range(num_units)]
    with tempfile.TemporaryDirectory() as folder:
        start, told, spent_s = time.monotonic(), [], []
        for number, _ in enumerate(by_core(units, Path(folder))):
            told.append(time.monotonic())
            if number in (_WARM, num_units - _WARM):
                spent_s.append(_cpu_seconds())
    actors = (len(told) - 1) / (told[-1] - told[0])
    processes = _two_processes(num_units, cost_s)
    return {
        "actors_units_per_s": actors,
        "processes_units_per_s": processes,
        "ratio": actors / processes,
        "cpu_ratio": cost_s * (num_units - 2 * _WARM) / (spent_s[1] - spent_s[0]),
        "start_s": told[0] - start,
    }


def _cpu_seconds() -> float:
    """What this process and all below it (a local Ray, its actors) have spent by now."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _two_processes(num_units: int, cost_s: float) -> float:
    """Units/s of two processes that share nothing but a start."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(NUM_WORKERS) as pool, context.Manager() as manager:
        barrier = manager.Barrier(NUM_WORKERS)
        work = [(folder, num_units // NUM_WORKERS, cost_s, barrier) for _ in range(NUM_WORKERS)]
        seconds = pool.starmap(_independent, work, chunksize=1)
    return num_units / max(seconds)


def _independent(folder: str, num_units: int, cost_s: float, barrier: Barrier) -> float:
    worker = MadeWorker(folder, -1, True)
    barrier.wait()
    start = time.monotonic()
    for number in range(num_units):
        worker.unit(number, cost_s)
    return time.monotonic() - start


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=120)
    parser.add_argument("--cost", type=float, default=0.2)
    arguments = parser.parse_args()
    for name, value in throughput_ratio(arguments.units, arguments.cost).items():
        print(f"{name:<22} {value:.3f}")


if __name__ == "__main__":
    main()
