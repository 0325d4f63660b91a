"""What a student makes of a cache's samples, token by token: a Parquet file that the trainer writes and viewers read.

The two services meet here as they meet in the lake. `logitlake-student score` writes
`<run>/<stage>/scores/<cache>.parquet`, of one split `<cache>@<split>.parquet`; whoever shows a sample of a cache with
the same fingerprint can show the student beside the teacher. Rows come in the order of their ids, in row groups of two
megabytes, so that one sample is found by the footer's bounds and little else is read. The file appears whole or not at
all.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logitlake_schemas import SCORE_COLUMNS, ScoresRecord, arrow_schema
from logitlake_shared.arrow_lists import column_views, list_array
from logitlake_shared.durable import make_folder, sync
from logitlake_shared.errors import ConfigError, DataError, LakeFormatError, ScoresError
from logitlake_shared.file_locks import is_named, try_lock
from logitlake_shared.lake import Cache
from logitlake_shared.shards import FOOTER_PREFIX, check_format_version

__all__ = [
    "LinkedStudents",
    "ScoredSample",
    "Scores",
    "ScoresWriter",
    "read_record",
    "scores_of",
    "scores_path",
    "write_scores",
]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_log = logging.getLogger("logitlake.scores")

_SCHEMA = arrow_schema(SCORE_COLUMNS)
_RECORD = f"{FOOTER_PREFIX}scores"
_GROUP_ENTRIES = 2**18
_GROUP_ROWS = 4096
_ZSTD_LEVEL = 3
# Records kept in memory, of a kilobyte each: more than there are files below a folder of runs, or none is of use.
_KNOWN_FILES = 16_384


@dataclass(frozen=True)
class ScoredSample:
    """A student on one sample's T response tokens, K entries each. All in nats, at T=1."""

    sample_id: str
    task: str
    label_logprob_T: Float32
    label_rank_T: Int32
    entropy_T: Float32
    forward_kl_T: Float32
    topk_ids_TK: Int32
    """by falling probability"""
    topk_logprobs_TK: Float32


def scores_path(stage: Path, cache: str, split: str | None) -> Path:
    """Where the scores of a stage of a run are looked for. No cache has an `@` in its name; a split may be any text."""
    of_split = "" if split is None else f"@{quote(split, safe='')}"
    return stage / "scores" / f"{cache}{of_split}.parquet"


class ScoresWriter:
    """Takes the samples in the order of their ids; see `write_scores`."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._waiting: list[ScoredSample] = []
        self._num_entries = 0

    def add(self, samples: Sequence[ScoredSample]) -> None:
        """Some more samples. Raises `OSError`."""
        for sample in samples:
            self._waiting.append(sample)
            self._num_entries += sample.topk_ids_TK.size
            if self._num_entries >= _GROUP_ENTRIES or len(self._waiting) == _GROUP_ROWS:
                self.flush()

    def flush(self) -> None:
        """Ends the row group."""
        if self._waiting:
            self._writer.write_table(_table(self._waiting), row_group_size=len(self._waiting))
        self._waiting, self._num_entries = [], 0


@contextmanager
def write_scores(path: Path, record: ScoresRecord) -> Iterator[ScoresWriter]:
    """Creates or replaces the file at `path`; it is there, whole and durable, when the block ends without an error.

    Raises `ConfigError` while another process writes there, `OSError` where there is no room.
    """
    make_folder(path.parent)
    staged = path.with_name(f"{path.name}#writing")
    with staged.open("ab") as out:
        if not (try_lock(out) and is_named(out, staged)):
            raise ConfigError(f"{path}: another process is writing there; wait for it, or choose another --out")
        out.truncate(0)  # of one that was killed
        try:
            with _parquet_writer(out) as writer:
                scores = ScoresWriter(writer)
                yield scores
                scores.flush()
                writer.add_key_value_metadata({_RECORD: record.model_dump_json()})
            out.flush()
            os.fsync(out.fileno())
            staged.replace(path)
        except BaseException:
            with suppress(OSError):
                staged.unlink()
            raise
    sync(path.parent)


def read_record(path: Path) -> ScoresRecord:
    """Whose scores the file holds. Raises `ScoresError`, `LakeFormatError`, `FileNotFoundError`."""
    stat = path.stat()
    return _record_as_of(path, stat.st_size, stat.st_mtime_ns)


class Scores:
    """The scores in one file. Raises `ScoresError` and `LakeFormatError`."""

    def __init__(self, path: Path) -> None:
        self.path, self.record = path, read_record(path)

    def find(self, sample_id: str) -> ScoredSample | None:
        """Those of one sample, None where it was not scored."""
        with _opened(self.path) as file:
            for group in range(file.num_row_groups):
                bounds = file.metadata.row_group(group).column(0).statistics
                if bounds is not None and bounds.has_min_max and not bounds.min <= sample_id <= bounds.max:
                    continue
                ids = file.read_row_group(group, ["sample_id"]).column(0).to_pylist()
                if sample_id in ids:
                    return next(_samples(file.read_row_group(group).slice(ids.index(sample_id), 1)))
        return None

    def __iter__(self) -> Iterator[ScoredSample]:
        """All of them, a row group in memory at a time."""
        with _opened(self.path) as file:
            for group in range(file.num_row_groups):
                yield from _samples(file.read_row_group(group))


def scores_of(path: Path, cache: Cache, sample_id: str) -> tuple[str, ScoredSample]:
    """The student of a file and its scores of a sample of `cache`. Raises `DataError` where it holds none.

    Raises `ScoresError`, and `DataError` for a file that is not there.
    """
    try:
        scores = Scores(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `logitlake-student score` writes one") from None
    record = scores.record
    if record.spec_fingerprint != cache.fingerprint:
        raise DataError(
            f"{path}: scores of cache {record.cache!r}, {record.spec_fingerprint[:16]}; the sample is of "
            f"{cache.name!r}, {cache.fingerprint[:16]}"
        )
    scored = scores.find(sample_id)
    if scored is None:
        raise DataError(f"{path}: {_not_scored(record, sample_id)}")
    return record.student, scored


class LinkedStudents:
    """The students below a folder of runs that were scored on a cache, by the cache's fingerprint.

    A file that cannot be read is left out and logged: it is another's trouble than of who looks at a sample.
    """

    def __init__(self, runs: Path, cache: Cache) -> None:
        self._scores: dict[str, list[Scores]] = {}
        for path in sorted(runs.glob("*/*/scores/*.parquet")):
            run, stage = path.parts[-4:-2]
            try:
                scores = Scores(path)
            except (LakeFormatError, ScoresError, OSError) as error:
                _log.warning("left out: %s", error)
                continue
            if scores.record.spec_fingerprint == cache.fingerprint:
                self._scores.setdefault(f"{run}/{stage}", []).append(scores)

    @property
    def names(self) -> list[str]:
        """`<run>/<stage>`, sorted."""
        return sorted(self._scores)

    def scored_on(self, split: str) -> list[str]:
        """Those of `names` that were scored on samples of this split."""
        return [name for name in self.names if any(one.record.split in (None, split) for one in self._scores[name])]

    def find(self, name: str, sample_id: str) -> ScoredSample:
        """A student's scores of a sample. Raises `DataError` where there are none, `ScoresError`."""
        if name not in self._scores:
            raise DataError(
                f"no student {name!r} was scored on this cache; there are {', '.join(self.names) or 'none'}"
            )
        for scores in self._scores[name]:
            with suppress(FileNotFoundError):  # removed meanwhile
                if (scored := scores.find(sample_id)) is not None:
                    return scored
        raise DataError(_not_scored(self._scores[name][-1].record, sample_id, name))


def _not_scored(record: ScoresRecord, sample_id: str, name: str | None = None) -> str:
    of_split = "" if record.split is None else f" of split {record.split!r}"
    return (
        f"{name or record.student} was scored on the samples{of_split} of snapshot {record.snapshot}, and "
        f"{sample_id!r} is none of them; score it again for all"
    )


@lru_cache(_KNOWN_FILES)
def _record_as_of(path: Path, size: int, mtime_ns: int) -> ScoresRecord:
    """A file's record, read once as long as its size and time stay."""
    del size, mtime_ns  # they are the key
    with _opened(path) as file:
        metadata = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
        if file.schema_arrow.names != _SCHEMA.names or _RECORD not in metadata:
            raise ScoresError(f"{path}: not a file of scores; `logitlake-student score` writes them")
    try:
        check_format_version(str(json.loads(metadata[_RECORD])["format_version"]), str(path))
        return ScoresRecord.model_validate_json(metadata[_RECORD])
    except (ValueError, KeyError, TypeError) as error:
        raise ScoresError(
            f"{path}: its footer does not say whose scores these are; remove it, and score again"
        ) from error


def _parquet_writer(out: IO[bytes]) -> pq.ParquetWriter:
    paths = {c.name: f"{c.name}.list.element" if pa.types.is_list(c.type) else c.name for c in SCORE_COLUMNS}
    return pq.ParquetWriter(
        out,
        _SCHEMA,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=[paths[column.name] for column in SCORE_COLUMNS if column.encoding == "dictionary"],
        column_encoding={
            paths[column.name]: "BYTE_STREAM_SPLIT" for column in SCORE_COLUMNS if column.encoding == "split"
        },
        write_page_checksum=True,
        write_page_index=True,
        store_schema=False,
    )


def _table(samples: Sequence[ScoredSample]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "sample_id": [sample.sample_id for sample in samples],
        "task": [sample.task for sample in samples],
        "label_logprob": [sample.label_logprob_T for sample in samples],
        "label_rank": [sample.label_rank_T for sample in samples],
        "entropy": [sample.entropy_T for sample in samples],
        "forward_kl": [sample.forward_kl_T for sample in samples],
        "k": [np.full(len(sample.topk_ids_TK), sample.topk_ids_TK.shape[1], np.uint16) for sample in samples],
        "topk_ids": [sample.topk_ids_TK.ravel() for sample in samples],
        "topk_logprobs": [sample.topk_logprobs_TK.ravel() for sample in samples],
    }
    return pa.Table.from_arrays([list_array(columns[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA)


def _samples(table: pa.Table) -> Iterator[ScoredSample]:
    columns = (column_views(table.column(field.name)) for field in _SCHEMA)
    for sample_id, task, logprob_T, rank_T, entropy_T, kl_T, k_T, ids, logprobs in zip(*columns, strict=True):
        shape = len(k_T), int(k_T[0]) if len(k_T) else 0
        yield ScoredSample(
            sample_id, task, logprob_T, rank_T, entropy_T, kl_T, ids.reshape(shape), logprobs.reshape(shape)
        )


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Raises `ScoresError` for whatever cannot be read inside."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ScoresError(f"{path}: cannot be read as scores: {error}; remove it, and score again") from error
