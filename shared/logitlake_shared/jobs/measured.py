"""What an attempt measures of its own work: sums since its process began, told again and again in its progress.

A line may be lost in a log, and whoever reads the log may be killed between two lines. With sums nothing is lost or
counted twice by that: what happened between any two lines that were heard is their difference. The store writes the
last that was heard down together with how far the log was read; the next attempt begins at nothing.

A figure is a list of numbers: of what adds up, the sum; of what has a newest value, that; of what is timed, the sum of
all seconds and then how many of them were at most each of `BOUNDS_S`, and above the bound before. Of a figure with a
label each value of that is a figure by itself, under a name of its own (`labelled`).
"""

from bisect import bisect_left
from collections.abc import Mapping

__all__ = ["BOUNDS_S", "TIMES_SIZE", "Measured", "Meter", "labelled", "sound"]

Measured = Mapping[str, list[float]]
"""figures by their names"""

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""from a small commit on a local disk to a step of a large student; what takes longer is counted behind the last"""
TIMES_SIZE = 2 + len(BOUNDS_S)
"""numbers of a figure of times"""
# What is more than this is no measurement: bytes of a thousand million disks.
_MOST = 2.0**63


def labelled(name: str, value: str | int) -> str:
    """What a figure is called where its label has this value."""
    return f"{name}/{value}"


class Meter:
    """The figures of one attempt."""

    def __init__(self) -> None:
        self._figures: dict[str, list[float]] = {}

    def add(self, name: str, amount: float) -> None:
        """Adds to a sum."""
        self._figures.setdefault(name, [0])[0] += amount

    def renew(self, name: str, value: float) -> None:
        """The newest value of what does not add up."""
        self._figures[name] = [value]

    def time(self, name: str, seconds: float) -> None:
        """Adds one to what is timed."""
        times = self._figures.setdefault(name, [0] * TIMES_SIZE)
        times[0] += seconds
        times[1 + bisect_left(BOUNDS_S, seconds)] += 1

    def told(self) -> Measured:
        """All of it until now, to be told."""
        return {name: list(numbers) for name, numbers in self._figures.items()}


def sound(said: Mapping[str, object]) -> Measured:
    """Of what a line says what can have been measured: a log is text, which anybody may have written."""
    found = {}
    for name, numbers in said.items():
        if isinstance(numbers, list) and len(numbers) in (1, TIMES_SIZE) and all(map(_is_amount, numbers)):
            found[name] = numbers
    return found


def _is_amount(value: object) -> bool:
    # NaN is not at least nothing; True is an int.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST
