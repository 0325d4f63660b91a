"""The configuration of the commands: one strict tree each.

`capture` and `plan` read `CaptureConfig`, `pairs` reads `PairsConfig`. What ends up in the cache's fingerprint is
decided in `service.prepare`, not here: how many actors run, or in which folder the lake lies, changes no stored byte.
"""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from logitlake_schemas.records import Codec, CodecPolicy
from logitlake_shared.config import StrictModel
from logitlake_teacher.config.engines import EngineConfig
from logitlake_teacher.config.executors import ExecutorConfig, InlineExecutorConfig
from logitlake_teacher.config.sources import LlavaSource, RlaifVSource

__all__ = ["CaptureConfig", "LakeConfig", "PairsConfig", "PlanConfig", "TeacherConfig"]


class TeacherConfig(StrictModel):
    """The teacher."""

    model_dir: Path
    """folder of the checkpoint: weights, config, tokenizer, chat template, image processor"""


class LakeConfig(StrictModel):
    """Where the rows go."""

    uri: str
    """folder, or s3://, gs://, az:// address of the lake; made if nothing is there"""
    cache: str
    """name of the cache in the lake"""


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
