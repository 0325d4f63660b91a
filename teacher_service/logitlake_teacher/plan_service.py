"""What `logitlake-teacher plan` does: says what a capture would do, with everything it rests on; captures nothing.

It makes no lake. Where one is there it is asked: which units are committed, and how many bytes a token its rows take.
"""

import time
from tempfile import TemporaryDirectory

from logitlake_schemas import CaptureSpec, GenerateMode
from logitlake_shared.cache_figures import cache_figures
from logitlake_shared.errors import ConfigError, LakeError
from logitlake_shared.lake import Cache, Lake, spec_differences
from logitlake_teacher.config import CaptureConfig, FakeEngineConfig, MadePairs, PairsConfig
from logitlake_teacher.engines.parameters import active_parameters
from logitlake_teacher.planning.estimate import Rate, estimate, prefill_rate
from logitlake_teacher.planning.report import PlanReport, bytes_per_token
from logitlake_teacher.service import Prepared
from logitlake_teacher.worker import CaptureJob, UnitWorker

__all__ = ["measure_rate", "report"]


def report(config: CaptureConfig | PairsConfig, prepared: Prepared, measured: Rate | None) -> PlanReport:
    """The report of a prepared capture; `measured` is this machine's rate, if it was asked for."""
    plan, figures = prepared.plan, prepared.plan.figures
    cache, warnings = _existing_cache(config, prepared.spec)
    left = plan.remaining(cache.committed_units() if cache else set(), config.plan.part)
    low, high, basis = _row_bytes_per_token(cache, prepared.spec)
    row_bytes = (low * figures.response_tokens, high * figures.response_tokens)
    rate = measured or _rate(config)
    over_context = sum(count for length, count in figures.longest.items() if length > prepared.facts.context_length)
    return PlanReport(
        kind=prepared.kind,
        lake=config.lake.uri,
        cache=config.lake.cache,
        plan_digest=prepared.spec.fingerprint,
        dataset_sha256=plan.dataset.snapshot_sha256,
        figures=figures,
        unit_tokens=config.plan.unit_tokens,
        committed_units=figures.units - len(plan.remaining(cache.committed_units() if cache else set(), (1, 1))),
        remaining_units=len(left),
        remaining_tokens=left.num_tokens,
        over_context=over_context,
        context_length=prepared.facts.context_length,
        row_bytes=row_bytes,
        bytes_basis=basis,
        image_bytes=figures.image_bytes,
        estimate=None if rate is None else estimate(left.num_tokens, sum(row_bytes) / 2, rate, config.estimate),
        warnings=(*warnings, *_uncounted(config)),
    )


def measure_rate(config: CaptureConfig | PairsConfig, prepared: Prepared, num_units: int) -> Rate:
    """Scores the first units of the plan with the real engine, commits nothing, and says how fast that was.

    One unit more comes first and does not count: it warms up kernels and caches.
    """
    rates = []
    units, num_tokens = prepared.plan.units, prepared.plan.num_tokens
    with TemporaryDirectory() as folder:
        # A worker wants a cache; this one is forgotten.
        Lake.create(folder).create_cache(config.lake.cache, prepared.spec)
        job = CaptureJob(prepared.kind, folder, config.lake.cache, config.engine, prepared.setup, config.images)
        worker = UnitWorker(job)
        try:
            for place in range(min(num_units + 1, len(units))):
                items = units[place].items
                start = time.monotonic()
                worker.probe(items)
                rates.append(num_tokens[place] / (time.monotonic() - start))
        finally:
            worker.close()
    if not rates:
        raise ConfigError("--measure needs something to measure, and the plan has no unit")
    counted = rates[1:] or rates
    return Rate(
        lowest=min(counted),
        highest=max(counted),
        basis="measured",
        assumes=f"{len(counted)} units on this machine, engine {config.engine.type}",
    )


def _rate(config: CaptureConfig | PairsConfig) -> Rate | None:
    given = config.estimate.tokens_per_s
    if given is not None:
        return Rate(lowest=given[0], highest=given[1], basis="given", assumes="estimate.tokens_per_s")
    if isinstance(config.engine, FakeEngineConfig) or (config.engine.type == "hf" and config.engine.device == "cpu"):
        return None  # the arithmetic is that of GPUs
    parameters = config.estimate.parameters or active_parameters(config.teacher.model_dir)
    return prefill_rate(parameters, config.estimate)


def _uncounted(config: CaptureConfig | PairsConfig) -> list[str]:
    """What the capture does beside one prefill of every item, which is all that the estimate counts."""
    if isinstance(config, PairsConfig):
        if isinstance(config.pairs, MadePairs):
            return [
                f"the teacher writes {config.pairs.num_candidates} candidates of up to {config.pairs.max_new_tokens} "
                "tokens for each prompt and rates them; tokens and hours count the prompts and the data's answers alone"
            ]
        passes_twice = config.pairs.no_image_pass
    else:
        passes_twice = config.no_image_pass
        if isinstance(config.mode, GenerateMode):
            return [
                f"the teacher writes answers of up to {config.mode.max_new_tokens} tokens, which takes longer than "
                "scoring them; tokens and hours count the data's own answers"
            ]
    return ["no_image_pass scores every response to images twice; tokens and hours count once"] if passes_twice else []


def _existing_cache(config: CaptureConfig | PairsConfig, spec: CaptureSpec) -> tuple[Cache | None, list[str]]:
    """The cache if it is there and is this capture's; and a warning if it is another's."""
    try:
        lake = Lake.open(config.lake.uri)
    except LakeError:
        return None, []
    if config.lake.cache not in lake.cache_names():
        return None, []
    cache = lake.cache(config.lake.cache)
    differences = spec_differences(cache.spec, spec)
    if differences:
        return None, [f"cache {cache.name!r} was captured with another spec, capture will refuse: {differences[0]}"]
    return cache, []


def _row_bytes_per_token(cache: Cache | None, spec: CaptureSpec) -> tuple[float, float, str]:
    if cache is not None and cache.has_snapshot():
        measured = cache_figures(cache, cache.open_snapshot()).bytes_per_token
        if measured is not None:
            return measured, measured, f"{measured:.1f} bytes a response token, measured in this cache"
    low, high = bytes_per_token(spec)
    return low, high, f"{low:.0f} to {high:.0f} bytes a response token, assumed of this codec"
