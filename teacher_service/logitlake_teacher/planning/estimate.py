"""How long a capture takes, what it costs, and when a teacher in the training loop would be cheaper.

An estimate is a range and names what it assumes. In order of trust: a rate that was measured just now (`plan
--measure`), one that the user gives, or the arithmetic of a prefill: 2 floating-point operations for each parameter
and token, at some share of the GPU's peak.

Break-even. With F the GPU-hours of one bare forward pass over the data, a capture costs o·F once (o =
`capture_overhead`) plus storage; a teacher in the loop costs F for every epoch of every student. So it is cheaper to
keep the teacher in the loop only below (o·F·price + storage) / (F·price) epochs x students.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from logitlake_teacher.config import EstimateConfig

__all__ = ["Estimate", "Rate", "estimate", "prefill_rate"]

_FLOP_PER_PARAMETER = 2
_SECONDS_PER_HOUR = 3600


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Rate(_Figures):
    """Tokens a second of one engine, images expanded."""

    lowest: float
    highest: float
    basis: Literal["measured", "given", "computed"]
    """where it comes from"""
    assumes: str
    """in words"""


class Estimate(_Figures):
    """Of the units that are left."""

    rate: Rate
    gpu_hours: tuple[float, float]
    """shortest and longest"""
    hours: tuple[float, float]
    """the same on `num_gpus` GPUs side by side"""
    price: tuple[float, float] | None
    break_even: float
    """epochs x students below which a teacher in the training loop is cheaper"""


def prefill_rate(parameters: float, config: EstimateConfig) -> Rate:
    """The rate of a prefill by arithmetic."""
    peak = config.gpus_per_engine * config.gpu_tflops * 1e12 / (_FLOP_PER_PARAMETER * parameters)
    low, high = config.gpu_utilisation
    return Rate(
        lowest=low * peak,
        highest=high * peak,
        basis="computed",
        assumes=(
            f"{parameters / 1e9:.3g} B parameters, {config.gpus_per_engine} GPU(s) of {config.gpu_tflops:g} TFLOP/s at "
            f"{low:.0%} to {high:.0%} of peak; not measured"
        ),
    )


def estimate(tokens: int, num_bytes: float, rate: Rate, config: EstimateConfig) -> Estimate:
    """For `tokens` tokens to capture and a cache of `num_bytes` to keep."""
    gpu_hours = (
        tokens * config.gpus_per_engine / rate.highest / _SECONDS_PER_HOUR,
        tokens * config.gpus_per_engine / rate.lowest / _SECONDS_PER_HOUR,
    )
    price = config.price_per_gpu_hour
    cost = None if price is None else (gpu_hours[0] * price, gpu_hours[1] * price)
    break_even = config.capture_overhead
    if cost is not None and cost[0] > 0:
        # In the middle of the range; storage weighs more where the teacher is cheap.
        storage = num_bytes / 1e9 * config.price_per_gb_month * config.months
        break_even += storage / (sum(cost) / 2 / config.capture_overhead)
    return Estimate(
        rate=rate,
        gpu_hours=gpu_hours,
        hours=(gpu_hours[0] / config.num_gpus, gpu_hours[1] / config.num_gpus),
        price=cost,
        break_even=break_even,
    )
