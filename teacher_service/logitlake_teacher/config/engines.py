"""The engines' own options: a union on `type`."""

from typing import Annotated, Literal

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["EngineConfig", "FakeEngineConfig", "HfEngineConfig", "VllmEngineConfig", "WrongAnswer"]

WrongAnswer = Literal[
    "nan",
    "inf",
    "minus_inf",
    "k_over_vocabulary",
    "duplicate_id",
    "mass_over_one",
    "foreign_id",
    "missing_row",
    "rising",
]
"""Ways in which a teacher's rows can be impossible."""


class FakeEngineConfig(StrictModel):
    """A seeded teacher without weights, for tests and dry runs; it needs only the tokenizer of `model_dir`."""

    type: Literal["fake"] = "fake"
    seed: int = 0
    """another seed is another teacher"""
    sharpness: float = Field(default=2.0, gt=0)
    """exponent of Zipf's law: the token of rank r has a probability of about r^-sharpness; higher is surer"""
    mean_response: int | None = Field(default=None, gt=1)
    """mean length of the answers that it writes, EOS included; default: EOS is a token like any other"""
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
    hang_on: tuple[str, ...] = ()
    """fault: the engine waits forever on these sample ids"""
    slow_s: float = Field(default=0.0, ge=0)
    """fault: every call takes this many seconds longer"""
    die_by: Literal["exit", "kill", "memory"] = "exit"
    """how `die_on` ends the process: `os._exit(1)`, SIGKILL, or half a GiB of memory and then SIGKILL"""
    die_chance: float = Field(default=0.0, ge=0, le=1)
    """fault: the chance of SIGKILL at every call, drawn from `die_seed` and the process id"""
    die_seed: int = 0
    """see `die_chance`"""
    ignore_sigterm: bool = False
    """fault: the process does not end at SIGTERM (where the engine is made in the main thread)"""
    wrong: dict[str, WrongAnswer] = Field(default={})
    """fault: impossible answers, by sample id, e.g. `{s011 = "duplicate_id"}`"""


class HfEngineConfig(StrictModel):
    """transformers in this process."""

    type: Literal["hf"] = "hf"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the forward pass; the lm_head's softmax is always float32"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the teacher runs"""
    batching: Literal["packed", "padded"] = "packed"
    """`packed`: samples lie one after the other and no padding is computed. `padded`: samples of similar length side by
    side, for the models that cannot attend to part of a row; the engine says so when it starts"""
    batch_tokens: int = Field(default=4096, gt=0)
    """positions of one forward pass, padding included, at most (a longer sample goes alone)"""
    context_length: int | None = Field(default=None, gt=1)
    """longest sample, images expanded; default and upper bound: what the checkpoint was made for"""


class VllmEngineConfig(StrictModel):
    """vLLM: its core in a process of its own, on a CPU in this one."""

    type: Literal["vllm"] = "vllm"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the forward pass"""
    quantization: str | None = None
    """vLLM's name of a quantisation to apply (`fp8`, …); default: what the checkpoint says of itself"""
    route: Literal["auto", "prompt_logprobs", "span_hook"] = "auto"
    """`prompt_logprobs` is vLLM's public interface; `span_hook` computes response rows only, with the exact tail, in
    vLLM's workers; `auto` takes the hook where this vLLM is listed and the start-up probe saw both agree"""
    batch_tokens: int = Field(default=2048, gt=0)
    """positions of one engine step; `prompt_logprobs` hold their logits over the vocabulary in memory"""
    context_length: int | None = Field(default=None, gt=1)
    """longest sample + 1, images expanded; default and upper bound: what the checkpoint was made for"""
    enforce_eager: bool = True
    """no CUDA graphs: they speed up decoding, and scoring is prefill"""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, lt=1)
    """share of the GPU's memory for vLLM; prompt logprobs need room beside it"""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs that share each layer of one teacher"""
    pipeline_parallel_size: int = Field(default=1, gt=0)
    """groups of GPUs that hold the layers of one teacher one after the other"""
    max_images: int = Field(default=4, gt=0)
    """images of one sample, at most"""
    mm_processor_kwargs: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """options of the image processor over the checkpoint's own, as vLLM takes them"""
    renderer_num_workers: int = Field(default=1, gt=0)
    """vLLM's threads that prepare prompts; images of one engine are prepared on one thread in any case"""
    share_prefill: bool = True
    """candidates of one prompt share its prefill through vLLM's prefix cache; scoring never reads that cache"""
    seed: int = 0
    """vLLM's own seed; candidates have seeds of their own"""


EngineConfig = Annotated[FakeEngineConfig | HfEngineConfig | VllmEngineConfig, Field(discriminator="type")]
