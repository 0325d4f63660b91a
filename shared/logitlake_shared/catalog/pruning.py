"""Which shards a filter can speak of, from the cache's name and the first and last id of each.

Arrow decides: a shard is a fragment of a dataset with a guarantee (`cache = 'main' and 'a' <= sample_id <= 'b'`), and
a filter that contradicts the guarantee drops it. Making and asking ten thousand guarantees takes 150 ms; so they are
asked in two steps, runs of a hundred shards first, and only the guarantees of the runs that are left are made.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

__all__ = ["Bounds"]

_RUN = 100


class Bounds:
    """The bounds of some shards.

    `rows` has the columns `cache`, `first_id` and `last_id`, a row a shard, in this order; without ids where they are
    not known. `id_column` is what the ids are called, None where rows have none. Filters are bound to `schema`.
    """

    def __init__(self, id_column: str | None, rows: pa.Table, schema: pa.Schema) -> None:
        self._id_column = id_column
        self._rows = rows.select(["cache", "first_id", "last_id"]).combine_chunks()
        # Arrow compares a filter with a guarantee only where no cast stands between them.
        self._schema = pa.schema([_plain(field) for field in schema])
        self._starts = list(_run_starts(self._rows.column("cache")))
        self._made: dict[int, ds.FileSystemDataset] = {}

    def places(self, predicate: Any) -> list[int]:
        """The shards, by their place in `rows`, that may hold a row for which `predicate` is true."""
        runs = _asked(self._dataset_of_runs, predicate)
        return sorted(place for run in runs for place in _asked(self._dataset_of_run(run), predicate))

    @cached_property
    def _dataset_of_runs(self) -> ds.FileSystemDataset:
        return self._dataset([(run, self._run(run)) for run in range(len(self._starts))])

    def _dataset_of_run(self, number: int) -> ds.FileSystemDataset:
        if number not in self._made:
            start, run = self._starts[number], self._run(number)
            self._made[number] = self._dataset([(start + place, run.slice(place, 1)) for place in range(len(run))])
        return self._made[number]

    def _run(self, number: int) -> pa.Table:
        """The rows of a run, which are of one cache."""
        start, stop = [*self._starts, len(self._rows)][number : number + 2]
        return self._rows.slice(start, stop - start)

    def _dataset(self, named: Sequence[tuple[int, pa.Table]]) -> ds.FileSystemDataset:
        """Fragments that are named by their number and never opened."""
        files, parquet = LocalFileSystem(), ds.ParquetFileFormat()
        fragments = [
            parquet.make_fragment(str(number), files, partition_expression=self._guarantee(rows))
            for number, rows in named
        ]
        return ds.FileSystemDataset(fragments, self._schema, parquet, files)

    def _guarantee(self, rows: pa.Table) -> Any:
        """What is true for every row of these shards."""
        guarantee = ds.field("cache") == rows.column("cache")[0]
        firsts, lasts = rows.column("first_id"), rows.column("last_id")
        if self._id_column is None or firsts.null_count or lasts.null_count:
            return guarantee
        ids = ds.field(self._id_column)
        return guarantee & (ids >= pc.min(firsts)) & (ids <= pc.max(lasts))


def _run_starts(caches: pa.ChunkedArray) -> Iterator[int]:
    """Where runs begin: at each new cache, and after a hundred shards."""
    codes = caches.combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(codes)], strict=True):
        yield from range(int(start), int(stop), _RUN)


def _asked(dataset: ds.FileSystemDataset, predicate: Any) -> list[int]:
    return [int(fragment.path) for fragment in dataset.get_fragments(filter=predicate)]


def _plain(field: pa.Field) -> pa.Field:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
