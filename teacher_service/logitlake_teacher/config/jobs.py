"""The configuration of the commands: one strict tree each.

`capture` and `plan` read `CaptureConfig`, `pairs` reads `PairsConfig`. What ends up in the cache's fingerprint is
decided in `service.prepare`, not here: how many actors run, or in which folder the lake lies, changes no stored byte.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from logitlake_schemas.records import CaptureMode, Codec, CodecPolicy, ScoreMode
from logitlake_shared.config import StrictModel
from logitlake_teacher.config.engines import EngineConfig, VllmEngineConfig
from logitlake_teacher.config.estimate import EstimateConfig
from logitlake_teacher.config.executors import ExecutorConfig, InlineExecutorConfig
from logitlake_teacher.config.images import ImagesConfig
from logitlake_teacher.config.pairs import GivenPairs, PairsOptions
from logitlake_teacher.config.sources import ConversationSource, RlaifVSource, TextSource, TokensSource

__all__ = ["CONFIGS", "CaptureConfig", "LakeConfig", "PairsConfig", "PlanConfig", "TeacherConfig"]


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
    """How the data is cut into units, the smallest piece of work that commits itself, and which of them are done."""

    unit_tokens: int = Field(default=8192, gt=0)
    """tokens of a unit, prompts and responses, images expanded; a kill costs at most the units in flight"""
    limit: int | None = Field(default=None, gt=0)
    """plan this many records from the top of the data; default: all"""
    shard: str = Field(default="1/1", pattern=r"^[1-9][0-9]*/[1-9][0-9]*$")
    """`i/n`: capture the i-th of n parts of the units; n commands, on n machines, fill one cache"""
    processes: int | None = Field(default=None, gt=0)
    """that render conversations while planning, for data of more than some thousand records; default: a core each"""
    folder: Path = Path("~/.cache/logitlake/plans")
    """where plans are kept, to be used again by the next command on the same data; unused ones go after a month"""

    @property
    def part(self) -> tuple[int, int]:
        """`(i, n)` of `shard`."""
        number, _, parts = self.shard.partition("/")
        return int(number), int(parts)

    @model_validator(mode="after")
    def _shard_exists(self) -> Self:
        number, parts = self.part
        if number > parts:
            raise ValueError(f"shard is {self.shard!r}: there is no part {number} of {parts}")
        return self


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
    images: ImagesConfig = ImagesConfig()
    """which images may be loaded, and what one may cost"""
    estimate: EstimateConfig = EstimateConfig()
    """what `plan` assumes of time and price"""
    max_error_rate: float = Field(default=0.0, ge=0, le=1)
    """share of samples that may fail before the command ends with an error; the others are committed either way"""


class CaptureConfig(_JobConfig):
    """`logitlake-teacher capture`: the teacher's distribution over every response token into a cache of samples."""

    data: tuple[ConversationSource, ...] = Field(min_length=1)
    """the conversations, one `[[data]]` table a source"""
    codec: Codec = CodecPolicy()
    """what is kept of a token's distribution: `type = "topk"`, or `"sampled"` for engines that see all of it"""
    mode: CaptureMode = ScoreMode()
    """whose responses: `type = "score"` for those of the data, `"generate"` for ones that the teacher writes"""
    no_image_pass: bool = False
    """score every response to images once more with the images left out of the prompt: what an image adds to a token"""

    @model_validator(mode="after")
    def _mode_gives_what_is_kept(self) -> Self:
        if self.mode.type == "generate" and self.codec.type == "sampled":
            raise ValueError(
                "codec.type is 'sampled', but a teacher that writes its answers (mode.type='generate') tells the most "
                "probable tokens; use codec.type='topk', or score the answers in a second capture"
            )
        return self

    @model_validator(mode="after")
    def _prompts_can_be_written_without_images(self) -> Self:
        if self.no_image_pass and any(isinstance(source, TokensSource) for source in self.data):
            raise ValueError(
                "no_image_pass is true, which writes each prompt anew without its images, and there is data of type "
                "tokens, whose prompts are ids. Set no_image_pass=false, or give that data as conversations"
            )
        return self

    @model_validator(mode="after")
    def _engine_sees_the_tail(self) -> Self:
        temperatures = self.codec.temperatures if isinstance(self.codec, CodecPolicy) else ()
        if temperatures and isinstance(self.engine, VllmEngineConfig) and self.engine.route == "prompt_logprobs":
            raise ValueError(
                f"codec.temperatures is {list(temperatures)}, but engine.route='prompt_logprobs' returns the most "
                "probable tokens only. Use engine.route='span_hook', engine.type='hf', or codec.temperatures=[]"
            )
        return self

    @model_validator(mode="after")
    def _engine_sees_what_is_drawn_from(self) -> Self:
        if self.codec.type == "sampled" and self.engine.type == "vllm":
            raise ValueError(
                "codec.type is 'sampled', which draws from the full distribution; the engine 'vllm' returns the most "
                "probable tokens only. Use engine.type='hf', or codec.type='topk'"
            )
        return self


class PairsConfig(_JobConfig):
    """`logitlake-teacher pairs`: the teacher's logprobs of chosen and rejected responses into a cache of pairs."""

    data: tuple[Annotated[TextSource, Field(discriminator="type")], ...] = Field(min_length=1)
    """preference data for pairs that are given, conversations for pairs that are made; one `[[data]]` table a source"""
    pairs: PairsOptions = GivenPairs()
    """`given`: the data holds chosen and rejected; `made`: the teacher writes candidates and ranks them"""

    @model_validator(mode="after")
    def _data_is_what_pairs_come_from(self) -> Self:
        given = self.pairs.type == "given"
        strangers = sorted({source.type for source in self.data if isinstance(source, RlaifVSource) != given})
        if strangers:
            raise ValueError(
                f"pairs.type is {self.pairs.type!r}, which reads "
                f"{'preference data (rlaif_v)' if given else 'conversations'}, but there is data of type "
                f"{', '.join(strangers)}; set pairs.type={'made' if given else 'given'}, or name other data"
            )
        return self


CONFIGS: dict[str, type[CaptureConfig] | type[PairsConfig]] = {"capture": CaptureConfig, "pairs": PairsConfig}
"""of the commands that write into a lake"""
