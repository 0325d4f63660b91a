"""SQL over a lake of 10^6 tokens: what the usual questions cost, and what they would cost elsewhere.

    python -m benchmarks.sql [--json] [--quick]

The lake is cut as a capture cuts it by default (8,192 tokens a unit). Each question is asked of
  lake    the view `tokens`, through the command's own `Catalog`
  flat    a Parquet table of one row a token that holds nothing but the scalars, cut into the same units; beside it
          the same table as one file
  nested  the layout that most caches have: lists of lists of all 32 captured entries, and no scalars beside them
in turns, and the medians of the process's CPU time are compared. The last two are read by DuckDB itself.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Figure, publish
from benchmarks.made_lake import FOLDER, made_lake, make_rows, make_spec, make_unit
from logitlake_schemas import FORMAT_VERSION
from logitlake_shared.catalog import Catalog, publish_catalog
from logitlake_shared.lake import Lake
from logitlake_shared.topk import TeacherRows

NUM_UNITS, SAMPLES_A_UNIT, TOKENS_A_SAMPLE = 122, 41, 200
NUM_TOKENS = NUM_UNITS * SAMPLES_A_UNIT * TOKENS_A_SAMPLE

REACH_MS = 40
REACH_FLAT = 1.5
REACH_NESTED = 20
REACH_FIRST_S = 1.0

# Of the lake and of the flat tables; of the nested lists.
QUESTIONS = {
    "mean entropy per task": (
        "SELECT task, avg(entropy) FROM {table} GROUP BY task",
        "SELECT task, avg(-list_sum(list_transform(logprobs, lambda x: exp(x) * x))) "
        "FROM (SELECT task, unnest(topk_logprobs) AS logprobs FROM {table}) GROUP BY task",
    ),
    "teacher top-1 ≠ label": (
        "SELECT avg((label_rank <> 1)::INTEGER) FROM {table}",
        "SELECT avg((ids[1] <> label)::INTEGER) "
        "FROM (SELECT unnest(topk_ids) AS ids, unnest(response_ids) AS label FROM {table})",
    ),
    "mass covered": (
        "SELECT 1 - avg(exp(log_tail_mass)) FROM {table}",
        "SELECT avg(list_sum(list_transform(logprobs, lambda x: exp(x)))) "
        "FROM (SELECT unnest(topk_logprobs) AS logprobs FROM {table})",
    ),
}


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--quick", is_flag=True, help="Fewer repetitions.")
def main(as_json: bool, quick: bool) -> None:
    """Measures and prints."""
    folder = FOLDER / f"sql-lake-{FORMAT_VERSION}-{NUM_TOKENS}"
    lake = Lake.open(made_lake(folder, _build))
    flat, flat_one, nested = _other_layouts(lake, FOLDER / f"sql-tables-{FORMAT_VERSION}-{NUM_TOKENS}")
    figures = _first_answers(folder, 2 if quick else 5)
    with Catalog(lake) as catalog, duckdb.connect() as plain:
        for name, (question, of_lists) in QUESTIONS.items():
            asked: dict[str, Callable[[], object]] = {
                "lake": lambda q=question: catalog.query(q.format(table="tokens")),
                "flat": lambda q=question: plain.sql(q.format(table=flat)).fetchall(),
                "flat_one": lambda q=question: plain.sql(q.format(table=flat_one)).fetchall(),
                "nested": lambda q=of_lists: plain.sql(q.format(table=nested)).fetchall(),
            }
            figures += _figures(name, _cpu_seconds(asked, 3 if quick else 9))
    figures += _checksums(lake, 3 if quick else 9)
    publish("sql", figures, as_json)


def _figures(name: str, cpu: dict[str, float]) -> list[Figure]:
    def against(other: str) -> float:
        return cpu["lake"] / cpu[other]

    faster = 1 / against("nested")
    return [
        Figure(name, 1e3 * cpu["lake"], "ms CPU", f"<= {REACH_MS}", 1e3 * cpu["lake"] <= REACH_MS),
        Figure(
            "  against a flat table of the same units",
            against("flat"),
            "x",
            f"<= {REACH_FLAT}",
            against("flat") <= REACH_FLAT,
        ),
        Figure("  against a flat table in one file", against("flat_one"), "x"),
        Figure("  nested lists against it", faster, "x", f">= {REACH_NESTED}", faster >= REACH_NESTED),
    ]


def _first_answers(folder: Path, times: int) -> list[Figure]:
    """A whole `logitlake sql` process."""
    question = QUESTIONS["mean entropy per task"][0].format(table="tokens")
    command = [str(Path(sys.executable).with_name("logitlake")), "sql", str(folder), question]
    walls, cpus = [], []
    for _ in range(times):
        start, spent = time.perf_counter(), _children_cpu_s()
        subprocess.run(command, check=True, capture_output=True)
        walls.append(time.perf_counter() - start)
        cpus.append(_children_cpu_s() - spent)
    cpu = statistics.median(cpus)
    return [
        Figure("`logitlake sql`, process start to end", cpu, "s CPU", f"< {REACH_FIRST_S}", cpu < REACH_FIRST_S),
        Figure("  on the clock, which other work on the machine slows", statistics.median(walls), "s"),
    ]


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _checksums(lake: Lake, times: int) -> list[Figure]:
    """What verifying the checksums of the pages costs, with all shards open and in the page cache."""
    paths = lake.store.names("caches/main/shards")
    files = {
        verified: [
            pq.ParquetFile(Path(lake.store.uri) / path, page_checksum_verification=verified == "with") for path in paths
        ]
        for verified in ("with", "without")
    }
    asked = {
        verified: lambda opened=opened: [file.read(["task", "entropy"], use_threads=False) for file in opened]
        for verified, opened in files.items()
    }
    cpu = _cpu_seconds(asked, times)
    return [Figure("reading with page checksums verified, against without", cpu["with"] / cpu["without"], "x")]


def _cpu_seconds(asked: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """The median of each, all asked in turns; one round before warms up."""
    spent: dict[str, list[float]] = {name: [] for name in asked}
    for round_number in range(times + 1):
        for name, ask in asked.items():
            start = time.process_time()
            ask()
            if round_number:
                spent[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in spent.items()}


def _build(lake: Lake) -> None:
    spec = make_spec(NUM_UNITS * SAMPLES_A_UNIT, unit_tokens=8192)
    cache = lake.create_cache("main", spec)
    for number in range(NUM_UNITS):
        cache.publish_unit(make_unit(number, SAMPLES_A_UNIT, TOKENS_A_SAMPLE, spec.codec))
    cache.snapshot()
    publish_catalog(lake)


def _other_layouts(lake: Lake, folder: Path) -> tuple[str, str, str]:
    """The same tokens laid out otherwise, as what DuckDB may select from; made when they are not there."""
    if not folder.is_dir():
        building = folder.with_name(f".{folder.name}.building")
        for name in ("flat", "nested"):
            (building / name).mkdir(parents=True, exist_ok=True)
        cache, flats = lake.cache("main"), []
        for number, commit in enumerate(cache.open_snapshot().commits):
            (entry,) = commit.shards
            rows, captured = cache.read(entry), make_rows(number, entry.tokens)
            flats.append(_flat(rows))
            pq.write_table(flats[-1], building / "flat" / f"{commit.unit}.parquet", compression="zstd")
            pq.write_table(_nested(rows, captured), building / "nested" / f"{commit.unit}.parquet", compression="zstd")
        pq.write_table(pa.concat_tables(flats), building / "flat.parquet", compression="zstd")
        building.rename(folder)
    return (
        f"read_parquet('{folder}/flat/*')",
        f"read_parquet('{folder}/flat.parquet')",
        f"read_parquet('{folder}/nested/*')",
    )


def _flat(rows: pa.Table) -> pa.Table:
    lengths = [len(ids) for ids in rows.column("response_ids")]
    names = ("entropy", "label_rank", "log_tail_mass")
    scalars = {name: rows.column(name).combine_chunks().flatten() for name in names}
    return pa.table({"task": rows.column("task").take(np.repeat(np.arange(len(lengths)), lengths)), **scalars})


def _nested(rows: pa.Table, captured: TeacherRows) -> pa.Table:
    tokens = rows.column("response_ids").combine_chunks()
    num_tokens, k = captured.topk_ids_TK.shape

    def nested(values: npt.NDArray[Any]) -> pa.Array:
        entries = np.arange(0, num_tokens * k + 1, k, dtype=np.int32)
        return pa.ListArray.from_arrays(tokens.offsets, pa.ListArray.from_arrays(entries, values.reshape(-1)))

    return pa.table(
        {
            "task": rows.column("task"),
            "response_ids": tokens,
            "topk_ids": nested(captured.topk_ids_TK),
            "topk_logprobs": nested(captured.topk_logprobs_TK),
        }
    )


if __name__ == "__main__":
    main()
