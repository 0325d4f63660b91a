"""The rows of a lake as records in memory, and their two-way street to Arrow tables.

Readers and writers meet here: a shard is `samples_to_table(...)` written out, a dataset item is
`samples_from_table(...)` read back, and the round trip is exact (tested). Column names and types come from
`logitlake_schemas.columns`; this module only knows which field of a record feeds which column.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitlake_schemas import IMAGE_COLUMNS, PAIR_COLUMNS, SAMPLE_COLUMNS, arrow_schema
from logitlake_shared.topk import StoredRows

__all__ = [
    "LakeImage",
    "LakePair",
    "LakeSample",
    "images_from_table",
    "images_to_table",
    "pairs_from_table",
    "pairs_to_table",
    "samples_from_table",
    "samples_to_table",
]

Int32 = npt.NDArray[np.int32]
Messages = list[dict[str, Any]]


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
    chosen_logprobs: npt.NDArray[np.float32]
    rejected_logprobs: npt.NDArray[np.float32]
    made_by: str
    images: tuple[bytes, ...] = ()


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
    records = [
        {
            **_origin(sample),
            "sample_id": sample.sample_id,
            "prompt_ids": sample.prompt_ids,
            "prompt_lengths": sample.prompt_lengths,
            "response_ids": sample.response_ids,
            "response_lengths": sample.response_lengths,
            "expanded_length": sample.expanded_length,
            "image_sha256": list(sample.image_sha256),
            "k": sample.rows.k_T,
            "topk_ids": sample.rows.topk_ids,
            "topk_logprobs": sample.rows.topk_logprobs,
            "label_logprob": sample.rows.label_logprob_T,
            "label_rank": sample.rows.label_rank_T,
            "log_tail_mass": sample.rows.log_tail_mass_T,
            "entropy": sample.rows.entropy_T,
            "finish_reason": sample.finish_reason,
        }
        for sample in samples
    ]
    return _table(records, arrow_schema(SAMPLE_COLUMNS))


def samples_from_table(table: pa.Table) -> list[LakeSample]:
    """The inverse of `samples_to_table`."""
    columns = {name: _lists(table.column(name)) for name in table.schema.names}
    return [
        LakeSample(
            sample_id=columns["sample_id"][i],
            task=columns["task"][i],
            source=columns["source"][i],
            split=columns["split"][i],
            messages=json.loads(columns["messages"][i]),
            prompt_ids=columns["prompt_ids"][i],
            prompt_lengths=columns["prompt_lengths"][i],
            response_ids=columns["response_ids"][i],
            response_lengths=columns["response_lengths"][i],
            expanded_length=columns["expanded_length"][i],
            image_sha256=tuple(columns["image_sha256"][i]),
            rows=StoredRows(
                k_T=columns["k"][i],
                topk_ids=columns["topk_ids"][i],
                topk_logprobs=columns["topk_logprobs"][i],
                label_logprob_T=columns["label_logprob"][i],
                label_rank_T=columns["label_rank"][i],
                log_tail_mass_T=columns["log_tail_mass"][i],
                entropy_T=columns["entropy"][i],
            ),
            finish_reason=columns["finish_reason"][i],
        )
        for i in range(table.num_rows)
    ]


def pairs_to_table(pairs: Sequence[LakePair]) -> pa.Table:
    """The pairs as a table of `PAIR_COLUMNS`."""
    records = [
        {
            **_origin(pair),
            "pair_id": pair.pair_id,
            "prompt_ids": pair.prompt_ids,
            "image_sha256": list(pair.image_sha256),
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
            "chosen_logprobs": pair.chosen_logprobs,
            "rejected_logprobs": pair.rejected_logprobs,
            "chosen_score": float(pair.chosen_logprobs.sum(dtype=np.float64)),
            "rejected_score": float(pair.rejected_logprobs.sum(dtype=np.float64)),
            "made_by": pair.made_by,
        }
        for pair in pairs
    ]
    return _table(records, arrow_schema(PAIR_COLUMNS))


def pairs_from_table(table: pa.Table) -> list[LakePair]:
    """The inverse of `pairs_to_table`; the two scores are sums and are not read back."""
    columns = {name: _lists(table.column(name)) for name in table.schema.names}
    return [
        LakePair(
            pair_id=columns["pair_id"][i],
            task=columns["task"][i],
            source=columns["source"][i],
            split=columns["split"][i],
            messages=json.loads(columns["messages"][i]),
            prompt_ids=columns["prompt_ids"][i],
            image_sha256=tuple(columns["image_sha256"][i]),
            chosen_ids=columns["chosen_ids"][i],
            rejected_ids=columns["rejected_ids"][i],
            chosen_logprobs=columns["chosen_logprobs"][i],
            rejected_logprobs=columns["rejected_logprobs"][i],
            made_by=columns["made_by"][i],
        )
        for i in range(table.num_rows)
    ]


def images_to_table(images: Sequence[LakeImage]) -> pa.Table:
    """The images as a table of `IMAGE_COLUMNS`."""
    return _table([vars(image) for image in images], arrow_schema(IMAGE_COLUMNS))


def images_from_table(table: pa.Table) -> list[LakeImage]:
    """The inverse of `images_to_table`."""
    return [LakeImage(**record) for record in table.to_pylist()]


def _origin(row: LakeSample | LakePair) -> dict[str, Any]:
    return {
        "task": row.task,
        "source": row.source,
        "split": row.split,
        "messages": json.dumps(row.messages, ensure_ascii=False),
    }


def _table(records: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pydict(
        {field.name: pa.array([record[field.name] for record in records], field.type) for field in schema},
        schema,
    )


def _lists(column: pa.ChunkedArray) -> list[Any]:
    """Numeric lists as numpy arrays cut from one buffer; everything else as Python objects."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty table has no chunk to combine
        return []
    if not (pa.types.is_list(array.type) and pa.types.is_primitive(array.type.value_type)):
        return list(array.to_pylist())
    values, offsets = array.flatten().to_numpy(), np.cumsum([0, *array.value_lengths().to_pylist()])
    return [values[start:stop] for start, stop in pairwise(offsets)]
