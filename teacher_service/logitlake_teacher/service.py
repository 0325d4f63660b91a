"""From a configuration to a finished cache: prepare, run what is left, take a snapshot.

Preparing reads and checks all data and says who the teacher is, without loading it; so a finished capture is
recognised, and a capture that does not fit its cache refused, before Ray or an engine starts.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from logitlake_schemas import CacheKind, CaptureSpec, Codec, CodecPolicy, CommitRecord, SampledPolicy
from logitlake_shared.cache_figures import CacheFigures, cache_figures
from logitlake_shared.catalog import publish_catalog
from logitlake_shared.errors import ConfigError, DataError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import CaptureConfig, InlineExecutorConfig, PairsConfig
from logitlake_teacher.engines import EngineSetup, identify_engine
from logitlake_teacher.executors import build_executor
from logitlake_teacher.items import Unit
from logitlake_teacher.pairs import PAIRS_CODEC
from logitlake_teacher.planner import Plan, plan_pairs, plan_samples
from logitlake_teacher.worker import CaptureJob, UnitWorker

__all__ = [
    "Prepared",
    "Summary",
    "check_error_rate",
    "open_cache",
    "prepare",
    "remaining_units",
    "run_units",
    "summarise",
]

OnCommit = Callable[[Unit, CommitRecord], None]


@dataclass(frozen=True)
class Prepared:
    """A capture that is ready to run."""

    kind: CacheKind
    plan: Plan
    spec: CaptureSpec
    setup: EngineSetup


@dataclass(frozen=True)
class Summary:
    """What a cache holds, and why it does not hold more."""

    figures: CacheFigures
    errors: dict[str, int]
    """number of items that could not be captured, by code"""
    first_error: str | None


def prepare(config: CaptureConfig | PairsConfig) -> Prepared:
    """Plans the data and identifies the teacher. Raises `ConfigError`, `DataError`, `EngineError`."""
    renderer = Renderer(config.teacher.model_dir)
    if isinstance(config, CaptureConfig):
        kind: CacheKind = "samples"
        codec: Codec = config.codec
        if isinstance(codec, CodecPolicy) and codec.k_max > renderer.vocab_size:
            raise ConfigError(
                f"codec.k_max is {codec.k_max}, but the teacher's tokenizer has {renderer.vocab_size} tokens; lower it"
            )
        plan = plan_samples(config.data, renderer, config.plan.unit_tokens)
    else:
        kind, codec = "pairs", PAIRS_CODEC
        plan = plan_pairs(config.data, renderer, config.plan.unit_tokens)
    executor = config.executor
    setup = EngineSetup(
        model_dir=config.teacher.model_dir.resolve(),
        vocab_size=renderer.vocab_size,
        eos_id=renderer.eos_id,
        image_token_id=renderer.image_token_id,
        k=codec.k_max if isinstance(codec, CodecPolicy) else 1,
        sampled=codec if isinstance(codec, SampledPolicy) else None,
        num_threads=(executor.num_threads if isinstance(executor, InlineExecutorConfig) else executor.cpus_per_actor),
    )
    spec = CaptureSpec(
        kind=kind,
        tokenizer=renderer.identity(),
        engine=identify_engine(config.engine, setup),
        codec=codec,
        dataset=plan.dataset,
    )
    return Prepared(kind, plan, spec, setup)


def open_cache(config: CaptureConfig | PairsConfig, prepared: Prepared) -> Cache:
    """The cache of this capture, made if it is not there. Raises `FingerprintMismatchError` if it is another's."""
    return Lake.create(config.lake.uri).create_cache(config.lake.cache, prepared.spec)


def remaining_units(prepared: Prepared, cache: Cache) -> list[Unit]:
    """The plan minus the commit records."""
    committed = cache.committed_units()
    return [unit for unit in prepared.plan.units if unit.unit_id not in committed]


def run_units(config: CaptureConfig | PairsConfig, prepared: Prepared, units: list[Unit], on_commit: OnCommit) -> float:
    """Captures the units; `on_commit` is called for each as it is committed. Returns the seconds it took."""
    job = CaptureJob(prepared.kind, _absolute(config.lake.uri), config.lake.cache, config.engine, prepared.setup)
    by_id = {unit.unit_id: unit for unit in units}
    start = time.monotonic()
    for record in build_executor(config.executor).run(units, partial(UnitWorker, job)):
        on_commit(by_id[record.unit], record)
    return time.monotonic() - start


def summarise(cache: Cache) -> Summary:
    """Takes a snapshot and publishes the catalog (the newest again if nothing came since); adds up what they hold."""
    snapshot = cache.snapshot()
    publish_catalog(Lake(cache.store))
    errors = [error for commit in snapshot.commits for error in commit.errors]
    first = next((f"{error.sample_id!r}: {error.code}: {error.message}" for error in errors), None)
    return Summary(cache_figures(cache, snapshot), dict(Counter(error.code for error in errors)), first)


def check_error_rate(summary: Summary, max_error_rate: float) -> None:
    """Raises `DataError` when a greater share of the items failed than the configuration allows."""
    figures = summary.figures
    total = figures.rows + figures.errors
    if figures.errors > max_error_rate * total:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(summary.errors.items()))
        raise DataError(
            f"{figures.errors} of {total} items could not be captured ({codes}), max_error_rate is "
            f"{max_error_rate}; the first is {summary.first_error}. The other {figures.rows} are committed in snapshot "
            f"{figures.snapshot}; mend the data and capture into a new cache, or raise max_error_rate to accept this"
        )


def _absolute(uri: str) -> str:
    """A folder as an absolute path: an actor has another working directory."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())
