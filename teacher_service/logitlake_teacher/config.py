"""The configuration of the three commands: one strict tree each.

`capture` and `plan` read `CaptureConfig`, `pairs` reads `PairsConfig`. Alternatives (engine, executor, data source)
are unions on `type`. What ends up in the cache's fingerprint is decided in `service.prepare`, not here: how many
actors run, or in which folder the lake lies, changes no stored byte.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitlake_schemas.records import Codec, CodecPolicy
from logitlake_shared.config import StrictModel

__all__ = [
    "CaptureConfig",
    "EngineConfig",
    "ExecutorConfig",
    "FakeEngineConfig",
    "HfEngineConfig",
    "InlineExecutorConfig",
    "LakeConfig",
    "LlavaSource",
    "PairsConfig",
    "PlanConfig",
    "RayExecutorConfig",
    "RlaifVSource",
    "TeacherConfig",
    "VllmEngineConfig",
]


class TeacherConfig(StrictModel):
    """The teacher."""

    model_dir: Path
    """folder of the checkpoint: weights, config, tokenizer, chat template, image processor"""


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


class InlineExecutorConfig(StrictModel):
    """One engine in the command's own process."""

    type: Literal["inline"] = "inline"
    num_threads: int = Field(default=1, gt=0)
    """CPU threads of the engine"""


class RayExecutorConfig(StrictModel):
    """Ray actors, one engine each; a local Ray is started unless `RAY_ADDRESS` names a cluster."""

    type: Literal["ray"] = "ray"
    num_actors: int = Field(default=2, gt=0)
    """engines that run side by side"""
    cpus_per_actor: int = Field(default=1, gt=0)
    """CPU cores reserved for an actor, and its engine's threads"""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs reserved for an actor"""
    max_attempts: int = Field(default=2, gt=0)
    """times that a unit may kill its actor before its samples are tried in halves to find the one that does, and that
    an actor may die while it loads the teacher before the command ends"""


ExecutorConfig = Annotated[InlineExecutorConfig | RayExecutorConfig, Field(discriminator="type")]


class LakeConfig(StrictModel):
    """Where the rows go."""

    uri: str
    """folder, or s3://, gs://, az:// address of the lake; made if nothing is there"""
    cache: str
    """name of the cache in the lake"""


class LlavaSource(StrictModel):
    """Conversations in LLaVA's JSON."""

    type: Literal["llava"] = "llava"
    path: Path
    """the JSON file"""
    image_root: Path = Path()
    """folder that the records' `image` paths are relative to"""
    source: str | None = None
    """name of the source in the lake; default: the file's name"""
    task: str = "chat"
    """task of records that name none"""
    split: str = "train"
    """split of records that name none"""
    limit: int | None = Field(default=None, gt=0)
    """take this many records from the top of the file; default: all"""


class RlaifVSource(StrictModel):
    """Preference pairs in the Parquet form of RLAIF-V."""

    type: Literal["rlaif_v"] = "rlaif_v"
    path: Path
    """the Parquet file"""
    limit: int | None = Field(default=None, gt=0)
    """take this many records from the top of the file; default: all"""


class PlanConfig(StrictModel):
    """How the data is cut into units, the smallest piece of work that commits itself."""

    unit_tokens: int = Field(default=8192, gt=0)
    """tokens of a unit, prompts and responses, an image counted as one; a kill costs at most the units in flight"""


class _JobConfig(StrictModel):
    teacher: TeacherConfig
    """the teacher"""
    engine: EngineConfig
    """what runs the teacher: `fake`, `hf` or `vllm`"""
    lake: LakeConfig
    """where the rows go"""
    plan: PlanConfig = PlanConfig()
    """how the data is cut into units"""
    executor: ExecutorConfig = InlineExecutorConfig()
    """where the units run: `inline` or `ray`"""
    max_error_rate: float = Field(default=0.0, ge=0, le=1)
    """share of samples that may fail before the command ends with an error; the others are committed either way"""


class CaptureConfig(_JobConfig):
    """`logitlake-teacher capture`: teacher-forced responses into a cache of samples."""

    data: tuple[LlavaSource, ...] = Field(min_length=1)
    """the conversations, one `[[data]]` table a source"""
    codec: Codec = CodecPolicy()
    """what is kept of a token's distribution: `type = "topk"`, or `"sampled"` for engines that see all of it"""

    @model_validator(mode="after")
    def _engine_sees_what_is_drawn_from(self) -> Self:
        if self.codec.type == "sampled" and self.engine.type == "vllm":
            raise ValueError(
                "codec.type is 'sampled', which draws from the full distribution; the engine 'vllm' returns the most "
                "probable tokens only. Use engine.type='hf', or codec.type='topk'"
            )
        return self


class PairsConfig(_JobConfig):
    """`logitlake-teacher pairs`: the teacher's logprobs of preferred and rejected responses into a cache of pairs."""

    data: tuple[RlaifVSource, ...] = Field(min_length=1)
    """the preference data, one `[[data]]` table a source"""
