"""What the answers of the API hold: each class is a schema of the OpenAPI document, with an example in every field."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from logitlake_shared.cache_figures import CacheFigures

__all__ = [
    "CacheDocument",
    "ColumnDocument",
    "FileDocument",
    "SampleDocument",
    "SampleEntry",
    "SnapshotDocument",
    "ViewDocument",
    "figures_document",
]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True, use_attribute_docstrings=True)


class CacheDocument(_Document):
    """A cache: one capture of one dataset by one teacher, as its newest snapshot shows it."""

    name: str = Field(examples=["main"])
    kind: Literal["samples", "pairs"] = Field(examples=["samples"])
    fingerprint: str = Field(examples=["5f0c…"])
    """of everything that made it what it is"""
    snapshot: int | None = Field(examples=[1])
    """number of the newest snapshot; null before there is one, and then there are no figures"""
    figures: dict[str, Any] | None = Field(examples=[{"rows": 900, "tokens": 14_000, "bytes_per_token": 16.0}])
    """counts, bytes and the stored error"""
    spec: dict[str, Any] = Field(examples=[{"kind": "samples"}])
    """teacher, tokenizer, codec and dataset in full"""


class SnapshotDocument(_Document):
    """What a reader pins."""

    cache: str = Field(examples=["main"])
    number: int = Field(examples=[1])
    spec_fingerprint: str = Field(examples=["5f0c…"])
    figures: dict[str, Any] = Field(examples=[{"rows": 900}])


class FileDocument(_Document):
    """A committed file of a snapshot. Its bytes are at `url`, whole or by range, and have this sha256."""

    path: str = Field(examples=["caches/main/shards/000000-1f0f51da1f92-5009ea6dc9c2e4e6.parquet"])
    kind: Literal["samples", "pairs", "images"] = Field(examples=["samples"])
    bytes: int = Field(examples=[123_456])
    sha256: str = Field(examples=["5009ea6dc9c2e4e6…"])
    rows: int = Field(examples=[64])
    tokens: int = Field(examples=[1_024])
    url: str = Field(examples=["/v1/files/caches/main/shards/000000-1f0f51da1f92-5009ea6dc9c2e4e6.parquet"])


class SampleEntry(_Document):
    """A sample or a pair in a list."""

    id: str = Field(examples=["train-00145-0-caption"])
    task: str = Field(examples=["caption"])
    source: str = Field(examples=["scenes"])
    split: str = Field(examples=["train"])
    num_tokens: int = Field(examples=[16])
    """of its responses; of a pair, chosen and rejected together"""


class SampleDocument(_Document):
    """A sample or a pair as a person wants to see it: all that `logitlake inspect` shows."""

    id: str = Field(examples=["train-00145-0-caption"])
    kind: str = Field(examples=["samples"])
    cache: str = Field(examples=["main"])
    fingerprint: str = Field(examples=["5f0c…"])
    """of the cache"""
    teacher: str = Field(examples=["teacher (hf 5.19.0)"])
    task: str = Field(examples=["caption"])
    source: str = Field(examples=["scenes"])
    split: str = Field(examples=["train"])
    messages: list[dict[str, Any]] = Field(examples=[[{"role": "user", "content": "<image>\nWhat is there?"}]])
    prompt_tokens: int = Field(examples=[10])
    expanded_length: int | None = Field(examples=[41])
    """tokens of the prompt with its images expanded; null for a pair"""
    ended_by: str = Field(examples=["given"])
    """why the response ended; of a pair, how it was made"""
    images: list[dict[str, Any]] = Field(
        examples=[[{"sha256": "9f…", "width": 64, "height": 64, "url": "/v1/images/…"}]]
    )
    responses: list[dict[str, Any]] = Field(examples=[[{"name": "assistant", "logprob_sum": -0.4, "tokens": []}]])
    tokenizer: str = Field(examples=["teacher"])
    """how the tokens' texts were made, or why there are none"""
    students: list[str] = Field(examples=[["demo/d2s"]])
    """stages of runs that were scored on the cache's samples of this split"""
    student: str | None = Field(examples=["demo/d2s"])
    """the one whose figures each token has under `student`"""


class ColumnDocument(_Document):
    """A column of a view."""

    name: str = Field(examples=["label_logprob"])
    type: str = Field(examples=["FLOAT[]"])
    doc: str = Field(examples=["teacher logprob of the response token"])


class ViewDocument(_Document):
    """A relation that SQL may ask."""

    name: str = Field(examples=["tokens"])
    columns: list[ColumnDocument]


def figures_document(figures: CacheFigures) -> dict[str, Any]:
    """The figures under the names that SQL has for them; what stands beside them elsewhere is left out."""
    beside = ("cache", "kind", "snapshot", "fingerprint")
    return {name: value for name, value in vars(figures).items() if name not in beside}
