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
from typing import Any

from logitlake_schemas import (
    SET_ASIDE_CODES,
    CacheKind,
    CaptureSpec,
    Codec,
    CodecPolicy,
    CommitRecord,
    GenerateMode,
    SampledPolicy,
    ScoreMode,
)
from logitlake_shared.cache_figures import CacheFigures, cache_figures
from logitlake_shared.catalog import publish_catalog
from logitlake_shared.errors import ConfigError, DataError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import CaptureConfig, InlineExecutorConfig, MadePairs, PairsConfig
from logitlake_teacher.engines import EngineSetup, identify_engine
from logitlake_teacher.engines.facts import EngineFacts, engine_facts
from logitlake_teacher.executors import Committed, build_executor, stop_on_signals
from logitlake_teacher.pairs import PAIRS_CODEC, PairMaker
from logitlake_teacher.planning import OnProgress, Plan, Remaining, make_plan
from logitlake_teacher.unit_work import temperatures_of
from logitlake_teacher.worker import CaptureJob, UnitWorker

__all__ = [
    "CommittedCounts",
    "Prepared",
    "Summary",
    "check_digest",
    "check_error_rate",
    "committed_counts",
    "open_cache",
    "prepare",
    "remaining_units",
    "run_units",
    "summarise",
]

# Digits by which a person may name a plan.
_DIGEST_DIGITS = 12

OnCommit = Callable[[Committed], None]


@dataclass(frozen=True)
class Prepared:
    """A capture that is ready to run."""

    kind: CacheKind
    plan: Plan
    spec: CaptureSpec
    setup: EngineSetup
    facts: EngineFacts


@dataclass(frozen=True)
class Summary:
    """What a cache holds, and why it does not hold more."""

    figures: CacheFigures
    errors: dict[str, int]
    """number of items that could not be captured, by code"""
    without_pair: dict[str, int]
    """number of prompts of which the teacher made no pair, by code: nothing failed"""
    first_error: str | None


def prepare(config: CaptureConfig | PairsConfig, on_record: OnProgress = lambda _: None) -> Prepared:
    """Plans the data and identifies the teacher; `on_record` hears of records as they are read.

    Faults of the data are in the plan's figures: `check_plan` makes an error of those that are not tolerated. Raises
    `ConfigError`, `DataError`, `EngineError`.
    """
    renderer = Renderer(config.teacher.model_dir)
    facts = engine_facts(config.engine, config.teacher.model_dir)
    if isinstance(config, CaptureConfig):
        kind: CacheKind = "samples"
        codec: Codec = config.codec
        if isinstance(codec, CodecPolicy) and codec.k_max > renderer.vocab_size:
            raise ConfigError(
                f"codec.k_max is {codec.k_max}, but the teacher's tokenizer has {renderer.vocab_size} tokens; lower it"
            )
    else:
        kind, codec = "pairs", PAIRS_CODEC
    mode = config.mode if isinstance(config, CaptureConfig) else ScoreMode()
    making = config.pairs if isinstance(config, PairsConfig) and isinstance(config.pairs, MadePairs) else None
    maker = None if making is None else PairMaker(making, renderer)
    plan = make_plan(
        # Pairs are made of prompts, which are planned as samples are.
        kind if making is None else "samples",
        config.data,
        renderer,
        facts,
        config.plan,
        config.images,
        on_record,
        open_end=isinstance(mode, GenerateMode) or making is not None,
    )
    executor = config.executor
    setup = EngineSetup(
        model_dir=config.teacher.model_dir.resolve(),
        vocab_size=renderer.vocab_size,
        eos_id=renderer.eos_id,
        image_token_id=renderer.image_token_id,
        k=maker.k if maker is not None else codec.k_max if isinstance(codec, CodecPolicy) else 1,
        sampled=codec if isinstance(codec, SampledPolicy) else None,
        num_threads=(executor.num_threads if isinstance(executor, InlineExecutorConfig) else executor.cpus_per_actor),
        temperatures=temperatures_of(codec),
    )
    spec = CaptureSpec(
        kind=kind,
        tokenizer=renderer.identity(),
        engine=identify_engine(config.engine, setup),
        codec=codec,
        dataset=plan.dataset,
        mode=mode,
        no_image_pass=(
            config.no_image_pass if isinstance(config, CaptureConfig) else config.pairs.scores_without_images
        ),
        pair_making=None if making is None else making.model_dump(mode="json"),
    )
    return Prepared(kind, plan, spec, setup, facts)


def check_digest(prepared: Prepared, expected: str | None) -> None:
    """Raises `DataError` if the plan is not the one that somebody has looked at. Twelve digits are enough to say which.

    What the digest covers: every record and image, the teacher, the engine and the codec.
    """
    digest = prepared.spec.fingerprint
    if expected is not None and not (len(expected) >= _DIGEST_DIGITS and digest.startswith(expected)):
        raise DataError(
            f"--plan-digest is {expected}, but the plan of this configuration is {digest}: the data, the teacher or "
            "the options changed since; look at `logitlake-teacher plan` again"
        )


def open_cache(config: CaptureConfig | PairsConfig, prepared: Prepared) -> Cache:
    """The cache of this capture, made if it is not there. Raises `FingerprintMismatchError` if it is another's."""
    return Lake.create(config.lake.uri).create_cache(config.lake.cache, prepared.spec)


def remaining_units(config: CaptureConfig | PairsConfig, prepared: Prepared, cache: Cache) -> Remaining:
    """The plan, or this command's part of it, minus the commit records."""
    return prepared.plan.remaining(cache.committed_units(), config.plan.part)


class CommittedCounts:
    """Items of a part of a plan, how many are committed, and how many of those are errors."""

    def __init__(self, total: int = 0) -> None:
        self._total, self._committed = total, 0
        self._errors = Counter[str]()

    def add(self, record: CommitRecord, units: Remaining) -> None:
        """Adds the commit of one of these units."""
        self._committed += units.items_of(record.unit)
        self._errors.update(error.code for error in record.errors if error.is_failure)

    def told(self) -> dict[str, Any]:
        """The `counts` of `jobs.progress`."""
        quarantined = sum(self._errors[code] for code in SET_ASIDE_CODES)
        failed = self._errors.total() - quarantined
        counts = {"total": self._total, "committed": self._committed, "failed": failed, "quarantined": quarantined}
        return counts | {"errors": dict(self._errors)}


def committed_counts(config: CaptureConfig | PairsConfig, prepared: Prepared, cache: Cache) -> CommittedCounts:
    """Of this command's part of the plan."""
    part = prepared.plan.remaining(set(), config.plan.part)
    units = {prepared.plan.unit_ids[place] for place in part.places}
    counts = CommittedCounts(part.num_items)
    for record in cache.commits() if cache.committed_units() else ():
        if record.unit in units:
            counts.add(record, part)
    return counts


def run_units(config: CaptureConfig | PairsConfig, prepared: Prepared, units: Remaining, on_commit: OnCommit) -> float:
    """Captures the units; `on_commit` is called as each is committed. Returns the seconds it took.

    Raises `RunStopped` when SIGTERM or Ctrl-C ended it; what was under way is finished and committed by then.
    """
    job = CaptureJob(
        prepared.kind, _absolute(config.lake.uri), config.lake.cache, config.engine, prepared.setup, config.images
    )
    start = time.monotonic()
    executor = build_executor(config.executor, config.engine)
    with stop_on_signals(config.executor.grace_s) as stop:
        for done in executor.run(units, partial(UnitWorker, job), stop):
            on_commit(done)
    return time.monotonic() - start


def summarise(cache: Cache) -> Summary:
    """Takes a snapshot and publishes the catalog (the newest again if nothing came since); adds up what they hold."""
    snapshot = cache.snapshot()
    publish_catalog(Lake(cache.store))
    errors = [error for commit in snapshot.commits for error in commit.errors]
    failed = [error for error in errors if error.is_failure]
    first = next((f"{error.sample_id!r}: {error.code}: {error.message}" for error in failed), None)
    return Summary(
        cache_figures(cache, snapshot),
        dict(Counter(error.code for error in failed)),
        dict(Counter(error.code for error in errors if not error.is_failure)),
        first,
    )


def check_error_rate(summary: Summary, max_error_rate: float) -> None:
    """Raises `DataError` when a greater share of the items failed than the configuration allows.

    A prompt without a pair did not fail: it was answered, and the answers gave no pair.
    """
    figures = summary.figures
    failed, total = sum(summary.errors.values()), figures.rows + figures.errors
    if failed > max_error_rate * total:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(summary.errors.items()))
        raise DataError(
            f"{failed} of {total} items could not be captured ({codes}), max_error_rate is "
            f"{max_error_rate}; the first is {summary.first_error}. The other {figures.rows} are committed in snapshot "
            f"{figures.snapshot}; mend the data and capture into a new cache, or raise max_error_rate to accept this"
        )


def _absolute(uri: str) -> str:
    """A folder as an absolute path: an actor has another working directory."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())
