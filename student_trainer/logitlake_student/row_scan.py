"""A look through all rows of a dataset before a stage begins, a few columns of them at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitlake_shared.errors import LakeCorruptError

__all__ = ["readable_row_groups"]


def readable_row_groups(dataset: Any, columns: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    """Positions and rows of each row group. A damaged one is passed over: what becomes of its items is decided when
    they are due (`data.max_unreadable`)."""
    group_P = dataset.layout.group_P
    for group in np.unique(group_P):
        positions = np.flatnonzero(group_P == group)
        try:
            (batch,) = dataset.iter_arrow(columns, order=positions, batch_rows=len(positions))
        except LakeCorruptError:
            continue
        yield positions, batch
