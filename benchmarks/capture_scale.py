"""How planning and committing scale, with a teacher that costs nothing: seeded made-up data, the engine `fake`.

Every sample goes the whole way: read or made, planned on disk, read back as a unit, scored, checked, encoded, committed
with its fsyncs. `text` is rendered by the chat template and tokenised; `ids` are read from a Parquet file (source
`tokens`, no messages) and are as many as the text's, sample by sample. A process that commits works at two units at a
time, as a Ray actor does. The start-up of the processes that render is counted, that of those that commit is not.
Memory is the peak of the driver's process, which plans and then hands out every unit.
"""

import itertools
import multiprocessing
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.capture_samples import vlm
from benchmarks.harness import Figure, in_own_process, median
from logitlake_schemas import CaptureSpec, CodecPolicy, DatasetIdentity
from logitlake_shared.lake import Lake
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import FakeEngineConfig, FakeSource, ImagesConfig, PlanConfig, TokensSource
from logitlake_teacher.engines import EngineSetup, identify_engine
from logitlake_teacher.engines.facts import engine_facts
from logitlake_teacher.executors import Committed
from logitlake_teacher.items import PlannedSample, Unit
from logitlake_teacher.planning import Plan, make_plan
from logitlake_teacher.planning.units_file import UnitsFile
from logitlake_teacher.worker import CaptureJob, UnitWorker

__all__ = ["memory_figures", "rate_figures"]

_CODEC = CodecPolicy(k_max=8, k_min=1)
_UNIT_TOKENS = 32_768
# The default of `executor[ray].units_in_flight`.
_UNITS_IN_FLIGHT = 2
# Texts whose lengths the ids have.
_MEASURED_TEXTS = 2000

MakeSource = Callable[[int, Path], FakeSource | TokensSource]
"""a source of so many samples, in a folder if it is one of files"""


def _text(num_samples: int, folder: Path) -> FakeSource:
    del folder  # made up as it is read
    return FakeSource(num_samples=num_samples, prompt_words=1, response_words=1)


def _ids(num_samples: int, folder: Path) -> TokensSource:
    """Random ids of as many tokens as the texts have."""
    renderer, draw = Renderer(vlm()), np.random.default_rng(0)
    texts = _plan(_text(_MEASURED_TEXTS, folder), folder / "texts", processes=1)
    samples = [item for unit in texts.units for item in unit.items if isinstance(item, PlannedSample)]
    drawn = draw.integers(0, len(samples), num_samples)
    lengths = {
        name: np.array([len(getattr(sample, f"{name}_ids")) for sample in samples], np.int32)[drawn]
        for name in ("prompt", "response")
    }
    table: dict[str, object] = {"sample_id": [f"ids-{number}" for number in range(num_samples)]}
    for name, length_N in lengths.items():
        stops = np.cumsum(length_N)
        ids = draw.integers(0, renderer.vocab_size, stops[-1], dtype=np.int32)
        ids[(ids == renderer.eos_id) | (ids == renderer.image_token_id)] = renderer.pad_id
        if name == "response":
            ids[stops - 1] = renderer.eos_id
        table |= {f"{name}_ids": _lists(ids, stops), f"{name}_lengths": _lists(length_N, np.arange(num_samples) + 1)}
    pq.write_table(pa.table(table), folder / "ids.parquet")
    return TokensSource(path=folder / "ids.parquet")


def _lists(values: npt.NDArray[np.int32], stops: npt.NDArray[np.int64]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.append(0, stops), pa.int32()), pa.array(values))


_SOURCES: dict[str, MakeSource] = {"text": _text, "ids": _ids}


def _plan(source: FakeSource | TokensSource, folder: Path, processes: int) -> Plan:
    config = PlanConfig(unit_tokens=_UNIT_TOKENS, folder=folder, processes=processes)
    facts = engine_facts(FakeEngineConfig(), vlm())
    return make_plan("samples", [source], Renderer(vlm()), facts, config, ImagesConfig())


@contextmanager
def _worker(folder: Path, dataset: DatasetIdentity) -> Iterator[UnitWorker]:
    renderer = Renderer(vlm())
    setup = EngineSetup(
        vlm(), renderer.vocab_size, renderer.eos_id, renderer.image_token_id, k=_CODEC.k_max, num_threads=1
    )
    spec = CaptureSpec(
        kind="samples",
        tokenizer=renderer.identity(),
        engine=identify_engine(FakeEngineConfig(), setup),
        codec=_CODEC,
        dataset=dataset,
    )
    Lake.create(folder / "lake").create_cache("scale", spec)
    job = CaptureJob("samples", str(folder / "lake"), "scale", FakeEngineConfig(), setup, ImagesConfig())
    worker = UnitWorker(job)
    try:
        yield worker
    finally:
        worker.close()


def _commit(worker: UnitWorker, units: Iterable[Unit]) -> None:
    """All units, some at a time; each is read when its turn comes."""
    waiting: deque[Future[Committed]] = deque()
    with ThreadPoolExecutor(_UNITS_IN_FLIGHT) as pool:
        for unit in units:
            waiting.append(pool.submit(worker.run, unit, {}))
            if len(waiting) > _UNITS_IN_FLIGHT:
                waiting.popleft().result()
        for future in waiting:
            future.result()


def rate_figures(rounds: int, quick: bool) -> list[Figure]:
    """Samples a second: planned, committed and both, in one process; and both on all cores by the wall clock."""
    cores = os.cpu_count() or 1
    figures = []
    for name, make in _SOURCES.items():
        one_process = [_rates_of_one_process(make, 5_000 if quick else 20_000) for _ in range(rounds)]
        planned, committed, both, of_cpu = (median([rates[place] for rates in one_process]) for place in range(4))
        together = median([_rate_of_all_cores(make, 40_000 if quick else 400_000, cores) for _ in range(rounds)])
        figures += [
            Figure(f"fake samples planned, {name}, one process", planned, "samples / s"),
            Figure(f"fake samples committed, {name}, one process", committed, "samples / s"),
            Figure(f"fake samples planned and committed, {name}, one process", both, "samples / s"),
            Figure(f"fake samples planned and committed, {name}", of_cpu, "samples / s of CPU"),
            Figure(
                f"fake samples planned and committed, {name}, {cores} cores",
                together,
                "samples / s",
                ">= 20000",
                together >= 20_000,
            ),
        ]
    return figures


def _rates_of_one_process(make: MakeSource, num_samples: int) -> tuple[float, float, float, float]:
    """By the wall clock: planned, committed, both. By CPU time, which a busy machine stretches less: both."""
    with tempfile.TemporaryDirectory() as name:
        source = make(num_samples, Path(name))
        start, cpu_start = time.perf_counter(), time.process_time()
        plan = _plan(source, Path(name) / "plans", processes=1)
        planning, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        with _worker(Path(name), plan.dataset) as worker:
            start, cpu_start = time.perf_counter(), time.process_time()
            _commit(worker, plan.units)
            committing, cpu = time.perf_counter() - start, cpu + time.process_time() - cpu_start
    seconds = planning, committing, planning + committing, cpu
    planned, committed, both, of_cpu = (num_samples / each for each in seconds)
    return planned, committed, both, of_cpu


def _rate_of_all_cores(make: MakeSource, num_samples: int, cores: int) -> float:
    """Planning with a rendering process a core, then a committing process a core, each with every so-manieth unit."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        source = make(num_samples, Path(name))
        start = time.perf_counter()
        plan = _plan(source, Path(name) / "plans", processes=cores)
        planning = time.perf_counter() - start
        barrier = context.Barrier(cores + 1)
        workers = [
            context.Process(target=_commit_share, args=(Path(name), plan.dataset, place, cores, barrier))
            for place in range(cores)
        ]
        for worker in workers:
            worker.start()
        barrier.wait()  # everything is imported, every engine is there
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        committing = time.perf_counter() - start
        assert all(worker.exitcode == 0 for worker in workers)
        assert len(Lake.open(Path(name) / "lake").cache("scale").committed_units()) == len(plan.units)
    return num_samples / (planning + committing)


def _commit_share(folder: Path, dataset: DatasetIdentity, place: int, cores: int, barrier: Barrier) -> None:
    (plan_folder,) = (folder / "plans").iterdir()
    units = UnitsFile(plan_folder, "samples")
    with _worker(folder, dataset) as worker:
        barrier.wait()
        _commit(worker, itertools.islice(units, place, None, cores))


def memory_figures(quick: bool) -> list[Figure]:
    """Peak memory of a driver that plans so many samples and hands out every unit."""
    few, many = 10_000, 100_000 if quick else 1_000_000
    small, large = in_own_process(_peak_mib, few), in_own_process(_peak_mib, many)
    growth = large / small
    return [
        Figure(f"driver's peak memory, {few:,} samples", small, "MiB"),
        Figure(f"driver's peak memory, {many:,} samples", large, "MiB"),
        Figure(f"driver's peak memory, {many:,} over {few:,} samples", growth, "x", "<= 1.5", growth <= 1.5),
    ]


def _peak_mib(num_samples: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        # In this process: a pool's workers have memory of their own, which does not grow either.
        plan = _plan(_text(num_samples, Path(name)), Path(name) / "plans", processes=1)
        handed_out = sum(len(unit.items) for unit in plan.units)
        assert handed_out == num_samples
    # Not `ru_maxrss`: that begins with the memory of the process that this one was started from.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1024
