"""What Ray costs two actors on two cores, as figures: `benchmarks.ray_overhead` measures it."""

from benchmarks.harness import Figure, median
from benchmarks.ray_overhead import throughput_ratio

__all__ = ["overhead_figures"]


def overhead_figures(rounds: int, quick: bool) -> list[Figure]:
    """Units a second of two actors over two independent processes, and what Ray takes to start."""
    measured = [throughput_ratio(num_units=100 if quick else 400) for _ in range(rounds)]
    ratio = median([one["ratio"] for one in measured])
    return [
        Figure("two Ray actors over two independent processes", ratio, "x", ">= 0.9", ratio >= 0.9),
        Figure("a local Ray, start to the first unit", median([one["start_s"] for one in measured]), "s"),
    ]
