"""What travels between a pool and its workers: limits, requests, and frames of bytes.

Facts only: JSON and Arrow's IPC format, lengths before bytes. Nothing is unpickled, and each side checks what the other
one says. A frame is `<kind: 1 byte> <length: 4 bytes> <payload>`:

    pool to worker    Q  the request, JSON; or `ASK_LAYERS`
    worker to pool    S  started: JSON (the snapshots; or the layers, and nothing more), before the schema
                      A  an Arrow IPC stream; the first holds the schema alone, each further one a batch
                      E  the end: JSON (rows, truncated, milliseconds)
                      X  the end by an error: JSON (its class in `logitlake_shared.errors`, message)
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pydantic import Field, model_validator

from logitlake_shared.config import StrictModel
from logitlake_shared.errors import QueryError, QueryRefusedError
from logitlake_shared.ids import new_id

__all__ = [
    "ASK_LAYERS",
    "FRAME_HEADER",
    "MAX_SQL_BYTES",
    "MESSAGE",
    "Parameters",
    "SqlLimits",
    "SqlRequest",
    "check_text",
    "frame",
    "is_remote",
]

MAX_SQL_BYTES = 64 * 1024
_MAX_PARAMETERS_BYTES = 256 * 1024
FRAME_HEADER = struct.Struct(">cI")
MESSAGE = struct.Struct(">cii")
"""between a pool and its nursery: see `nursery`"""
ASK_LAYERS = b"layers"
"""instead of a request: which layers of the sandbox a worker enters"""
Scalar = str | int | float | bool | None
Parameters = Sequence[Scalar] | Mapping[str, Scalar]


class SqlLimits(StrictModel):
    """What a pool allows; all of it is the operator's to say."""

    num_running: int = Field(default=2, gt=0)
    """questions that run at the same time"""
    num_warm: int = Field(default=2, ge=0)
    """workers that wait, ready, for the next question"""
    num_waiting: int = Field(default=16, ge=0)
    """questions that may wait for others to end; one more is told that the pool is busy"""
    timeout_s: float = Field(default=10.0, gt=0)
    """seconds from the request to the last byte that is read; a request may ask for another time"""
    max_timeout_s: float = Field(default=60.0, gt=0)
    """what a request may ask for"""
    max_rows: int = Field(default=10_000, gt=0)
    """rows of an answer, where the request does not say"""
    max_rows_cap: int = Field(default=1_000_000, gt=0)
    """what a request may ask for"""
    max_bytes: int = Field(default=16 * 2**20, gt=0)
    """bytes of an answer in Arrow's format, where the request does not say"""
    max_bytes_cap: int = Field(default=256 * 2**20, gt=0)
    """what a request may ask for"""
    memory_mib: int = Field(default=1024, gt=0)
    """that a worker may add to what it has when it is ready: DuckDB's buffers get half of it"""
    threads: int = Field(default=2, gt=0)
    """DuckDB's, of a worker"""
    open_files: int = Field(default=256, gt=0)
    """of a worker"""
    required_layers: tuple[str, ...] = ()
    """layers of the sandbox without which no question is answered; default: a worker takes what the kernel offers"""

    @model_validator(mode="after")
    def _within_caps(self) -> Self:
        for name, cap in (("timeout_s", "max_timeout_s"), ("max_rows", "max_rows_cap"), ("max_bytes", "max_bytes_cap")):
            if getattr(self, name) > getattr(self, cap):
                raise ValueError(f"{name} is {getattr(self, name)}, more than {cap}, {getattr(self, cap)}")
        return self


@dataclass(frozen=True)
class SqlRequest:
    """One question."""

    sql: str
    caches: tuple[str, ...] | None
    """what the caller may see; None for every cache of the lake. There is no default: forgetting it shows nothing"""
    params: Parameters = ()
    """what stands for `?` (a sequence) or `$name` (a mapping)"""
    snapshot: Mapping[str, int] = field(default_factory=dict)
    """the snapshot of a cache by its name; the newest where none is named"""
    timeout_s: float | None = None
    max_rows: int | None = None
    max_bytes: int | None = None
    query_id: str = field(default_factory=lambda: new_id("qry"))

    def resolved(self, limits: SqlLimits) -> "SqlRequest":
        """With every limit filled in. Raises `QueryError` for one above what the pool allows, or no limit at all."""
        given = {
            "timeout_s": (self.timeout_s, limits.timeout_s, limits.max_timeout_s),
            "max_rows": (self.max_rows, limits.max_rows, limits.max_rows_cap),
            "max_bytes": (self.max_bytes, limits.max_bytes, limits.max_bytes_cap),
        }
        values: dict[str, Any] = {}
        for name, (asked, usual, most) in given.items():
            value = usual if asked is None else asked
            kind = int | float if name == "timeout_s" else int
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= most:
                raise QueryError(f"{name}: got {asked!r}, expected more than 0 and at most {most:g}")
            values[name] = value
        return SqlRequest(self.sql, self.caches, self.params, self.snapshot, query_id=self.query_id, **values)

    def to_bytes(self) -> bytes:
        """As a worker reads it. Raises `QueryError` for parameters that are not plain values."""
        check_text(self.sql)
        _check_parameters(self.params)
        _check_names(self.caches, self.snapshot)
        document = asdict(self)
        document["params"] = dict(self.params) if isinstance(self.params, Mapping) else list(self.params)
        document["snapshot"] = dict(self.snapshot)
        data = json.dumps(document).encode()
        if len(data) > 8 * MAX_SQL_BYTES + 8 * _MAX_PARAMETERS_BYTES:
            raise QueryRefusedError(f"the request has {len(data)} bytes; name fewer caches")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "SqlRequest":
        """What `to_bytes` made."""
        document = json.loads(data)
        caches = document.pop("caches")
        return cls(caches=None if caches is None else tuple(caches), **document)


def check_text(sql: object) -> None:
    """Raises `QueryRefusedError` for a text that is not handed to the parser."""
    if not isinstance(sql, str):
        raise QueryError(f"sql: got {type(sql).__name__}, expected text")
    try:
        size = len(sql.encode())
    except UnicodeEncodeError as error:
        raise QueryRefusedError(f"the SQL text is not Unicode: half a surrogate pair at {error.start + 1}") from error
    if size > MAX_SQL_BYTES:
        raise QueryRefusedError(f"the SQL text has {size} bytes, expected at most {MAX_SQL_BYTES}")
    if "\0" in sql:
        raise QueryRefusedError(f"the SQL text has a NUL at character {sql.index(chr(0)) + 1}")
    if not sql.strip():
        raise QueryError("the SQL text is empty; expected one question")


def is_remote(lake: str) -> bool:
    """Whether the lake lies in an object store."""
    return "://" in lake and not lake.startswith("file://")


def frame(kind: bytes, payload: bytes) -> bytes:
    """A frame of this kind."""
    return FRAME_HEADER.pack(kind, len(payload)) + payload


def _check_parameters(params: Any) -> None:
    if isinstance(params, Mapping):
        values = list(params.values())
        if not all(isinstance(name, str) for name in params):
            raise QueryError("params: expected names that are text")
    elif isinstance(params, Sequence) and not isinstance(params, str | bytes):
        values = list(params)
    else:
        raise QueryError(f"params: got {type(params).__name__}, expected a list for `?` or an object for `$name`")
    size = 0
    for value in values:
        if value is not None and not isinstance(value, str | int | float | bool):
            raise QueryError(f"params: got a {type(value).__name__}, expected text, numbers, true, false or null")
        if isinstance(value, int) and not -(2**127) <= value < 2**127:
            raise QueryError("params: a whole number of more than 127 bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise QueryError("params: a number that is not finite; write 'NaN'::DOUBLE in the question")
        try:
            size += len(value.encode()) if isinstance(value, str) else 40
        except UnicodeEncodeError as error:
            raise QueryError("params: a text that is not Unicode") from error
    if size > _MAX_PARAMETERS_BYTES:
        raise QueryRefusedError(f"params: {size} bytes, expected at most {_MAX_PARAMETERS_BYTES}")


def _check_names(caches: Any, snapshot: Any) -> None:
    if caches is not None and (isinstance(caches, str) or not all(isinstance(name, str) for name in caches)):
        raise QueryError(f"caches: got {caches!r}, expected a tuple of names")
    if not isinstance(snapshot, Mapping) or not all(
        isinstance(name, str) and isinstance(number, int) and not isinstance(number, bool) and 0 < number < 10**8
        for name, number in snapshot.items()
    ):
        raise QueryError(f"snapshot: got {snapshot!r}, expected the number of a snapshot by the name of its cache")
