"""Numeric lists between numpy and Arrow: one buffer and its offsets, both ways, never an object for each element."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["column_views", "list_array"]


def list_array(values: list[Any], type_: pa.DataType) -> pa.Array:
    """`values` as an Arrow array; numeric lists become one buffer and its offsets, without an object an element."""
    if not (pa.types.is_list(type_) and pa.types.is_primitive(type_.value_type)):
        return pa.array(values, type_)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.concatenate(values) if values else np.empty(0)
    flat = flat.astype(type_.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=type_)


def column_views(column: pa.ChunkedArray) -> Any:
    """Numeric lists as views of one buffer; everything else as Python objects."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty table has no chunk to combine
        return []
    if not (pa.types.is_list(array.type) and pa.types.is_primitive(array.type.value_type)):
        return array.to_pylist()
    # `values` and not `flatten`: the offsets count from the beginning of the whole buffer.
    return _ListViews(array.values.to_numpy(), array.offsets.to_pylist())


class _ListViews:
    """The lists of one column: slices of one flat array."""

    def __init__(self, values: npt.NDArray[Any], offsets: list[int]) -> None:
        self._values, self._offsets = values, offsets

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self._values[self._offsets[row] : self._offsets[row + 1]]
