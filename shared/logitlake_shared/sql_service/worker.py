"""A worker: waits, answers one question over a lake, and ends.

It is forked by a nursery (`nursery`), a process that imported everything and opened an empty DuckDB without a thread of
its own; so a worker is there in milliseconds, and answers one question only: whatever the question did to the process,
no other one meets it. On its request it takes from itself all that the question does not need (`sandbox`), has the gate
judge the text (`gate`), opens a catalog that holds the caller's caches and nothing else, locked as every catalog is,
and writes batches of Arrow until the answer, the rows or the bytes are at their end.

It believes nothing about the pool that asked for it: should that be gone, its input ends, or an alarm of the kernel's
ends it a second after its deadline, whatever it is doing.
"""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import duckdb
import pyarrow as pa

from logitlake_schemas import layout
from logitlake_shared.catalog import Catalog
from logitlake_shared.errors import (
    ConfigError,
    LakeError,
    LogitLakeError,
    QueryCrashedError,
    QueryError,
    QueryMemoryError,
    QueryTooLargeError,
)
from logitlake_shared.lake import Lake
from logitlake_shared.sql_service.gate import Gate
from logitlake_shared.sql_service.records import ASK_LAYERS, FRAME_HEADER, SqlRequest, frame, is_remote
from logitlake_shared.sql_service.sandbox import Layer, enter_late, enter_own

__all__ = ["run", "serve"]

_BATCH_ROWS = 2048
# After the pool's own deadline: it is there for a worker that the pool cannot end any longer.
_ALARM_AFTER_S = 1.0
_MESSAGE_CHARS = 4000
_PATH = re.compile(r"(?<![\w.:/-])/(?:[^\s/'\"`:;,()]+/)+[^\s/'\"`:;,()]*|\b[a-z0-9+]+://[^\s'\"]+")
_NO_MEMORY = re.compile(
    r"out of memory|bad_alloc|bad allocation|(failed to|cannot|could not) allocate|malloc of size"
    r"|can't start new thread|thread constructor failed",
    re.IGNORECASE,
)


def serve(connection: duckdb.DuckDBPyConnection, given: dict[str, Any], layers: list[Layer]) -> NoReturn:
    """The life of a worker: its request comes on descriptor 0, its frames go to 1; it never returns.

    `given` holds the lake and its limits, `layers` what the process entered already.
    """
    layers = layers + enter_own()
    requests, replies = 0, os.dup(1)
    # What a library prints goes nowhere: the pipe is for frames.
    os.dup2(2, 1)
    data = _read_request(requests)
    if data is None:
        os._exit(0)
    started = time.monotonic()
    lake: str = given["lake"]
    try:
        if data == ASK_LAYERS:
            layers += _restrict(lake, None, given, cpu_s=10)
            _write(replies, frame(b"S", json.dumps([vars(layer) for layer in layers]).encode()))
            os._exit(0)
        request = SqlRequest.from_bytes(data)
        assert request.timeout_s is not None
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, request.timeout_s + _ALARM_AFTER_S)
        cpu_s = int(given["threads"] * (request.timeout_s + _ALARM_AFTER_S)) + 2
        layers += _restrict(lake, request.caches, given, cpu_s=cpu_s)
        _require(layers, given["required_layers"])
        for out in run(connection, lake, request, given["threads"], started):
            _write(replies, out)
    except BrokenPipeError:
        os._exit(0)
    except BaseException as error:
        _write(replies, frame(b"X", _explained(error, lake)))
    os._exit(0)


def run(
    connection: duckdb.DuckDBPyConnection, lake: str, request: SqlRequest, threads: int, started: float
) -> Iterator[bytes]:
    """The frames of the answer. Raises `LogitLakeError`."""
    # Of its own: with the state of the nursery's, two questions would draw the same random numbers.
    connection = connection.cursor()
    relations = Gate(connection).judge(request.sql)
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"SET threads = {threads:d}")
    with Catalog(
        Lake.open(lake),
        caches=request.caches,
        snapshots=request.snapshot,
        connection=connection,
        has_disk=False,
        has_index="sample_index" in relations,
    ) as catalog:
        reader = catalog.query_batches(request.sql, request.params, _BATCH_ROWS)
        yield frame(b"S", json.dumps({"snapshot": catalog.snapshots}).encode())
        yield frame(b"A", _stream(reader.schema, []))
        rows, truncated = 0, ""
        assert request.max_rows is not None
        assert request.max_bytes is not None
        left = request.max_bytes
        for whole in reader:
            if not whole.num_rows:
                continue
            _check_decimals(whole)
            batch, why = _fitting(whole, request.max_rows - rows, left)
            if batch.num_rows:
                rows += batch.num_rows
                left -= batch.nbytes
                yield frame(b"A", _stream(reader.schema, [batch]))
            if why:
                truncated = why
                break
        if not rows and truncated == "bytes":
            raise QueryTooLargeError(
                f"the first row of the answer alone has more than {request.max_bytes} bytes; ask for less of it, or "
                "raise max_bytes"
            )
        milliseconds = (time.monotonic() - started) * 1000
        end = {"rows": rows, "truncated": truncated, "milliseconds": milliseconds}
        yield frame(b"E", json.dumps(end).encode())


def _check_decimals(batch: pa.RecordBatch) -> None:
    """Raises `QueryError` for a HUGEINT of 39 digits: Arrow's decimals have 38, and readers differ in what they do."""
    if "decimal128(38, 0)" in str(batch.schema):
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise QueryError(f"{error}; cast it to VARCHAR, or to DOUBLE") from error


def _fitting(batch: pa.RecordBatch, rows: int, left: int) -> tuple[pa.RecordBatch, str]:
    """As many of its rows as both limits allow, and the limit that cut it, if one did."""
    why = "rows" if batch.num_rows > rows else ""
    batch = batch.slice(0, rows)
    if batch.nbytes <= left:
        return batch, why
    fits, too_many = 0, batch.num_rows
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if batch.slice(0, middle).nbytes <= left:
            fits = middle
        else:
            too_many = middle
    return batch.slice(0, fits), "bytes"


def _restrict(lake: str, caches: tuple[str, ...] | None, given: dict[str, Any], *, cpu_s: int) -> list[Layer]:
    network = is_remote(lake)
    return enter_late(
        None if network else list(_readable(Path(lake), caches)),
        network=network,
        memory_bytes=given["memory_mib"] << 20,
        cpu_s=cpu_s,
        open_files=given["open_files"],
    )


def _readable(root: Path, caches: tuple[str, ...] | None) -> Iterator[Path]:
    """What a question over these caches may read: the parts of a local lake that are there."""
    if caches is None:
        places = [root]
    else:
        names = [layout.LAKE_MANIFEST, layout.catalog_prefix()]
        places = [root / name for name in names]
        places += [root / layout.cache_prefix(name) for name in caches if layout.valid_name(name)]
    yield from (place for place in places if place.exists())


def _require(layers: list[Layer], required: list[str]) -> None:
    missing = [layer for layer in layers if layer.name in required and not layer.active]
    unknown = set(required) - {layer.name for layer in layers}
    if missing or unknown:
        what = [f"{layer.name} ({layer.detail})" for layer in missing] + sorted(unknown)
        raise ConfigError(
            f"layers of the sandbox that are required are not available: {'; '.join(what)}. Run the service where they "
            "are, or take them out of required_layers"
        )


def _explained(error: BaseException, lake: str) -> bytes:
    """The error as the pool raises it again: its class, and a message without paths."""
    name, message = type(error).__name__, str(error)
    causes = (error, error.__cause__, error.__context__)
    if any(isinstance(cause, MemoryError | duckdb.OutOfMemoryException) for cause in causes) or (
        (not isinstance(error, LogitLakeError) or type(error) is QueryError) and _NO_MEMORY.search(message)
    ):
        name = QueryMemoryError.__name__
        # The advice that follows is for people who may set DuckDB's settings.
        first = message.partition("\n")[0]
        message = f"the question needs more memory than it may have; ask for less at once ({first})"
    elif is_remote(lake) and isinstance(error, LakeError) and not isinstance(error, QueryError):
        # What follows is the client's own account: addresses, headers, retries.
        message = message.partition(" failed: ")[0] + " failed in the object store" * (" failed: " in message)
    elif not isinstance(error, LogitLakeError):
        name, message = QueryCrashedError.__name__, f"the worker failed with {name}: {message}"
    for place in sorted({lake, str(Path(lake).resolve()) if not is_remote(lake) else lake}, key=len, reverse=True):
        message = message.replace(place, "lake")
    return json.dumps({"error": name, "message": _PATH.sub("<path>", message)[:_MESSAGE_CHARS]}).encode()


def _stream(schema: pa.Schema, batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _read_request(handle: int) -> bytes | None:
    """The payload of the one frame that comes; None at the end of the input."""
    header = _read(handle, FRAME_HEADER.size)
    if len(header) < FRAME_HEADER.size:
        return None
    data = _read(handle, FRAME_HEADER.unpack(header)[1])
    return data if len(data) == FRAME_HEADER.unpack(header)[1] else None


def _read(handle: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        with contextlib.suppress(InterruptedError):
            part = os.read(handle, size - len(data))
            if not part:
                break
            data += part
    return bytes(data)


def _write(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
