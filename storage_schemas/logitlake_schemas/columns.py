"""Every column that a lake persists, declared once.

From this declaration come the Arrow schema of the shards, their encodings, the SQL views, the checks on what is read,
and the table in `docs/format.md`; golden shards pin it. Adding a nullable column keeps the format version, anything
else raises it. A shard leaves out a nullable column of which it holds no value, so that a shard from before the column
is like one of a capture that does not use it; readers give nulls for both.

Grain says what one value stands for: the row, one response token, or one cached entry of a token's top-k. Lists of
grain `token` have one element for each response token, in order; lists of grain `topk` are the tokens' entries one
after the other, `k[t]` of them for token t, so that plain SQL can slice them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from logitlake_schemas.records import ShardKind, Temperature

__all__ = [
    "COLUMNS",
    "IMAGE_COLUMNS",
    "PAIR_COLUMNS",
    "SAMPLE_COLUMNS",
    "SCORE_COLUMNS",
    "TAIL_COLUMNS",
    "Column",
    "Encoding",
    "Grain",
    "arrow_schema",
]

Grain = Literal["row", "token", "topk"]
Encoding = Literal["dictionary", "plain", "split"]


@dataclass(frozen=True)
class Column:
    """One persisted column: its name, Arrow type, grain and meaning. No column is nullable unless it says so."""

    name: str
    type: pa.DataType
    grain: Grain
    doc: str
    nullable: bool = False
    encoding: Encoding = "dictionary"
    """Parquet's encoding under zstd. `dictionary` for what repeats; `split` (BYTE_STREAM_SPLIT) for numbers that
    hardly do; `plain` for bytes that are compressed already or never repeat."""


def _list(element: pa.DataType) -> pa.DataType:
    # NOT NULL elements decode 20-30 % faster than nullable ones (docs/decisions/0002-lake-format.md).
    return pa.list_(pa.field("element", element, nullable=False))


_ORIGIN = (
    Column("task", pa.string(), "row", "task name given by the data source, e.g. `caption`"),
    Column("source", pa.string(), "row", "name of the data source"),
    Column("split", pa.string(), "row", "`train`, `test`, … as the data source names it"),
    Column(
        "messages",
        pa.string(),
        "row",
        "the conversation: JSON list of {role, content}",
        encoding="plain",
    ),
)

TAIL_COLUMNS: dict[Temperature, str] = {2: "log_tail_mass_t2", 4: "log_tail_mass_t4"}
"""Where the log tail mass at each temperature beside 1 is stored."""

SAMPLE_COLUMNS: tuple[Column, ...] = (
    Column("sample_id", pa.string(), "row", "unique in the cache", encoding="plain"),
    *_ORIGIN,
    Column(
        "prompt_ids",
        _list(pa.int32()),
        "row",
        "token ids of all prompt segments, one `<image>` placeholder an image",
    ),
    Column(
        "prompt_lengths",
        _list(pa.int32()),
        "row",
        "length of each prompt segment; one segment before each response",
    ),
    Column(
        "response_ids",
        _list(pa.int32()),
        "token",
        "token ids of all responses, each closed by EOS but where `finish_reason` is `length`",
    ),
    Column("response_lengths", _list(pa.int32()), "row", "length of each response, EOS included"),
    Column("expanded_length", pa.int32(), "row", "the teacher's sequence length, images expanded"),
    Column("image_sha256", _list(pa.string()), "row", "sha256 of each image's encoded bytes, in order"),
    Column("k", _list(pa.uint16()), "token", "number of cached entries of the token"),
    # Ids of a BPE are in order of frequency, so their high bytes are small: split they take an eighth less than in a
    # dictionary and are written and read about twice as fast (docs/decisions/0006-adaptive-k.md).
    Column("topk_ids", _list(pa.int32()), "topk", "token ids by falling probability", encoding="split"),
    Column(
        "topk_logprobs",
        _list(pa.float32()),
        "topk",
        "natural logprobs at T=1, normalised over the vocabulary",
    ),
    Column(
        "label_logprob",
        _list(pa.float32()),
        "token",
        "teacher logprob of the response token",
        encoding="split",
    ),
    Column(
        "label_logprob_no_image",
        _list(pa.float32()),
        "token",
        "the same with the images left out of the prompt; null where there are none or nobody asked",
        nullable=True,
        encoding="split",
    ),
    Column("label_rank", _list(pa.int32()), "token", "rank of the response token, 1 = the teacher's first choice"),
    Column(
        "log_tail_mass",
        _list(pa.float32()),
        "token",
        "log of the probability outside the cached entries; -inf for none",
        encoding="split",
    ),
    *(
        Column(
            name,
            _list(pa.float32()),
            "token",
            f"the same of softmax(logits / {temperature}); null where it was not captured",
            nullable=True,
            encoding="split",
        )
        for temperature, name in TAIL_COLUMNS.items()
    ),
    Column(
        "entropy",
        _list(pa.float32()),
        "token",
        "entropy in nats of the captured entries and the tail as one class",
        encoding="split",
    ),
    Column(
        "finish_reason",
        pa.string(),
        "row",
        "`given` for responses of the data; why the teacher stopped writing the last one: `stop` (EOS) or `length`",
    ),
)

PAIR_COLUMNS: tuple[Column, ...] = (
    Column("pair_id", pa.string(), "row", "unique in the cache", encoding="plain"),
    *_ORIGIN,
    Column("prompt_ids", _list(pa.int32()), "row", "token ids of the prompt, one `<image>` placeholder an image"),
    Column("image_sha256", _list(pa.string()), "row", "sha256 of each image's encoded bytes, in order"),
    Column("chosen_ids", _list(pa.int32()), "row", "token ids of the preferred response, EOS included"),
    Column("rejected_ids", _list(pa.int32()), "row", "token ids of the other response, EOS included"),
    Column(
        "chosen_logprobs",
        _list(pa.float32()),
        "row",
        "teacher logprob of each chosen token",
        encoding="split",
    ),
    Column(
        "rejected_logprobs",
        _list(pa.float32()),
        "row",
        "teacher logprob of each rejected token",
        encoding="split",
    ),
    *(
        Column(
            f"{side}_logprobs_no_image",
            _list(pa.float32()),
            "row",
            f"`{side}_logprobs` with the images left out; null where there are none or nobody asked",
            nullable=True,
            encoding="split",
        )
        for side in ("chosen", "rejected")
    ),
    Column("chosen_score", pa.float32(), "row", "sum of `chosen_logprobs`", encoding="split"),
    Column("rejected_score", pa.float32(), "row", "sum of `rejected_logprobs`", encoding="split"),
    *(
        Column(
            f"{side}_rating",
            pa.float32(),
            "row",
            f"the score by which this response was {side}, as `made_by` says; null for pairs of a dataset",
            nullable=True,
            encoding="split",
        )
        for side in ("chosen", "rejected")
    ),
    Column("made_by", pa.string(), "row", "`dataset`, or compact JSON that says how the pair was made"),
)

IMAGE_COLUMNS: tuple[Column, ...] = (
    Column("image_sha256", pa.string(), "row", "sha256 of `data`"),
    Column("format", pa.string(), "row", "`PNG`, `JPEG`, …"),
    Column("width", pa.int32(), "row", "pixels"),
    Column("height", pa.int32(), "row", "pixels"),
    Column("data", pa.binary(), "row", "the encoded image, byte for byte as it was read", encoding="plain"),
)

SCORE_COLUMNS: tuple[Column, ...] = (
    Column("sample_id", pa.string(), "row", "of the sample in the cache", encoding="plain"),
    Column("task", pa.string(), "row", "the sample's"),
    Column("label_logprob", _list(pa.float32()), "token", "student logprob of the response token", encoding="split"),
    Column("label_rank", _list(pa.int32()), "token", "rank of the response token, 1 = the student's first choice"),
    Column("entropy", _list(pa.float32()), "token", "of the student over its whole vocabulary, nats", encoding="split"),
    Column(
        "forward_kl",
        _list(pa.float32()),
        "token",
        "KL(teacher‖student) over the cached entries and the tail as one class, nats",
        encoding="split",
    ),
    Column("k", _list(pa.uint16()), "token", "number of entries of the token, the same for all"),
    Column("topk_ids", _list(pa.int32()), "topk", "token ids by falling student probability", encoding="split"),
    Column("topk_logprobs", _list(pa.float32()), "topk", "natural student logprobs at T=1", encoding="split"),
)
"""What a student makes of the samples of a cache: a file of its own beside a run, no shard of the lake."""

COLUMNS: dict[ShardKind, tuple[Column, ...]] = {
    "samples": SAMPLE_COLUMNS,
    "pairs": PAIR_COLUMNS,
    "images": IMAGE_COLUMNS,
}
"""The columns of each kind of shard."""


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """The Arrow schema of a shard with these columns, in this order."""
    return pa.schema([pa.field(column.name, column.type, nullable=column.nullable) for column in columns])
