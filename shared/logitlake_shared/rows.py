"""The rows of a lake as records in memory, and their two-way street to Arrow tables.

Readers and writers meet here: a shard is `samples_to_table(...)` written out, a dataset item is
`samples_from_table(...)` read back, and the round trip is exact (tested). Column names and types come from
`logitlake_schemas.columns`; this module only knows which field of a record feeds which column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitlake_schemas import IMAGE_COLUMNS, PAIR_COLUMNS, SAMPLE_COLUMNS, TAIL_COLUMNS, arrow_schema
from logitlake_shared.arrow_lists import column_views, list_array
from logitlake_shared.messages import Messages, StoredMessages, messages_text
from logitlake_shared.topk import StoredRows

__all__ = [
    "LakeImage",
    "LakePair",
    "LakeSample",
    "PairViews",
    "SampleViews",
    "images_from_table",
    "images_to_table",
    "pairs_from_table",
    "pairs_to_table",
    "samples_from_table",
    "samples_to_table",
    "stored_table",
]

_SAMPLE_SCHEMA = arrow_schema(SAMPLE_COLUMNS)
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LakeSample:
    """One captured conversation. `images` are the encoded bytes; a reader fills them, a writer ignores them."""

    sample_id: str
    task: str
    source: str
    split: str
    messages: Messages
    prompt_ids: Int32
    prompt_lengths: Int32
    response_ids: Int32
    response_lengths: Int32
    expanded_length: int
    image_sha256: tuple[str, ...]
    rows: StoredRows
    finish_reason: str
    images: tuple[bytes, ...] = ()
    label_logprob_no_image_T: Float32 | None = None
    """the teacher's logprob of each response token with the images left out; the visual advantage is what it lost"""


@dataclass(frozen=True)
class LakePair:
    """One preference pair with the teacher's logprob of every token. `images` as in `LakeSample`."""

    pair_id: str
    task: str
    source: str
    split: str
    messages: Messages
    prompt_ids: Int32
    image_sha256: tuple[str, ...]
    chosen_ids: Int32
    rejected_ids: Int32
    chosen_logprobs: Float32
    rejected_logprobs: Float32
    made_by: str
    """`dataset`, or compact JSON that says how the pair was made"""
    images: tuple[bytes, ...] = ()
    chosen_logprobs_no_image: Float32 | None = None
    """with the images left out"""
    rejected_logprobs_no_image: Float32 | None = None
    chosen_rating: float | None = None
    """the score by which this response was chosen, as `made_by` says; float32"""
    rejected_rating: float | None = None


@dataclass(frozen=True)
class LakeImage:
    """One encoded image."""

    image_sha256: str
    format: str
    width: int
    height: int
    data: bytes


def samples_to_table(samples: Sequence[LakeSample]) -> pa.Table:
    """The samples as a table of `SAMPLE_COLUMNS`."""
    rows = [sample.rows for sample in samples]
    columns = {
        **_origin(samples),
        "sample_id": [sample.sample_id for sample in samples],
        "prompt_ids": [sample.prompt_ids for sample in samples],
        "prompt_lengths": [sample.prompt_lengths for sample in samples],
        "response_ids": [sample.response_ids for sample in samples],
        "response_lengths": [sample.response_lengths for sample in samples],
        "expanded_length": [sample.expanded_length for sample in samples],
        "image_sha256": [sample.image_sha256 for sample in samples],
        "k": [row.k_T for row in rows],
        "topk_ids": [row.topk_ids for row in rows],
        "topk_logprobs": [row.topk_logprobs for row in rows],
        "label_logprob": [row.label_logprob_T for row in rows],
        "label_logprob_no_image": [sample.label_logprob_no_image_T for sample in samples],
        "label_rank": [row.label_rank_T for row in rows],
        "log_tail_mass": [row.log_tail_mass_T for row in rows],
        **{name: [row.log_tails_T.get(temperature) for row in rows] for temperature, name in TAIL_COLUMNS.items()},
        "entropy": [row.entropy_T for row in rows],
        "finish_reason": [sample.finish_reason for sample in samples],
    }
    return _table(columns, _SAMPLE_SCHEMA)


def stored_table(described: Mapping[str, Sequence[Any] | pa.Array], rows: StoredRows) -> pa.Table:
    """A table of `SAMPLE_COLUMNS` from its columns and from the rows of all its samples, one after the other.

    `described` holds every column that is not made of `rows`, as values or as Arrow's own, with `messages` as text.
    What a capture has is written as it is: nothing is taken apart by sample to be joined again.
    """
    tokens = np.append(0, np.cumsum(_list_lengths(described["response_ids"]), dtype=np.int32))
    entries = np.append(0, np.cumsum(rows.k_T, dtype=np.int64))[tokens].astype(np.int32)
    by_token = {
        "k": rows.k_T,
        "label_logprob": rows.label_logprob_T,
        "label_rank": rows.label_rank_T,
        "log_tail_mass": rows.log_tail_mass_T,
        "entropy": rows.entropy_T,
        **{TAIL_COLUMNS[temperature]: tails_T for temperature, tails_T in rows.log_tails_T.items()},
    }
    by_entry = {"topk_ids": rows.topk_ids, "topk_logprobs": rows.topk_logprobs}
    missing = {name: [None] * len(described["response_ids"]) for name in TAIL_COLUMNS.values()}
    cut = {
        name: pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=_SAMPLE_SCHEMA.field(name).type)
        for offsets, columns in ((tokens, by_token), (entries, by_entry))
        for name, values in columns.items()
    }
    return _table({**missing, **described, **cut}, _SAMPLE_SCHEMA)


def _list_lengths(lists: Sequence[Any] | pa.Array) -> Int32:
    if isinstance(lists, pa.Array):
        return np.asarray(pc.list_value_length(lists).to_numpy(), np.int32)
    return np.fromiter(map(len, lists), np.int32, len(lists))


def samples_from_table(table: pa.Table) -> list[LakeSample]:
    """The inverse of `samples_to_table`. The arrays are views of the table's memory and cannot be written to."""
    views = SampleViews(table)
    return [views.item(row) for row in range(len(views))]


def pairs_to_table(pairs: Sequence[LakePair]) -> pa.Table:
    """The pairs as a table of `PAIR_COLUMNS`."""
    columns = {
        **_origin(pairs),
        "pair_id": [pair.pair_id for pair in pairs],
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "image_sha256": [pair.image_sha256 for pair in pairs],
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
        "chosen_logprobs": [pair.chosen_logprobs for pair in pairs],
        "rejected_logprobs": [pair.rejected_logprobs for pair in pairs],
        **{name: [getattr(pair, name) for pair in pairs] for name in _OPTIONAL_OF_PAIRS},
        "chosen_score": [float(pair.chosen_logprobs.sum(dtype=np.float64)) for pair in pairs],
        "rejected_score": [float(pair.rejected_logprobs.sum(dtype=np.float64)) for pair in pairs],
        "made_by": [pair.made_by for pair in pairs],
    }
    return _table(columns, arrow_schema(PAIR_COLUMNS))


def pairs_from_table(table: pa.Table) -> list[LakePair]:
    """The inverse of `pairs_to_table`; the two scores are sums and are not read back. Views, as for samples."""
    views = PairViews(table)
    return [views.item(row) for row in range(len(views))]


def images_to_table(images: Sequence[LakeImage]) -> pa.Table:
    """The images as a table of `IMAGE_COLUMNS`."""
    schema = arrow_schema(IMAGE_COLUMNS)
    return _table({name: [getattr(image, name) for image in images] for name in schema.names}, schema)


def images_from_table(table: pa.Table) -> list[LakeImage]:
    """The inverse of `images_to_table`."""
    return [LakeImage(**record) for record in table.to_pylist()]


_OPTIONAL_OF_PAIRS = tuple(column.name for column in PAIR_COLUMNS if column.nullable)


def _origin(rows: Sequence[LakeSample] | Sequence[LakePair]) -> dict[str, list[Any]]:
    return {
        "task": [row.task for row in rows],
        "source": [row.source for row in rows],
        "split": [row.split for row in rows],
        "messages": [messages_text(row.messages) for row in rows],
    }


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    arrays = [
        column if isinstance(column := columns[field.name], pa.Array) else list_array(column, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


class _Views:
    """The rows of a table, columnar: an item is made when it is asked for, its arrays are views."""

    def __init__(self, table: pa.Table) -> None:
        self._num_rows: int = table.num_rows
        self._columns = {name: column_views(table.column(name)) for name in table.schema.names}
        self.num_bytes: int = table.get_total_buffer_size()

    def __len__(self) -> int:
        return self._num_rows

    def image_sha256(self, row: int) -> list[str]:
        """The images that a row names."""
        names: list[str] = self._columns["image_sha256"][row]
        return names


class SampleViews(_Views):
    """The samples of a table, one at a time."""

    def __init__(self, table: pa.Table) -> None:
        super().__init__(table)
        self._tails = {
            temperature: self._columns[name]
            for temperature, name in TAIL_COLUMNS.items()
            if table.column(name).null_count < table.num_rows
        }

    def item(self, row: int, images: tuple[bytes, ...] = ()) -> LakeSample:
        """Sample `row` with its encoded images."""
        columns = self._columns
        return LakeSample(
            sample_id=columns["sample_id"][row],
            task=columns["task"][row],
            source=columns["source"][row],
            split=columns["split"][row],
            messages=StoredMessages(columns["messages"][row]),
            prompt_ids=columns["prompt_ids"][row],
            prompt_lengths=columns["prompt_lengths"][row],
            response_ids=columns["response_ids"][row],
            response_lengths=columns["response_lengths"][row],
            expanded_length=columns["expanded_length"][row],
            image_sha256=tuple(columns["image_sha256"][row]),
            rows=StoredRows(
                k_T=columns["k"][row],
                topk_ids=columns["topk_ids"][row],
                topk_logprobs=columns["topk_logprobs"][row],
                label_logprob_T=columns["label_logprob"][row],
                label_rank_T=columns["label_rank"][row],
                log_tail_mass_T=columns["log_tail_mass"][row],
                entropy_T=columns["entropy"][row],
                log_tails_T={
                    temperature: tails[row] for temperature, tails in self._tails.items() if tails[row] is not None
                },
            ),
            finish_reason=columns["finish_reason"][row],
            images=images,
            label_logprob_no_image_T=columns["label_logprob_no_image"][row],
        )


class PairViews(_Views):
    """The pairs of a table, one at a time."""

    def item(self, row: int, images: tuple[bytes, ...] = ()) -> LakePair:
        """Pair `row` with its encoded images."""
        columns = self._columns
        return LakePair(
            pair_id=columns["pair_id"][row],
            task=columns["task"][row],
            source=columns["source"][row],
            split=columns["split"][row],
            messages=StoredMessages(columns["messages"][row]),
            prompt_ids=columns["prompt_ids"][row],
            image_sha256=tuple(columns["image_sha256"][row]),
            chosen_ids=columns["chosen_ids"][row],
            rejected_ids=columns["rejected_ids"][row],
            chosen_logprobs=columns["chosen_logprobs"][row],
            rejected_logprobs=columns["rejected_logprobs"][row],
            made_by=columns["made_by"][row],
            images=images,
            **{name: columns[name][row] for name in _OPTIONAL_OF_PAIRS},
        )
