"""How planning and committing scale, with a teacher that costs nothing: seeded made-up data, the engine `fake`.

Every sample goes the whole way: made, rendered by the chat template, tokenised, planned on disk, read back as a unit,
scored, checked, encoded, committed with its fsyncs. The start-up of the processes that render is counted, that of those
that commit is not. Memory is the peak of the driver's process, which plans and then hands out every unit.
"""

import itertools
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

from benchmarks.capture_samples import vlm
from benchmarks.harness import Figure, in_own_process, median
from logitlake_schemas import CaptureSpec, CodecPolicy, DatasetIdentity
from logitlake_shared.lake import Lake
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import FakeEngineConfig, FakeSource, ImagesConfig, PlanConfig
from logitlake_teacher.engines import EngineSetup, identify_engine
from logitlake_teacher.engines.facts import engine_facts
from logitlake_teacher.planning import Plan, make_plan
from logitlake_teacher.planning.units_file import UnitsFile
from logitlake_teacher.worker import CaptureJob, UnitWorker

__all__ = ["memory_figures", "rate_figures"]

_CODEC = CodecPolicy(k_max=8, k_min=1)
_UNIT_TOKENS = 32_768


def _plan(num_samples: int, folder: Path, processes: int) -> Plan:
    source = FakeSource(num_samples=num_samples, prompt_words=1, response_words=1)
    config = PlanConfig(unit_tokens=_UNIT_TOKENS, folder=folder / "plans", processes=processes)
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


def rate_figures(rounds: int, quick: bool) -> list[Figure]:
    """Samples a second: planned, committed and both, on one core; and both on all cores by the wall clock."""
    one_core = [_rates_of_one_core(5_000 if quick else 20_000) for _ in range(rounds)]
    planned, committed, both = (median([rates[place] for rates in one_core]) for place in range(3))
    cores = os.cpu_count() or 1
    together = median([_rate_of_all_cores(40_000 if quick else 400_000, cores) for _ in range(rounds)])
    return [
        Figure("fake samples planned, one core", planned, "samples / s"),
        Figure("fake samples committed, one core", committed, "samples / s"),
        Figure("fake samples planned and committed, one core", both, "samples / s"),
        Figure(
            f"fake samples planned and committed, {cores} cores",
            together,
            "samples / s",
            ">= 20000",
            together >= 20_000,
        ),
    ]


def _rates_of_one_core(num_samples: int) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        plan = _plan(num_samples, Path(name), processes=1)
        planning = time.perf_counter() - start
        with _worker(Path(name), plan.dataset) as worker:
            start = time.perf_counter()
            for unit in plan.units:
                worker.run(unit, {})
            committing = time.perf_counter() - start
    return num_samples / planning, num_samples / committing, num_samples / (planning + committing)


def _rate_of_all_cores(num_samples: int, cores: int) -> float:
    """Planning with a rendering process a core, then a committing process a core, each with every so-manieth unit."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        plan = _plan(num_samples, Path(name), processes=cores)
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
        for unit in itertools.islice(units, place, None, cores):
            worker.run(unit, {})


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
        plan = _plan(num_samples, Path(name), processes=1)
        handed_out = sum(len(unit.items) for unit in plan.units)
        assert handed_out == num_samples
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
