"""`logitlake-student train`: rows, student, stages."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from logitlake_shared.config import StrictModel
from logitlake_student.config.presets import FAITHFUL
from logitlake_student.config.stages import STAGE_ORDER, StageConfig
from logitlake_student.config.student import StudentConfig

__all__ = ["DataConfig", "TrainConfig"]


class DataConfig(StrictModel):
    """Where the rows come from."""

    lake: str
    """folder or object-store address of the lake"""
    samples: str
    """cache of captured samples"""
    pairs: str | None = None
    """cache of preference pairs; needed by a preference stage"""
    split: str = "train"
    """split of the samples to learn from"""
    snapshot: int | None = Field(default=None, gt=0)
    """snapshot of the samples to pin; default: the newest at the first run"""
    max_unreadable: float = Field(default=0.0, ge=0, lt=1)
    """share of the samples (or pairs) that damaged shards may take away before a stage stops; each is left out and
    counted. Default: the first stops it"""
    min_cached_mass: float = Field(default=0.5, ge=0, lt=1)
    """samples of which the lake holds a smaller share of the teacher's probability, on average over response tokens,
    are told before a stage distils from them, and learned from all the same"""


class TrainConfig(StrictModel):
    """`logitlake-student train`: the stages in their order, each from where the one before it ended."""

    output: Path
    """folder of the run; one folder a stage inside"""
    preset: Literal["improved", "faithful"] = "improved"
    """which defaults the stages start from"""
    student: StudentConfig
    """what the student is made of"""
    data: DataConfig
    """where the rows come from"""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """one `[[stages]]` table a stage, in the order init, d2d, d2s, preference; any may be left out"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the student trains"""
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
    """what each of several ranks holds: `ddp` all of the student, `fsdp` a part of its decoder's weights, gradients and
    optimiser state; one rank holds all of it"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of products: with `bf16` they are autocast. Weights, optimiser, losses and routers stay float32"""
    experts_implementation: Literal["logitlake", "grouped_mm", "eager", "batched_mm"] = "logitlake"
    """how a sparse layer's experts multiply: `logitlake` follows `precision` and was the fastest on CPUs; the others
    are transformers' own, of which `eager` also runs on GPUs before compute capability 8.0"""
    gradient_checkpointing: bool = False
    """make a layer's activations again in the backward pass instead of keeping them: less memory, a third more time"""
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] = ()
    """trackers that get the metrics, too; `metrics.jsonl` is always written"""
    rank_timeout_s: float = Field(default=1800.0, gt=0)
    """seconds for which a rank may say nothing before the others give up"""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads; default: torch's own choice. Resuming bit for bit needs the same number"""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, document: Any) -> Any:
        if not isinstance(document, dict) or document.get("preset") != "faithful":
            return document
        if not isinstance(document.get("stages"), list | tuple):
            return document
        stages = [
            {**FAITHFUL.get(str(stage.get("type")), {}), **stage} if isinstance(stage, dict) else stage
            for stage in document["stages"]
        ]
        return {**document, "stages": stages}

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        names = [stage.type for stage in self.stages]
        if len(set(names)) != len(names) or sorted(names, key=STAGE_ORDER.index) != names:
            raise ValueError(
                f"stages must be distinct and in the order {', '.join(STAGE_ORDER)}; got {', '.join(names)}"
            )
        if "preference" in names and self.data.pairs is None:
            raise ValueError("a preference stage needs `data.pairs`, the cache of preference pairs")
        return self
