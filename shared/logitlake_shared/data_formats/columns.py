"""Columns of numbers with a fault here and there: checked all at once, and told row by row.

What is common to all rows is a few operations of numpy; only a row at fault becomes a sentence.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitlake_shared.errors import DataError

__all__ = ["NumberLists", "RowProblems"]

_LISTS = pa.list_(pa.field("element", pa.int32(), nullable=False))

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class RowProblems:
    """The first problem of each row, in words."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._by_row: dict[int, str] = {}

    @classmethod
    def of(cls, column: pa.Array) -> "RowProblems":
        """The inverse of `column`."""
        problems = cls(len(column))
        for row in np.flatnonzero(column.is_valid()).tolist():
            problems.add(row, column[row].as_py())
        return problems

    def __bool__(self) -> bool:
        return bool(self._by_row)

    def add(self, row: int, reason: str) -> None:
        """Unless the row has one."""
        self._by_row.setdefault(row, reason)

    def mask(self) -> Bool:
        """`is_bad_N`: where there is one."""
        is_bad_N = np.zeros(self._num_rows, np.bool_)
        is_bad_N[list(self._by_row)] = True
        return is_bad_N

    def column(self) -> pa.Array:
        """The reasons, null for good rows."""
        if not self._by_row:
            return pa.nulls(self._num_rows, pa.string())
        return pa.array([self._by_row.get(row) for row in range(self._num_rows)], pa.string())


class NumberLists:
    """A column of lists of whole numbers: one flat array of int32, and where each row's begin."""

    def __init__(self, values: Int32, starts: Int64) -> None:
        self.values = values
        self.starts = starts
        """one more than there are rows: the last is the end"""

    @classmethod
    def of(cls, column: pa.Array) -> "NumberLists":
        """A column of lists of int32 without nulls."""
        return cls(column.flatten().to_numpy(), _starts(column))

    @classmethod
    def read(cls, column: pa.Array, name: str, where: str, problems: RowProblems) -> "NumberLists":
        """A column of a file. What is null, or no int32, is a problem of its row and read as nothing, or as 0.

        Raises `DataError` for a column of another type; `where` names the file.
        """
        type_ = column.type
        is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
        if not is_list or not pa.types.is_integer(type_.value_type):
            raise DataError(f"{where}: column {name} must hold lists of whole numbers, got {type_}")
        if column.null_count:
            for row in np.flatnonzero(column.is_null()).tolist():
                problems.add(row, f"`{name}` is null")
        flat, starts = column.flatten(), _starts(column)
        if flat.null_count:
            for row in _rows_of(np.flatnonzero(flat.is_null()), starts):
                problems.add(row, f"`{name}` holds a null")
            flat = flat.fill_null(0)
        values = flat.to_numpy()
        limits = np.iinfo(np.int32)
        if not np.can_cast(values.dtype, np.int32):
            for place in np.flatnonzero((values < limits.min) | (values > limits.max)).tolist():
                (row,) = _rows_of([place], starts)
                problems.add(row, f"`{name}` holds {values[place]}, which 32 bits cannot hold")
        return cls(values.astype(np.int32, copy=False), starts)

    @property
    def sizes(self) -> Int64:
        """`size_N`: the length of each list."""
        return np.diff(self.starts)

    @property
    def sums(self) -> Int64:
        """`sum_N`: the sum of each list."""
        before: Int64 = np.append(0, np.cumsum(self.values, dtype=np.int64))
        sum_N: Int64 = before[self.starts[1:]] - before[self.starts[:-1]]
        return sum_N

    def row_of(self, place: int) -> int:
        """The row that an element of `values` belongs to."""
        return _rows_of([place], self.starts)[0]

    def count(self, value: int) -> Int64:
        """`count_N`: how often the value stands in each list."""
        return np.bincount(_rows_of(np.flatnonzero(self.values == value), self.starts), minlength=len(self.sizes))

    def array(self, is_empty_N: Bool) -> pa.Array:
        """The column, with empty lists where `is_empty_N` holds."""
        values, starts = self.values, self.starts
        if is_empty_N.any():
            values = values[np.repeat(~is_empty_N, self.sizes)]
            starts = np.append(0, np.cumsum(np.where(is_empty_N, 0, self.sizes)))
        return pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), pa.array(values), type=_LISTS)


def _starts(column: pa.Array) -> Int64:
    lengths: Any = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return np.append(0, np.cumsum(lengths, dtype=np.int64))


def _rows_of(places: Iterable[int] | Int64, starts: Int64) -> list[int]:
    rows: list[int] = (np.searchsorted(starts, np.asarray(places, np.int64), side="right") - 1).tolist()
    return rows
