"""What a lake over HTTP costs over the lake itself, and whether hostile questions are felt by anybody else.

    python -m benchmarks.service [--json] [--quick]

The service is a process of its own, over a lake of made-up samples. SQL: the median time of a question, beside the
same question in this process (a catalog opened for it, as the service does), in turns. Mixed: 200 questions, 16 at a
time, every tenth hostile; nothing that should be answered may fail, and `/readyz` is asked all the while. Files: a
shard, beside the same file from `python -m http.server`, in turns. Jobs: pages of a list of very many, and very many
who listen to the events of one.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import httpx

from benchmarks.harness import Figure, interleaved, median, publish
from benchmarks.made_lake import made_lake, make_spec, make_unit
from benchmarks.service_jobs import event_figures, fill_jobs, list_figures
from logitlake_schemas import CodecPolicy
from logitlake_shared.catalog import open_catalog, publish_catalog
from logitlake_shared.lake import Lake

__all__ = ["figures"]

_QUESTION = "SELECT task, count(*) AS n, avg(entropy) AS entropy FROM tokens GROUP BY task ORDER BY task"
_QUESTIONS = (
    _QUESTION,
    "SELECT count(*) FROM samples",
    "SELECT * FROM sample_index ORDER BY sample_id LIMIT 20",
    "SELECT k, count(*) FROM tokens GROUP BY k",
    "SELECT cache, rows, tokens FROM caches",
)
_HOSTILE = (
    "SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))",
    "SELECT length(repeat('x', 3000000000))",
    "COPY (SELECT 1) TO '/tmp/x'",
    "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b",
)
_CONCURRENT, _HOSTILE_EVERY = 16, 10
_UNIT_SAMPLES, _TOKENS = 250, 60
_TIMEOUT_S = 120
_CHUNK = 2**20


def _fill(lake: Lake, num_units: int) -> None:
    cache = lake.create_cache("main", make_spec(num_units * _UNIT_SAMPLES, _UNIT_SAMPLES * _TOKENS))
    for number in range(num_units):
        cache.publish_unit(make_unit(number, _UNIT_SAMPLES, _TOKENS, CodecPolicy()))
    cache.snapshot()
    publish_catalog(lake)


@contextmanager
def _process(*command: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _service(lake: Path, folder: Path) -> Iterator[str]:
    config = folder / "serve.toml"
    config.write_text(
        f'lake = "{lake}"\n[service]\nport = 0\nrequests_per_minute = 1000000\n'
        f"[sql]\nnum_waiting = {2 * _CONCURRENT}\ntimeout_s = 60.0\n"
        f'[jobs]\nfolder = "{folder}/jobs"\ndata_roots = ["/"]\n'
    )
    with _process(sys.executable, "-m", "logitlake_teacher.cli", "serve", str(config)) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split("listens on ")[1].split()[0]


@contextmanager
def _plain_server(folder: Path) -> Iterator[str]:
    command = (sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--protocol", "HTTP/1.1")
    with _process(*command, cwd=folder) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().split('port ')[1].split()[0]}"


def _ask(client: httpx.Client, sql: str, **more: int) -> httpx.Response:
    return client.post("/v1/sql", json={"sql": sql, **more})


def _sql_figures(client: httpx.Client, lake: Path, rounds: int) -> list[Figure]:
    def in_process() -> None:
        with open_catalog(lake) as catalog:
            catalog.query(_QUESTION)

    with open_catalog(lake) as opened:
        seconds = interleaved(
            {
                "http": lambda: _ask(client, _QUESTION).raise_for_status(),
                "in process": in_process,
                "open": lambda: opened.query(_QUESTION),
            },
            rounds,
        )
    http, here = median(seconds["http"]), median(seconds["in process"])
    bound = 1.5 * here + 0.02
    return [
        Figure(
            "SQL over HTTP, median", 1000 * http, "ms", f"<= {1000 * bound:.0f}, 1.5 x in process + 20", http <= bound
        ),
        Figure("in process, a catalog opened for it", 1000 * here, "ms"),
        Figure("in process, the catalog open already", 1000 * median(seconds["open"]), "ms"),
    ]


def _mixed_figures(client: httpx.Client, num_questions: int) -> list[Figure]:
    waits: list[float] = []
    ended = threading.Event()

    def probe() -> None:
        while not ended.is_set():
            started = time.perf_counter()
            client.get("/readyz").raise_for_status()
            waits.append(time.perf_counter() - started)
            ended.wait(0.02)

    def one(number: int) -> tuple[bool, int]:
        is_hostile = number % _HOSTILE_EVERY == 0
        if is_hostile:
            sql = _HOSTILE[number // _HOSTILE_EVERY % len(_HOSTILE)]
            return True, _ask(client, sql, timeout_ms=2000).status_code
        return False, _ask(client, _QUESTIONS[number % len(_QUESTIONS)], timeout_ms=60_000).status_code

    prober = threading.Thread(target=probe)
    prober.start()
    started = time.perf_counter()
    with ThreadPoolExecutor(_CONCURRENT) as pool:
        answers = list(pool.map(one, range(num_questions)))
    seconds = time.perf_counter() - started
    ended.set()
    prober.join()
    failed = sum(status != 200 for is_hostile, status in answers if not is_hostile)
    let_through = sum(status == 200 for is_hostile, status in answers if is_hostile)
    late = 1000 * sorted(waits)[int(0.99 * len(waits))]
    return [
        Figure("mixed: legitimate questions that failed", failed, "", "0", failed == 0),
        Figure("mixed: hostile questions that were answered", let_through, "", "0", let_through == 0),
        Figure("mixed: /readyz, 99th percentile", late, "ms", "<= 100", late <= 100),
        Figure("mixed: questions", num_questions / seconds, "/ s"),
    ]


def _file_figures(service: str, lake: Path, name: str, rounds: int) -> list[Figure]:
    size = (lake / name).stat().st_size

    def read(url: str) -> None:
        with httpx.stream("GET", url, timeout=_TIMEOUT_S) as answer:
            assert sum(len(piece) for piece in answer.iter_raw(_CHUNK)) == size

    with _plain_server(lake) as plain:
        seconds = interleaved(
            {"ours": lambda: read(f"{service}/v1/files/{name}"), "plain": lambda: read(f"{plain}/{name}")}, rounds
        )
    ratio = median([p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True)])
    return [
        Figure("a shard's bytes a second, over python -m http.server", ratio, "x", ">= 0.7", ratio >= 0.7),
        Figure("a shard", size / median(seconds["ours"]) / 1e6, "MB / s"),
    ]


def figures(quick: bool) -> list[Figure]:
    """All figures of the module."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        lake = made_lake(folder / "lake", lambda made: _fill(made, 4 if quick else 40))
        shard = "caches/main/shards/999999-large-0000000000000000.parquet"
        (lake / shard).write_bytes(os.urandom(2**20) * (20 if quick else 200))
        num_jobs, num_listeners, num_samples = (1000, 50, 200) if quick else (100_000, 1000, 600)
        fill_jobs(folder / "jobs", num_jobs)
        service = stack.enter_context(_service(lake, folder))
        client = stack.enter_context(httpx.Client(base_url=service, timeout=_TIMEOUT_S, limits=httpx.Limits()))
        _ask(client, _QUESTION).raise_for_status()
        return [
            *_sql_figures(client, lake, 3 if quick else 15),
            *_mixed_figures(client, 40 if quick else 200),
            *_file_figures(service, lake, shard, 2 if quick else 7),
            *list_figures(client, num_jobs),
            *event_figures(service, num_listeners, num_samples),
        ]


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--quick", is_flag=True, help="A small lake, few rounds.")
def main(as_json: bool, quick: bool) -> None:
    publish("service", figures(quick), as_json)


if __name__ == "__main__":
    main()
