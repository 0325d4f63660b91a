"""The engines' own options: a union on `type`."""

from typing import Annotated, Literal

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["EngineConfig", "FakeEngineConfig", "HfEngineConfig", "VllmEngineConfig"]


class FakeEngineConfig(StrictModel):
    """A seeded teacher without weights, for tests and dry runs; it needs only the tokenizer of `model_dir`."""

    type: Literal["fake"] = "fake"
    seed: int = 0
    """another seed is another teacher"""
    sharpness: float = Field(default=3.0, gt=0)
    """standard deviation of the logits: higher is surer"""
    tokens_per_image: int = Field(default=4, gt=0)
    """tokens that one image becomes"""
    context_length: int = Field(default=4096, gt=0)
    """longest sample, images expanded"""
    die_on: tuple[str, ...] = ()
    """fault: the process ends at once when it meets one of these sample ids"""
    die_at_start: bool = False
    """fault: the process ends while the engine is being made"""
    die_after_calls: int | None = Field(default=None, ge=0)
    """fault: the process kills itself with SIGKILL on the call after this many, that is, after as many units"""
    raise_on: tuple[str, ...] = ()
    """fault: the engine fails on these sample ids"""
    nan_on: tuple[str, ...] = ()
    """fault: the engine returns NaN for these sample ids"""
    hang_on: tuple[str, ...] = ()
    """fault: the engine waits forever on these sample ids"""


class HfEngineConfig(StrictModel):
    """transformers in this process."""

    type: Literal["hf"] = "hf"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the forward pass; the lm_head's softmax is always float32"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the teacher runs"""
    batch_tokens: int = Field(default=4096, gt=0)
    """padded positions of one forward pass, at most (a longer sample goes alone)"""
    context_length: int | None = Field(default=None, gt=1)
    """longest sample, images expanded; default and upper bound: what the checkpoint was made for"""


class VllmEngineConfig(StrictModel):
    """vLLM in this process, through its public interface."""

    type: Literal["vllm"] = "vllm"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the forward pass"""
    batch_tokens: int = Field(default=2048, gt=0)
    """positions of one engine step; vLLM holds their logits over the vocabulary in memory"""
    context_length: int | None = Field(default=None, gt=1)
    """longest sample + 1, images expanded; default and upper bound: what the checkpoint was made for"""
    enforce_eager: bool = True
    """no CUDA graphs: they speed up decoding, and scoring is prefill"""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, lt=1)
    """share of the GPU's memory for vLLM; prompt logprobs need room beside it"""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs that share one teacher"""
    max_images: int = Field(default=4, gt=0)
    """images of one sample, at most"""


EngineConfig = Annotated[FakeEngineConfig | HfEngineConfig | VllmEngineConfig, Field(discriminator="type")]
