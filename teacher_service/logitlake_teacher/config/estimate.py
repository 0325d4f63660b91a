"""`[estimate]`: what `plan` has to assume to say how long a capture takes and what it costs. Changes no stored byte."""

from typing import Self

from pydantic import Field, model_validator

from logitlake_shared.config import StrictModel

__all__ = ["EstimateConfig"]


class EstimateConfig(StrictModel):
    """Assumptions of `plan`; each figure it prints names the ones it rests on."""

    tokens_per_s: tuple[float, float] | None = None
    """tokens a second of one engine, lowest and highest, images expanded; default: measured by `plan --measure`, or
    else computed from the teacher's size and the three fields below"""
    gpus_per_engine: int = Field(default=1, gt=0)
    """GPUs that hold one teacher (tensor x pipeline parallel)"""
    gpu_tflops: float = Field(default=989.0, gt=0)
    """dense 16-bit TFLOP/s of one GPU by its data sheet; the default is an H100 SXM"""
    gpu_utilisation: tuple[float, float] = (0.2, 0.5)
    """share of that peak which a prefill reaches, lowest and highest"""
    parameters: float | None = Field(default=None, gt=0)
    """parameters of the teacher that a token passes through; default: counted from the checkpoint"""
    num_gpus: int = Field(default=1, gt=0)
    """GPUs that run side by side: GPU-hours are divided by it to say how long the capture takes"""
    price_per_gpu_hour: float | None = Field(default=None, ge=0)
    """in whatever currency; with it the plan says what the capture costs"""
    price_per_gb_month: float = Field(default=0.0, ge=0)
    """of storing the cache"""
    months: float = Field(default=1.0, ge=0)
    """that the cache is kept"""
    capture_overhead: float = Field(default=1.1, ge=1)
    """time of a capture, as a multiple of the bare forward pass that a teacher in the training loop would do"""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name in ("tokens_per_s", "gpu_utilisation"):
            own = getattr(self, name)
            if own is not None and not 0 < own[0] <= own[1]:
                raise ValueError(f"{name} is the lowest and the highest value, both above 0; got {list(own)}")
        return self
