"""The configuration of the student trainer: one strict tree for each command.

A stage's defaults stand on its fields and are the `improved` preset. `preset = "faithful"` starts from what the
reference code of arXiv 2408.15881 does instead (`FAITHFUL`, the one table of differences); a field that the file
sets wins over either.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from logitlake_shared.config import StrictModel

__all__ = [
    "FAITHFUL",
    "D2DStage",
    "D2SStage",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "InitStage",
    "ModelUnderTest",
    "PreferenceStage",
    "ReportConfig",
    "StageConfig",
    "StudentConfig",
    "TrainConfig",
]

FAITHFUL: dict[str, dict[str, Any]] = {
    "init": {"adam_beta2": 0.98},
    "d2d": {"adam_beta2": 0.98},
    # The reference adds the cross-entropy at weight 1.
    "d2s": {"adam_beta2": 0.98, "ce_weight": 1.0},
    "preference": {"adam_beta2": 0.98, "loss": "kto_pair", "nll_weight": 0.0},
}
"""What the reference's recipe sets otherwise, by type of stage. Its stochastic second expert, token dropping, padding
in the balance loss, micro-batch means and shifted mask are errors of its code, not of its recipe, and are not kept."""


class StudentConfig(StrictModel):
    """What the student is made of: a whole checkpoint, or a vision tower and a language model."""

    checkpoint: Path | None = None
    """folder of a whole student (LLaVA, or a text-only language model)"""
    vision_tower: Path | None = None
    """folder of a CLIP vision tower with its image processor"""
    language_model: Path | None = None
    """folder of a causal language model with tokenizer and chat template"""
    vision_feature_layer: int = -2
    """hidden layer of the tower that the language model sees"""
    projector_seed: int = 0
    """seed of the fresh projector"""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        num_parts = (self.vision_tower is not None) + (self.language_model is not None)
        if num_parts != (2 if self.checkpoint is None else 0):
            raise ValueError("give either `checkpoint`, or both `vision_tower` and `language_model`")
        return self


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


class _Stage(StrictModel):
    steps: int = Field(gt=0)
    """optimiser steps"""
    tasks: tuple[str, ...] | None = None
    """learn from these tasks only; default: all"""
    batch_size: int = Field(default=64, gt=0)
    """samples (or pairs) of one optimiser step, over all micro-batches"""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """samples of one forward pass; default: the whole batch"""
    learning_rate: float = Field(gt=0)
    """peak of the schedule: linear warm-up, then cosine to zero"""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """share of the steps that warm up"""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the gradient's mean"""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay of the gradient's square"""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay"""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """gradients are clipped to this global norm"""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """seed of the order of the samples"""
    log_every: int = Field(default=10, gt=0)
    """steps between two lines of metrics"""
    save_every: int = Field(default=100, gt=0)
    """steps between two checkpoints; a multiple of `log_every`, so that a resumed run repeats whole lines"""
    chunk_rows: int = Field(default=1024, gt=0)
    """response rows whose logits are alive at one time; memory, not meaning"""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.save_every % self.log_every:
            raise ValueError(f"save_every {self.save_every} is not a multiple of log_every {self.log_every}")
        return self


class _DistillationStage(_Stage):
    tail: Literal["bounded", "bucket"] = "bounded"
    """what the KL makes of the mass outside the cached entries: `bucket` compares it as one class, `bounded` also
    uses that no token in it is more probable than the least cached one or the codec's floor"""


class InitStage(_DistillationStage):
    """Adaptor init: the projector learns from labels."""

    type: Literal["init"]
    """which stage this is"""
    kl_weight: float = Field(default=0.0, ge=0)
    """weight of forward_kl = KL(teacher‖student), per token"""
    ce_weight: float = Field(default=1.0, ge=0)
    """weight of the cross-entropy on the labels, per token"""


class D2DStage(_DistillationStage):
    """Dense to dense: language model and projector learn the teacher's distribution."""

    type: Literal["d2d"]
    """which stage this is"""
    kl_weight: float = Field(default=1.0, ge=0)
    """weight of forward_kl = KL(teacher‖student), per token"""
    ce_weight: float = Field(default=0.0, ge=0)
    """weight of the cross-entropy on the labels, per token"""


class D2SStage(_DistillationStage):
    """Dense to sparse: the dense student is upcycled, its feed-forward networks and routers learn on."""

    type: Literal["d2s"]
    """which stage this is"""
    kl_weight: float = Field(default=1.0, ge=0)
    """weight of forward_kl = KL(teacher‖student), per token"""
    ce_weight: float = Field(default=0.0, ge=0)
    """weight of the cross-entropy on the labels, per token"""
    num_experts: int = Field(default=4, ge=2)
    """experts of a sparse layer"""
    num_experts_per_tok: int = Field(default=2, ge=1)
    """experts that each token is sent to"""
    layers: Literal["every_other", "all", "first_half", "second_half"] | tuple[int, ...] = "every_other"
    """which layers become sparse"""
    router_seed: int = 0
    """seed of the fresh routers"""
    balance_weight: float = Field(default=0.01, ge=0)
    """weight of the load-balancing loss: mean over layers, frequencies of a micro-batch"""
    z_loss_weight: float = Field(default=0.0, ge=0)
    """weight of the router z-loss"""


class PreferenceStage(_Stage):
    """Preference distillation: chosen responses gain on rejected ones, measured against a reference."""

    type: Literal["preference"]
    """which stage this is"""
    loss: Literal["dpo", "kto_pair", "ipo", "hinge"] = "dpo"
    """which preference loss; the baseline of `kto_pair` is the mean over a micro-batch"""
    beta: float = Field(default=0.1, gt=0)
    """how strongly the reference holds"""
    reference: Literal["teacher", "initial_student", "none"] = "teacher"
    """whose logprobs the rewards are measured against; the teacher's are in the lake"""
    nll_weight: float = Field(default=0.1, ge=0)
    """weight of the chosen response's negative log-likelihood per token"""
    anchor_weight: float = Field(default=0.0, ge=0)
    """weight of the anchor that keeps the chosen reward above zero"""
    length_normalised: bool = False
    """divide each response's logprob by its tokens before the loss"""
    balance_weight: float = Field(default=0.01, ge=0)
    """weight of the load-balancing loss: mean over layers, frequencies of a micro-batch"""


StageConfig = Annotated[InitStage | D2DStage | D2SStage | PreferenceStage, Field(discriminator="type")]


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


STAGE_ORDER = ("init", "d2d", "d2s", "preference")


class ModelUnderTest(StrictModel):
    """A checkpoint to examine."""

    name: str
    """name in the results, e.g. `teacher` or `d2s`"""
    path: Path
    """folder of the checkpoint"""


class EvalConfig(StrictModel):
    """`logitlake-student eval`: every model on held-out data, and against the teacher's cached distribution."""

    output: Path
    """folder of the results, one JSON file a model"""
    models: tuple[ModelUnderTest, ...] = Field(min_length=1)
    test_data: Path
    """LLaVA JSON with exact answers"""
    image_root: Path
    """folder that its image paths are relative to"""
    lake: str
    """lake whose held-out rows hold the teacher's distribution"""
    cache: str
    """cache of those rows"""
    split: str = "test"
    """split of those rows"""
    caption_task: str = "caption"
    """task whose answers are searched for mentions of objects"""
    existence_task: str = "existence"
    """task of yes/no questions, scored as POPE scores them"""
    mention_pattern: str
    """regular expression whose whole match is one mentioned object"""
    objects_key: str = "objects"
    """key of a record that lists the objects truly in its image"""
    max_new_tokens: int = Field(default=48, gt=0)
    """tokens of an answer, at most; decoding is greedy"""
    batch_size: int = Field(default=128, gt=0)
    """samples of one forward pass"""
    num_examples: int = Field(default=6, ge=0)
    """captions kept for the report"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the models run"""


class ExportConfig(StrictModel):
    """`logitlake-student export`: a trained stage as a stock checkpoint, reloaded and compared before it is kept."""

    run: Path
    """folder of the training run"""
    stage: Literal["init", "d2d", "d2s", "preference"] = "preference"
    """which stage to export"""
    output: Path
    """folder to make"""
    num_samples: int = Field(default=4, gt=0)
    """samples of the lake that trained and exported student are compared on"""
    tolerance: float = Field(default=1e-4, gt=0)
    """largest allowed difference of a logprob, in nats"""
    vllm: Literal["if_installed", "require", "skip"] = "if_installed"
    """whether vLLM must load it too"""


class ReportConfig(StrictModel):
    """`logitlake-student report`: one page and one JSON file about a run."""

    run: Path
    """folder of the training run"""
    evaluation: Path
    """folder of the evaluation's results"""
    teacher: str = "teacher"
    """name of the teacher in those results"""
    lake: str
    """the lake the student learned from"""
    cache: str
    """its cache of samples"""
    html: Path
    """the page to write"""
    summary: Path
    """the JSON file to write"""
    seconds: Path | None = None
    """JSON file {step: seconds} to show; default: the stages' own seconds"""
    title: str = "LogitLake"
    """heading of the page"""
