"""Which preference pairs a stage can learn from. Pairs that it cannot are known, by code, before the first step.

    pair_one_sided    one of its responses has no token
    pair_equal        its responses are the same tokens: there is nothing to prefer
    pair_not_scored   the teacher's logprobs, which the stage measures against, are missing or not finite

They are no part of the order, so batches stay full and means are over pairs that say something. A lake that our teacher
made holds none; one that was made or edited elsewhere may.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitlake_shared.errors import DataError
from logitlake_shared.reader import PairDataset
from logitlake_shared.reader.order import Layout
from logitlake_student.row_scan import readable_row_groups

__all__ = ["UsablePairs", "code_of"]

_COLUMNS = ("pair_id", "chosen_ids", "rejected_ids", "chosen_logprobs", "rejected_logprobs")
Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]


def code_of(sides: Sequence[tuple[Ids, Logprobs]], *, measured_by_teacher: bool) -> str | None:
    """Why a pair with these two responses cannot be learned from, or None."""
    (chosen, _), (rejected, _) = sides
    if not (len(chosen) and len(rejected)):
        return "pair_one_sided"
    if np.array_equal(chosen, rejected):
        return "pair_equal"
    scored = all(len(logprobs) == len(ids) and np.isfinite(logprobs).all() for ids, logprobs in sides)
    return "pair_not_scored" if measured_by_teacher and not scored else None


class UsablePairs:
    """The pairs of a dataset that can be learned from, as a dataset of their own.

    Reads responses and logprobs of every pair once, not the images. Raises `DataError` where no pair can be learned
    from.
    """

    def __init__(self, dataset: PairDataset, *, measured_by_teacher: bool) -> None:
        self._dataset, layout = dataset, dataset.layout
        self.left_out: dict[str, str] = {}
        """the code of each pair that is left out, by its id"""
        is_usable_P = np.ones(len(dataset), bool)
        for positions, batch in readable_row_groups(dataset, _COLUMNS):
            for place, pair_id, code in _judged(batch, measured_by_teacher):
                is_usable_P[positions[place]] = False
                self.left_out[pair_id] = code
        self._positions = np.flatnonzero(is_usable_P)
        if not len(self._positions):
            raise DataError(
                f"none of {len(dataset)} pairs can be learned from: {self.counts()}; make the pairs again with "
                "`logitlake-teacher pairs`, or choose other `tasks`"
            )
        self.layout = Layout(
            layout.group_P[self._positions], layout.num_tokens_P[self._positions], layout.window_tokens
        )

    def counts(self) -> dict[str, int]:
        """Pairs that are left out, by code."""
        return dict(sorted(Counter(self.left_out.values()).items()))

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> Any:
        return self._dataset[int(self._positions[position])]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """See torch's DataLoader."""
        return self._dataset.__getitems__(self._positions[np.asarray(positions, np.int64)])


def _judged(batch: pa.RecordBatch, measured_by_teacher: bool) -> Iterator[tuple[int, str, str]]:
    """Row, id and code of the pairs that cannot be learned from."""
    columns = [batch.column(name) for name in _COLUMNS]
    for row in range(batch.num_rows):
        pair_id, chosen, rejected, *logprobs = (_value(column, row) for column in columns)
        code = code_of([(chosen, logprobs[0]), (rejected, logprobs[1])], measured_by_teacher=measured_by_teacher)
        if code is not None:
            yield row, pair_id, code


def _value(column: pa.Array, row: int) -> Any:
    value = column[row]
    return value.values.to_numpy() if isinstance(value, pa.ListScalar | pa.LargeListScalar) else value.as_py()
