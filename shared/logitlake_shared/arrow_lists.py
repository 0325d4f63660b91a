"""Numeric lists between numpy and Arrow: one buffer and its offsets, both ways, never an object for each element."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["column_views", "list_array"]


def list_array(values: list[Any], type_: pa.DataType) -> pa.Array:
    """`values` as an Arrow array; numeric lists become one buffer and its offsets, without an object an element.

    None is a null list.
    """
    if not (pa.types.is_list(type_) and pa.types.is_primitive(type_.value_type)):
        return pa.array(values, type_)
    there = [value for value in values if value is not None]
    missing = None if len(there) == len(values) else pa.array([value is None for value in values])
    offsets = np.cumsum([0, *(0 if value is None else len(value) for value in values)], dtype=np.int32)
    flat = np.concatenate(there) if there else np.empty(0)
    flat = flat.astype(type_.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=type_, mask=missing)


def column_views(column: pa.ChunkedArray) -> Any:
    """Numeric lists as views of one buffer; everything else as Python objects."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty table has no chunk to combine
        return []
    if array.null_count == len(array):
        return [None] * len(array)
    if not (pa.types.is_list(array.type) and pa.types.is_primitive(array.type.value_type)):
        return array.to_pylist()
    # `values` and not `flatten`: the offsets count from the beginning of the whole buffer.
    missing = frozenset(np.flatnonzero(array.is_null()).tolist()) if array.null_count else frozenset()
    return _ListViews(array.values.to_numpy(), array.offsets.to_pylist(), missing)


class _ListViews:
    """The lists of one column: slices of one flat array, None where the row has no list."""

    def __init__(self, values: npt.NDArray[Any], offsets: list[int], missing: frozenset[int]) -> None:
        self._values, self._offsets, self._missing = values, offsets, missing

    def __iter__(self) -> Iterator[npt.NDArray[Any] | None]:
        if self._missing:
            return map(self.__getitem__, range(len(self._offsets) - 1))
        return (self._values[start:stop] for start, stop in pairwise(self._offsets))

    def __getitem__(self, row: int) -> npt.NDArray[Any] | None:
        return None if row in self._missing else self._values[self._offsets[row] : self._offsets[row + 1]]
