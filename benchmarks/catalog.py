"""The catalog at its full size: 10^7 samples in 10^4 shards. Build, size, look-up, resume.

    python -m benchmarks.catalog [--json] [--quick]

The records of the big lake are real, its shards are not (one is), and the index rows are generated: what is measured is
everything but the reading of shards. That is measured on a lake of small real ones. Look-ups run in a process of their
own that has asked one question before, as an impatient person's second question. `--quick` has 10^6 samples.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa

from benchmarks.harness import Figure, publish
from benchmarks.made_lake import FOLDER, made_lake, make_spec, make_unit
from logitlake_schemas import CommitRecord, ShardEntry, Snapshot, layout, sha256_hex
from logitlake_shared.catalog.index_file import write_index_file
from logitlake_shared.catalog.tables import INDEX_SCHEMA, index_batches, pin
from logitlake_shared.errors import LakeError
from logitlake_shared.lake import Cache, Lake

NUM_SHARDS = 10_000
REAL_SHARD = 5_000
ROWS_A_SHARD, ROWS_A_SHARD_QUICK = 1_000, 100
NUM_SMALL, NUM_SMALL_QUICK = 2_000, 400

REACH_LOOK_UP_MS = 50
REACH_SHARDS_A_SECOND = 4_000

_INDEXED = ["sample_id", "task", "source", "split", "response_lengths"]
_TASKS = np.array(["caption", "reading", "counting", "chart", "chat", "code", "ocr", "vqa"])

# A process that opens the lake, asks one question, and then times what is measured.
CHILD = """
import json, sys, time
from logitlake_shared.catalog import open_catalog
times = {}
def timed(name, ask):
    start = time.perf_counter()
    answer = ask()
    times[name] = time.perf_counter() - start
    return answer
sample_id = sys.argv[2]
catalog = timed("open", lambda: open_catalog(sys.argv[1]))
timed("first", lambda: catalog.query("SELECT count(*) FROM caches"))
if sys.argv[3] == "find":
    assert len(timed("find", lambda: catalog.find(sample_id))) == 1
else:
    question = f"SELECT task, len(response_ids) FROM samples WHERE sample_id = '{sample_id}'"
    assert timed("select", lambda: catalog.query(question)).num_rows == 1
    timed("again", lambda: catalog.query(question))
catalog.close()
print(json.dumps(times))
"""


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--quick", is_flag=True, help="A tenth of the samples.")
def main(as_json: bool, quick: bool) -> None:
    """Measures and prints."""
    rows_a_shard = ROWS_A_SHARD_QUICK if quick else ROWS_A_SHARD
    num_rows = NUM_SHARDS * rows_a_shard
    folder = made_lake(FOLDER / f"catalog-lake-{rows_a_shard}", lambda lake: _build_records(lake, rows_a_shard))
    lake = Lake.open(folder)
    figures = _building(lake, rows_a_shard, num_rows)
    figures += _looking_up(folder, 3 if quick else 7)
    figures += _resuming(lake.cache("main"))
    figures += _reading_footers(NUM_SMALL_QUICK if quick else NUM_SMALL)
    publish("catalog", figures, as_json)


def _building(lake: Lake, rows_a_shard: int, num_rows: int) -> list[Figure]:
    """Writes the file from scratch, publishes it, and writes it once more with one unit that came since."""
    scratch = FOLDER / "catalog-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    pinned = pin(lake)

    def generate() -> None:
        for _ in _index_rows([(pinned[0].cache, e) for c in pinned[0].snapshot.commits for e in c.shards], _ignore):
            pass

    made_s = _cpu_s(generate)
    build_s = _cpu_s(lambda: write_index_file(scratch / "new.duckdb", pinned, None, _index_rows)) - made_s
    data = (scratch / "new.duckdb").read_bytes()
    for name in lake.store.names(layout.catalog_prefix()):
        lake.store.delete(name)
    lake.store.put_new(layout.catalog_path(1), data)
    cache = pinned[0].cache
    grown = _snapshot(cache, [*cache.open_snapshot(1).commits, _fake_commit(cache, NUM_SHARDS, rows_a_shard)], 2)
    lake.store.put_new(layout.snapshot_path("main", 2), grown.to_bytes())
    grown_pin = pin(lake)
    grow_s = _cpu_s(lambda: write_index_file(scratch / "grown.duckdb", grown_pin, scratch / "new.duckdb", _index_rows))
    lake.store.delete(layout.snapshot_path("main", 2))
    shutil.rmtree(scratch)
    return [
        Figure(f"building the catalog of {num_rows:,} samples", build_s, "s CPU"),
        Figure("  rows a second", num_rows / build_s, "1/s CPU"),
        Figure("  size of the file", len(data) / 2**20, "MiB"),
        Figure("  bytes a sample", len(data) / num_rows, "B"),
        Figure("adding one unit to it", grow_s, "s CPU"),
    ]


def _looking_up(folder: Path, times: int) -> list[Figure]:
    sample_id = f"sample-{REAL_SHARD:06d}-0003"
    walls: dict[str, list[float]] = {}
    for _ in range(times):
        for how in ("find", "select"):
            command = [sys.executable, "-c", CHILD, str(folder), sample_id, how]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            for name, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                walls.setdefault(name, []).append(1e3 * seconds)
    wall = {name: statistics.median(values) for name, values in walls.items()}
    reach = f"<= {REACH_LOOK_UP_MS}"
    return [
        Figure(f"opening a lake of {NUM_SHARDS:,} shards", wall["open"], "ms"),
        Figure("  a first question (`caches`)", wall["first"], "ms"),
        Figure("  second: one sample's place (`find`)", wall["find"], "ms", reach, wall["find"] <= REACH_LOOK_UP_MS),
        Figure("  second: one sample by SQL", wall["select"], "ms", reach, wall["select"] <= REACH_LOOK_UP_MS),
        Figure("  the same SQL again", wall["again"], "ms"),
    ]


def _resuming(cache: Cache) -> list[Figure]:
    planned = [f"{number:06d}-made" for number in range(NUM_SHARDS)]
    walls = []
    for _ in range(5):
        start = time.perf_counter()
        committed = cache.committed_units()
        left = [unit for unit in planned if unit not in committed]
        walls.append(time.perf_counter() - start)
    assert not left
    return [Figure(f"what is left of a plan of {NUM_SHARDS:,} units", 1e3 * statistics.median(walls), "ms")]


def _reading_footers(num_shards: int) -> list[Figure]:
    """Index rows from the footers and the small columns of real shards."""
    lake = Lake.open(made_lake(FOLDER / f"catalog-small-{num_shards}", lambda lake: _build_small(lake, num_shards)))
    cache = lake.cache("main")
    work = [(cache, entry) for commit in cache.open_snapshot().commits for entry in commit.shards]

    def read(columns: list[str]) -> None:
        for cache, entry in work:
            with closing(cache.open(entry, verify=False)) as shard:
                if columns:
                    shard.read(columns)

    def rate(ask: Callable[[], object]) -> float:
        return num_shards / statistics.median(_cpu_s(ask) for _ in range(3))

    footers, rebuilt = rate(lambda: read([])), rate(lambda: list(index_batches(work, _ignore)))
    least = REACH_SHARDS_A_SECOND
    reach = f">= {least:,}"
    unit = "shards/s CPU"
    return [
        Figure("footers read and verified", footers, unit, reach, footers >= least),
        Figure("  rebuild: footers and each row's id, task, length", rebuilt, unit, reach, rebuilt >= least),
        Figure("  its limit: opening and reading the ids alone", rate(lambda: read(["sample_id"])), unit),
        Figure("  its limit: opening and reading the five columns", rate(lambda: read(_INDEXED)), unit),
    ]


def _build_records(lake: Lake, rows_a_shard: int) -> None:
    """Commit records and a snapshot of shards that are not there, but for one."""
    spec = make_spec(NUM_SHARDS * rows_a_shard, unit_tokens=8192)
    cache = lake.create_cache("main", spec)
    commits = [
        cache.publish_unit(make_unit(number, 40, 200, spec.codec))
        if number == REAL_SHARD
        else _fake_commit(cache, number, rows_a_shard)
        for number in range(NUM_SHARDS)
    ]
    assert lake.store.root is not None
    for commit in commits:
        # Not through the store: ten thousand syncs would take minutes and measure nothing.
        (lake.store.root / layout.commit_path("main", commit.unit)).write_bytes(commit.to_bytes())
    lake.store.put_new(layout.snapshot_path("main", 1), _snapshot(cache, commits, 1).to_bytes())


def _build_small(lake: Lake, num_shards: int) -> None:
    spec = make_spec(num_shards * 40, unit_tokens=320)
    cache = lake.create_cache("main", spec)
    for number in range(num_shards):
        cache.publish_unit(make_unit(number, 40, 8, spec.codec))
    cache.snapshot()


def _snapshot(cache: Cache, commits: Sequence[CommitRecord], number: int) -> Snapshot:
    return Snapshot(cache="main", number=number, spec_fingerprint=cache.fingerprint, commits=tuple(commits))


def _fake_commit(cache: Cache, number: int, rows: int) -> CommitRecord:
    unit = f"{number:06d}-made"
    digest = sha256_hex(unit.encode())
    entry = ShardEntry(
        kind="samples",
        path=layout.shard_path("main", unit, digest),
        sha256=digest,
        bytes=250_000,
        footer_sha256=digest,
        footer_bytes=4_000,
        rows=rows,
        tokens=8_192,
    )
    return CommitRecord(
        cache="main",
        unit=unit,
        spec_fingerprint=cache.fingerprint,
        shards=(entry,),
        errors=(),
        stored_error=None,
    )


def _index_rows(
    unknown: Sequence[tuple[Cache, ShardEntry]], failed: Callable[[LakeError], None]
) -> Iterator[pa.RecordBatch]:
    """Generated index rows of shards that are not there; of the real one its own."""
    for cache, entry in unknown:
        number = int(layout.unit_of_shard(entry.path).split("-")[0])
        if number == REAL_SHARD:
            yield from index_batches([(cache, entry)], failed)
            continue
        places = np.arange(entry.rows, dtype=np.int32)
        columns: list[Any] = [
            pa.repeat(entry.path, entry.rows),
            [f"sample-{number:06d}-{place:04d}" for place in places],
            np.zeros(entry.rows, np.int32),
            places,
            _TASKS[(places + number) % len(_TASKS)],
            pa.repeat("made", entry.rows),
            pa.repeat("train", entry.rows),
            (places * 7 % 200 + 1).astype(np.int32),
        ]
        yield pa.record_batch([pa.array(column) for column in columns], schema=INDEX_SCHEMA)


def _cpu_s(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _ignore(_: LakeError) -> None:
    """The error is raised, too."""


if __name__ == "__main__":
    main()
