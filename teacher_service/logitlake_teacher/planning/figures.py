"""What is counted while a plan is made: enough for `plan` to answer without reading the plan again.

Lengths are counted, not kept: any percentile is exact, whatever the number of samples, in the memory of the longest.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

__all__ = ["PlanFigures", "Tally"]

# Faults of the data that are shown in words; all are counted.
_MAX_EXAMPLES = 10
_LENGTHS = 1000


class PlanFigures(BaseModel):
    """The figures of a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    items: int
    """samples or pairs, those with problems included"""
    by_task: dict[str, int]
    units: int
    tokens: int
    """that the teacher sees, images expanded"""
    image_tokens: int
    """of these, tokens of images"""
    response_tokens: int
    """tokens that the teacher is asked about"""
    lengths: dict[str, int]
    """`p50`, `p95`, `max` of an item's tokens"""
    longest: dict[int, int]
    """number of items by length, for the thousand longest lengths"""
    images: int
    """distinct images"""
    image_bytes: int
    duplicates: int
    """items whose prompt, responses and images are those of another item"""
    problems: dict[str, int]
    """items that cannot be captured, by code"""
    examples: tuple[str, ...]
    """the first problems in words, each with its place in the data"""
    fatal: int
    """problems in sources that do not tolerate any"""


class Tally:
    """Adds up the figures, a table of rows at a time."""

    def __init__(self) -> None:
        self._length_counts = np.zeros(1, np.int64)
        self._tasks: Counter[str] = Counter()
        self._problems: Counter[str] = Counter()
        self._examples: list[str] = []
        self._sums: Counter[str] = Counter()

    def add(self, tasks: Mapping[str, int], length_N: npt.NDArray[np.int64], **sums: int) -> None:
        """Items without a problem: number by task, tokens of each, and whatever else is only summed."""
        self._tasks.update(tasks)
        self._sums.update(sums)
        counts = np.bincount(length_N, minlength=len(self._length_counts)).astype(np.int64)
        counts[: len(self._length_counts)] += self._length_counts
        self._length_counts = counts

    def problem(self, where: str, code: str, message: str, *, fatal: bool) -> None:
        """An item that cannot be captured."""
        self._problems[code] += 1
        self._sums["fatal"] += fatal
        if len(self._examples) < _MAX_EXAMPLES:
            self._examples.append(f"{where}: {code}: {message}")

    def figures(self, units: int) -> PlanFigures:
        """The figures of everything that was added."""
        lengths = np.arange(len(self._length_counts))
        cumulated = np.cumsum(self._length_counts)
        total = int(cumulated[-1])
        seen = np.flatnonzero(self._length_counts)
        problems = sum(self._problems.values())
        return PlanFigures(
            items=total + problems,
            by_task=dict(sorted(self._tasks.items())),
            units=units,
            tokens=int((lengths * self._length_counts).sum()),
            image_tokens=self._sums["image_tokens"],
            response_tokens=self._sums["response_tokens"],
            lengths={
                "p50": int(np.searchsorted(cumulated, 0.5 * total)) if total else 0,
                "p95": int(np.searchsorted(cumulated, 0.95 * total)) if total else 0,
                "max": int(seen[-1]) if len(seen) else 0,
            },
            longest={int(length): int(self._length_counts[length]) for length in seen[-_LENGTHS:]},
            images=self._sums["images"],
            image_bytes=self._sums["image_bytes"],
            duplicates=self._sums["duplicates"],
            problems=dict(sorted(self._problems.items())),
            examples=tuple(self._examples),
            fatal=self._sums["fatal"],
        )
