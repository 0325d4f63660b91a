"""How much of its teacher a lake holds, sample by sample: looked at before a stage distils from it.

The mass of a sample is the teacher's probability on the cached entries, at temperature 1, on average over its response
tokens. Where it is small the divergence knows little more than that the rest is elsewhere, whatever its treatment of
the tail: such samples are told by name, and the report draws how all are spread.
"""

import heapq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from logitlake_shared.reader import LakeDataset
from logitlake_student.row_scan import readable_row_groups

__all__ = ["NUM_BINS", "CachedMass", "measure_cached_mass"]

NUM_BINS = 20
_MOST_LISTED = 1000


@dataclass(frozen=True)
class CachedMass:
    """The cached mass of a dataset's samples."""

    least: float
    """below which a sample is told"""
    num_samples: int
    num_below: int
    lowest: dict[str, float]
    """mass by sample id, of those below, the smallest first; a thousand at most"""
    samples_by_mass: tuple[int, ...]
    """samples in each of `NUM_BINS` equal parts of [0, 1]"""

    def document(self) -> dict[str, Any]:
        """As it is written to disk."""
        return asdict(self)


def measure_cached_mass(dataset: LakeDataset, least: float) -> CachedMass:
    """Reads the tail masses of every sample that can be read; neither entries nor images."""
    bins = np.zeros(NUM_BINS, np.int64)
    num_below, lowest = 0, list[tuple[float, str]]()
    for _, batch in readable_row_groups(dataset, ("sample_id", "log_tail_mass")):
        tails = batch.column("log_tail_mass")
        tail_T = np.exp(tails.flatten().to_numpy().astype(np.float64))
        tail_B = np.bincount(pc.list_parent_indices(tails), tail_T, batch.num_rows)
        mass_B = np.clip(1 - tail_B / np.maximum(tails.value_lengths(), 1), 0, 1)
        bins += np.histogram(mass_B, NUM_BINS, (0.0, 1.0))[0]
        below = np.flatnonzero(mass_B < least)
        num_below += len(below)
        ids = batch.column("sample_id").take(below).to_pylist()
        lowest = heapq.nsmallest(_MOST_LISTED, [*lowest, *zip(mass_B[below].tolist(), ids, strict=True)])
    return CachedMass(
        least, int(bins.sum()), num_below, {sample_id: mass for mass, sample_id in lowest}, tuple(bins.tolist())
    )
