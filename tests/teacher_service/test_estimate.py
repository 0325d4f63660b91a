"""Time, price and break-even by hand."""

import pytest

from logitlake_teacher.config import EstimateConfig
from logitlake_teacher.planning.estimate import Rate, estimate, prefill_rate


def test_a_prefill_by_hand() -> None:
    """1e9 parameters are 2e9 operations a token; 100 TFLOP/s at 20 % and 50 % of peak: 10,000 and 25,000 tokens/s."""
    config = EstimateConfig(gpu_tflops=100, gpu_utilisation=(0.2, 0.5))
    rate = prefill_rate(1e9, config)
    assert (rate.lowest, rate.highest) == (pytest.approx(10_000), pytest.approx(25_000))
    assert "not measured" in rate.assumes


def test_hours_and_price_by_hand() -> None:
    """36 million tokens at 1,000 to 2,000 tokens/s an engine of two GPUs: 10 to 20 GPU-hours; four GPUs need 2.5 to 5
    hours; at 3 a GPU-hour, 30 to 60."""
    config = EstimateConfig(gpus_per_engine=2, num_gpus=4, price_per_gpu_hour=3)
    made = estimate(36_000_000, 1e9, Rate(lowest=1000, highest=2000, basis="given", assumes=""), config)
    assert made.gpu_hours == (pytest.approx(10), pytest.approx(20))
    assert made.hours == (pytest.approx(2.5), pytest.approx(5))
    assert made.price == (pytest.approx(30), pytest.approx(60))


def test_break_even_by_hand() -> None:
    """A capture costs 45 in the middle at an overhead of 1.25: the bare forward pass costs 36. 100 GB at 0.09 for two
    months cost 18. (45 + 18) / 36 = 1.75 epochs x students."""
    config = EstimateConfig(
        price_per_gpu_hour=3, capture_overhead=1.25, price_per_gb_month=0.09, months=2, gpus_per_engine=2
    )
    made = estimate(36_000_000, 100e9, Rate(lowest=1000, highest=2000, basis="given", assumes=""), config)
    assert made.break_even == pytest.approx(1.75)


def test_without_a_price_only_the_overhead_counts() -> None:
    """A capture is one forward pass and what it takes on top; storage has no price to compare with."""
    made = estimate(1000, 1e9, Rate(lowest=1, highest=1, basis="given", assumes=""), EstimateConfig())
    assert made.break_even == EstimateConfig().capture_overhead
    assert made.price is None


@pytest.mark.parametrize("bad", [{"tokens_per_s": (2.0, 1.0)}, {"gpu_utilisation": (0.0, 0.5)}])
def test_a_range_must_rise(bad: dict[str, tuple[float, float]]) -> None:
    """The lowest first, and above zero."""
    with pytest.raises(ValueError, match="lowest and the highest"):
        EstimateConfig(**bad)  # type: ignore[arg-type]  # that is the test
