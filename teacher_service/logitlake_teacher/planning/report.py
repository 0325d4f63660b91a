"""What `plan` answers: how much there is, what of it is done, and what the rest takes.

Bytes are a range for the codec; a cache that already holds rows says it better than any table, and is asked first.
"""

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from logitlake_schemas import CaptureSpec, CodecPolicy, SampledPolicy
from logitlake_teacher.planning.estimate import Estimate
from logitlake_teacher.planning.figures import PlanFigures

__all__ = ["PlanReport", "bytes_per_token", "report_lines"]

# docs/decisions/0006-adaptive-k.md: a stored entry and a token's other columns, in bytes; how much of a fixed k the
# floor `p_min` keeps, from a teacher that is nearly always sure to one that rarely is.
_ENTRY_BYTES = {"companded256": 2.1, "exact": 6.0}
_TOKEN_BYTES = 9.0
_KEPT_SHARE = (0.1, 0.62)
# Ids and float32 logprobs of a pair's responses; no distribution is stored.
_PAIR_TOKEN_BYTES = (5.0, 7.0)


class PlanReport(BaseModel):
    """The answer of `logitlake-teacher plan --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    """`samples` or `pairs`"""
    lake: str
    cache: str
    plan_digest: str
    """fingerprint of teacher, data and codec: what `capture --plan-digest` compares"""
    dataset_sha256: str
    figures: PlanFigures
    unit_tokens: int
    committed_units: int
    """units that the cache already holds"""
    remaining_units: int
    remaining_tokens: int
    over_context: int
    """items longer than the teacher's context; each becomes an error row (`prompt_too_long`)"""
    context_length: int
    row_bytes: tuple[float, float]
    """of the rows on disk, all units, lowest and highest"""
    bytes_basis: str
    """where the bytes a token come from"""
    image_bytes: int
    """of the images on disk, each stored once a unit"""
    estimate: Estimate | None
    """of what is left; none without a rate"""
    warnings: tuple[str, ...]


def bytes_per_token(spec: CaptureSpec) -> tuple[float, float]:
    """Lowest and highest to expect of the codec, in bytes a response token."""
    if spec.kind == "pairs":
        return _PAIR_TOKEN_BYTES
    codec = spec.codec
    if isinstance(codec, SampledPolicy):
        return _TOKEN_BYTES + _ENTRY_BYTES["companded256"], _TOKEN_BYTES + _ENTRY_BYTES["companded256"] * codec.draws
    assert isinstance(codec, CodecPolicy)
    whole = _ENTRY_BYTES[codec.grid] * codec.k_max
    low, high = _KEPT_SHARE if codec.p_min > 0 else (1.0, 1.0)
    return _TOKEN_BYTES + low * whole, _TOKEN_BYTES + high * whole


def report_lines(report: PlanReport) -> list[str]:
    """The report for people."""
    figures, lengths = report.figures, report.figures.lengths
    lines = [
        f"{figures.items:,} {report.kind} in {figures.units:,} units of at most {report.unit_tokens:,} tokens",
        _line("by task", ", ".join(f"{task} {count:,}" for task, count in figures.by_task.items()) or "-"),
        _line(
            "tokens",
            f"{figures.tokens:,} as the teacher sees them: {figures.image_tokens:,} of images, "
            f"{figures.response_tokens:,} of responses",
        ),
        _line(
            "length",
            f"p50 {lengths['p50']:,}, p95 {lengths['p95']:,}, max {lengths['max']:,} tokens; {report.over_context:,} "
            f"over the teacher's context of {report.context_length:,}",
        ),
        _line("images", f"{figures.images:,} distinct, {_size(figures.image_bytes)}"),
        _line("duplicates", f"{figures.duplicates:,} with the prompt, responses and images of another"),
        _line("unusable", _unusable(figures.problems)),
        *(f"              {example}" for example in figures.examples),
        _line(
            "cache",
            f"{report.lake}: {report.cache!r} holds {report.committed_units:,} of {figures.units:,} units; "
            f"{report.remaining_units:,} are left",
        ),
        _line(
            "on disk",
            f"{_range(report.row_bytes, _size)} of rows ({report.bytes_basis}), {_size(report.image_bytes)} of images",
        ),
        *_estimate_lines(report.estimate),
        *(_line("warning", warning) for warning in report.warnings),
        _line("dataset", report.dataset_sha256),
        _line("plan digest", report.plan_digest),
    ]
    return lines


def _estimate_lines(made: Estimate | None) -> list[str]:
    if made is None:
        return [_line("time", "not estimated: measure this machine with --measure, or set estimate.tokens_per_s")]
    rate = made.rate
    lines = [
        _line("rate", f"{rate.lowest:,.0f} to {rate.highest:,.0f} tokens/s an engine, {rate.basis}: {rate.assumes}"),
        _line("time", f"{_range(made.gpu_hours, _hours)} of GPU, {_range(made.hours, _hours)} on the clock"),
    ]
    if made.price is not None:
        lines.append(_line("price", f"{made.price[0]:,.2f} to {made.price[1]:,.2f}"))
    lines.append(
        _line("break-even", f"a teacher in the training loop is cheaper below {made.break_even:.2f} epochs x students")
    )
    return lines


def _line(name: str, text: str) -> str:
    return f"  {name:<12}{text}"


def _unusable(problems: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {code}" for code, count in problems.items()) or "0"


def _range(values: Sequence[float], shown: Callable[[float], str]) -> str:
    low, high = (shown(value) for value in values)
    return low if low == high else f"{low} to {high}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    return f"{hours * 60:.2g} min" if hours < 1 else f"{hours:.3g} h"
