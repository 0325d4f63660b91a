"""Other readers on the rows of one of our lakes, timed on command in a process of their own.

`python -m benchmarks.reader_peers LAKE FOLDER` copies the lake's rows into each peer's own format below FOLDER and
then reads the names of peers from its standard input, one a line; for each it reads all rows once, shuffled, into
torch batches of eight samples, and prints `{"tokens", "cpu_s", "wall_s", "bytes"}` as one line of JSON. The first line
it prints is the list of peers that are there.

Every peer holds all columns of a sample and gives all of them back, as our reader does, so that the same is asked of
each. `mds` is mosaicml-streaming with one array a column and no compression, which is the fastest it reads; `mds-zstd`
unpacks its shards to disk in every pass, as it does in a first epoch. `lance` is pylance with zstd on every column,
fetched in blocks of shuffled rows and cut into batches, several times faster than asking for eight rows at a time;
`lance-codes` holds the logprobs as one byte and a table of 256 levels, which our grid allows.
Both come from an environment of their own: `make bench-peers`.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from logitlake_shared.reader import LakeDataset

BATCH_SIZE = 8
_BLOCK_ROWS = 512  # fetched at a time from Lance: as many as eight of our row groups of short answers hold
_TENSORS = ("topk_ids", "topk_logprobs", "log_tail_mass", "response_ids")
_CODES = "topk_logprobs"
_UNPACKED = "unpacked"

Record = dict[str, Any]


def to_tensors(samples: list[Record], k: int) -> tuple[torch.Tensor, ...]:
    """What every reader here ends in: `topk_ids`, `topk_logprobs`, `log_tail_mass`, labels of a batch."""
    ids, logprobs, tail, labels = (np.concatenate([sample[name] for sample in samples]) for name in _TENSORS)
    return (
        torch.from_numpy(ids.reshape(-1, k)),
        torch.from_numpy(logprobs.reshape(-1, k)),
        torch.from_numpy(tail),
        torch.from_numpy(labels),
    )


class Mds:
    """mosaicml-streaming."""

    def __init__(self, dataset: LakeDataset, folder: Path, k: int, *, compression: str | None) -> None:
        from streaming import MDSWriter

        self._folder, self._k, self._compression = folder, k, compression
        if not folder.is_dir():
            building = _empty(folder)
            columns = {field.name: _mds_type(field.type) for field in dataset.arrow_schema()}
            with MDSWriter(out=str(building), columns=columns, compression=compression) as writer:
                for record in _records(dataset):
                    record["image_sha256"] = json.dumps(record["image_sha256"])
                    writer.write(record)
            building.rename(folder)

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        if self._compression is None:
            stream = StreamingDataset(local=str(self._folder), shuffle=True, batch_size=BATCH_SIZE)
        else:
            unpacked = _empty(self._folder / _UNPACKED)
            stream = StreamingDataset(
                remote=str(self._folder), local=str(unpacked), shuffle=True, batch_size=BATCH_SIZE
            )
        batch: list[Record] = []
        for sample in stream:
            batch.append(sample)
            if len(batch) == BATCH_SIZE:
                yield to_tensors(batch, self._k)
                batch = []
        if batch:
            yield to_tensors(batch, self._k)


class Lance:
    """pylance, every column under zstd."""

    def __init__(self, dataset: LakeDataset, folder: Path, k: int, *, codes: bool) -> None:
        import lance

        self._k, self._levels = k, np.zeros(0, np.float32)
        if codes:
            self._levels = np.unique(np.concatenate([record[_CODES] for record in _records(dataset)]))
            if len(self._levels) > 256:
                raise ValueError("the lake's logprobs are not on a grid of 256 levels")
        if not folder.is_dir():
            schema = pa.schema([_zstd_field(field, codes) for field in dataset.arrow_schema()])
            columns: dict[str, list[Any]] = {name: [] for name in schema.names}
            for record in _records(dataset):
                if codes:
                    record[_CODES] = np.searchsorted(self._levels, record[_CODES]).astype(np.uint8)
                for name, value in record.items():
                    columns[name].append(value)
            building = _empty(folder)
            lance.write_dataset(pa.table(columns, schema=schema), str(building), data_storage_version="stable")
            building.rename(folder)
        self._lance = lance.dataset(str(folder))

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        order = np.random.default_rng(0).permutation(self._lance.count_rows())
        for start in range(0, len(order), _BLOCK_ROWS):
            table = self._lance.take(order[start : start + _BLOCK_ROWS].tolist())
            columns = {name: _values(table.column(name).combine_chunks()) for name in table.schema.names}
            if len(self._levels):
                columns[_CODES] = [self._levels[codes] for codes in columns[_CODES]]
            for row in range(0, table.num_rows, BATCH_SIZE):
                rows = range(row, min(row + BATCH_SIZE, table.num_rows))
                yield to_tensors([{name: columns[name][place] for name in columns} for place in rows], self._k)


def _records(dataset: LakeDataset) -> Iterator[Record]:
    """All columns of each sample, lists of numbers as arrays."""
    for batch in dataset.iter_arrow():
        columns = {name: _values(batch.column(name)) for name in batch.schema.names}
        for row in range(batch.num_rows):
            yield {name: values[row] for name, values in columns.items()}


def _values(array: Any) -> list[Any]:
    if not (pa.types.is_list(array.type) and pa.types.is_primitive(array.type.value_type)):
        return list(array.to_pylist())
    values, offsets = array.values.to_numpy(), array.offsets.to_pylist()
    return [values[start:stop] for start, stop in pairwise(offsets)]


def _zstd_field(field: pa.Field, codes: bool) -> pa.Field:
    """A list is compressed where its elements say so; without byte stream split it is smaller and read faster."""
    zstd = {
        "lance-encoding:compression": "zstd",
        "lance-encoding:compression-level": "3",
        "lance-encoding:bss": "off",
    }
    if not pa.types.is_list(field.type):
        return field.with_metadata(zstd)
    value_type = pa.uint8() if codes and field.name == _CODES else field.type.value_type
    return pa.field(field.name, pa.list_(pa.field("item", value_type, nullable=False, metadata=zstd)), nullable=False)


def _mds_type(type_: pa.DataType) -> str:
    if pa.types.is_list(type_) and pa.types.is_primitive(type_.value_type):
        return f"ndarray:{type_.value_type.to_pandas_dtype().__name__}"
    return "int32" if type_ == pa.int32() else "str"


def _empty(folder: Path) -> Path:
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.parent.mkdir(parents=True, exist_ok=True)
    return building


def main(lake: str, folder: str) -> None:
    """See the module."""
    torch.set_num_threads(1)
    dataset = LakeDataset(lake, "main")
    k = int(dataset[0].rows.k_T[0])
    makers: dict[str, Callable[[Path], Any]] = {
        "mds": lambda path: Mds(dataset, path, k, compression=None),
        "mds-zstd": lambda path: Mds(dataset, path, k, compression="zstd:3"),
        "lance": lambda path: Lance(dataset, path, k, codes=False),
        "lance-codes": lambda path: Lance(dataset, path, k, codes=True),
    }
    peers = {}
    for name, make in makers.items():
        try:
            peers[name] = make(Path(folder) / name)
        except ImportError:
            continue
    dataset.close()
    print(json.dumps(list(peers)), flush=True)
    for line in sys.stdin:
        name = line.strip()
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        tokens = sum(len(batch[3]) for batch in peers[name].batches())
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        files = [path for path in (Path(folder) / name).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files if _UNPACKED not in path.parts)
        print(json.dumps({"tokens": tokens, "cpu_s": cpu_s, "wall_s": wall_s, "bytes": size}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
