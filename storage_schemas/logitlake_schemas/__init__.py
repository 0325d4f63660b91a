"""What is on disk in a lake: columns, records, names and fingerprints, each declared once.

A lake is a folder or an object-store prefix:

    lake.json                                          format version, created once
    caches/<cache>/spec.json                           the capture spec and its fingerprint
    caches/<cache>/shards/<unit>-<sha256/16>.parquet   rows, immutable, named by content
    caches/<cache>/images/<unit>-<sha256/16>.parquet   encoded image bytes, one row an image
    caches/<cache>/commits/<unit>.json                 one commit record a unit, created once
    caches/<cache>/snapshots/<00000001>.json           what readers pin, created once
    caches/<cache>/quarantine/<unit>-<0001>.json       a commit record that was taken back, and why
    catalog/catalog-<00000001>.duckdb                  an index of all snapshots, made from them, created once

The commit records are the truth: a shard exists for readers when the record of its unit names it. This package
is light on purpose (no torch, ray or duckdb): a tool that only wants to read a lake needs nothing more.

    columns      every persisted column, declared once
    records      the JSON documents, as strict pydantic models
    layout       the names of the objects in a lake
    fingerprint  canonical JSON and its sha256
"""

from logitlake_schemas.columns import (
    COLUMNS,
    IMAGE_COLUMNS,
    PAIR_COLUMNS,
    SAMPLE_COLUMNS,
    SCORE_COLUMNS,
    TAIL_COLUMNS,
    Column,
    arrow_schema,
)
from logitlake_schemas.fingerprint import canonical_json, fingerprint, sha256_hex
from logitlake_schemas.records import (
    ERROR_CODES,
    FORMAT_VERSION,
    SET_ASIDE_CODES,
    CacheKind,
    CaptureMode,
    CaptureSpec,
    Codec,
    CodecPolicy,
    CommitRecord,
    DatasetIdentity,
    EngineIdentity,
    GenerateMode,
    LakeManifest,
    QuarantineRecord,
    SampledPolicy,
    ScoreMode,
    ScoresRecord,
    ShardEntry,
    ShardKind,
    Snapshot,
    StoredError,
    Temperature,
    TokenizerIdentity,
    UnitError,
)

__all__ = [
    "COLUMNS",
    "ERROR_CODES",
    "FORMAT_VERSION",
    "IMAGE_COLUMNS",
    "PAIR_COLUMNS",
    "SAMPLE_COLUMNS",
    "SCORE_COLUMNS",
    "SET_ASIDE_CODES",
    "TAIL_COLUMNS",
    "CacheKind",
    "CaptureMode",
    "CaptureSpec",
    "Codec",
    "CodecPolicy",
    "Column",
    "CommitRecord",
    "DatasetIdentity",
    "EngineIdentity",
    "GenerateMode",
    "LakeManifest",
    "QuarantineRecord",
    "SampledPolicy",
    "ScoreMode",
    "ScoresRecord",
    "ShardEntry",
    "ShardKind",
    "Snapshot",
    "StoredError",
    "Temperature",
    "TokenizerIdentity",
    "UnitError",
    "arrow_schema",
    "canonical_json",
    "fingerprint",
    "sha256_hex",
]
