"""The four stages. The defaults on their fields are the preset `improved`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitlake_shared.config import StrictModel
from logitlake_student.config.targets import DivergenceConfig, ForwardKl, TokenWeights

__all__ = ["STAGE_ORDER", "D2DStage", "D2SStage", "InitStage", "PreferenceStage", "StageConfig"]

STAGE_ORDER = ("init", "d2d", "d2s", "preference")


class _Stage(StrictModel):
    steps: int = Field(gt=0)
    """optimiser steps"""
    tasks: tuple[str, ...] | None = None
    """learn from these tasks only; default: all"""
    batch_size: int = Field(default=64, gt=0)
    """samples (or pairs) of one optimiser step, over all micro-batches"""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """samples of one forward pass; default: all of a rank's part of the batch"""
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
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """end the stage with a moving average of its weights, of this decay a step; default: with the weights themselves"""
    max_skipped: int = Field(default=0, ge=0)
    """steps whose gradient is not finite that may be left out before the stage stops; each is written down"""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """seed of the order of the samples"""
    log_every: int = Field(default=10, gt=0)
    """steps between two lines of metrics"""
    save_every: int = Field(default=100, gt=0)
    """steps between two checkpoints; a multiple of `log_every`, so that a resumed run repeats whole lines"""
    chunk_rows: int = Field(default=256, gt=0)
    """response rows whose logits are alive at one time; memory, not meaning"""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.save_every % self.log_every:
            raise ValueError(f"save_every {self.save_every} is not a multiple of log_every {self.log_every}")
        return self


class _DistillationStage(_Stage):
    divergence: DivergenceConfig = ForwardKl()
    """by what student and teacher are compared; `truncated_kl` and `renormalised_kl` are biased"""
    temperature: Literal[1, 2, 4] = 1
    """of both distributions in the divergence, which then counts temperature² times; the lake must hold the tail's mass
    at it (`codec.temperatures` of the capture)"""
    token_weights: TokenWeights | None = None
    """which tokens count more in the divergence, whose mean is over the weights of the global batch; default: none"""


class InitStage(_DistillationStage):
    """Adaptor init: the projector learns from labels."""

    type: Literal["init"]
    """which stage this is"""
    divergence_weight: float = Field(default=0.0, ge=0)
    """weight of the divergence, per token"""
    ce_weight: float = Field(default=1.0, ge=0)
    """weight of the cross-entropy on the labels, per token"""


class D2DStage(_DistillationStage):
    """Dense to dense: language model and projector learn the teacher's distribution."""

    type: Literal["d2d"]
    """which stage this is"""
    divergence_weight: float = Field(default=1.0, ge=0)
    """weight of the divergence, per token"""
    ce_weight: float = Field(default=0.0, ge=0)
    """weight of the cross-entropy on the labels, per token"""


class D2SStage(_DistillationStage):
    """Dense to sparse: the dense student is upcycled, its feed-forward networks and routers learn on."""

    type: Literal["d2s"]
    """which stage this is"""
    divergence_weight: float = Field(default=1.0, ge=0)
    """weight of the divergence, per token"""
    ce_weight: float = Field(default=0.0, ge=0)
    """weight of the cross-entropy on the labels, per token"""
    num_experts: int = Field(default=4, ge=2)
    """experts of a sparse layer"""
    num_experts_per_tok: int = Field(default=2, ge=1)
    """experts that each token is sent to"""
    layers: Literal["every_other", "all", "first_half", "second_half"] | tuple[int, ...] = "every_other"
    """which layers become sparse"""
    router_seed: int = 0
    """seed of the fresh routers, and of the experts' noise"""
    shared_expert: bool = False
    """keep an expert that every token sees in each sparse layer; a Qwen2 student only"""
    expert_noise: float = Field(default=0.0, ge=0)
    """standard deviation of what each expert's weights are moved by at the start, over that of the weights"""
    balance_weight: float = Field(default=0.01, ge=0)
    """weight of the load-balancing loss: mean over layers, frequencies of the global batch"""
    z_loss_weight: float = Field(default=0.0, ge=0)
    """weight of the router z-loss"""
    bias_rate: float | None = Field(default=None, gt=0)
    """balance without a loss: after every step each expert's chances move by this much against its load, and fall back
    over the last fifth of the steps; 0.001 is DeepSeek-V3's. Usually with `balance_weight = 0`; default: none"""
    capacity_factor: float | None = Field(default=None, gt=0)
    """even shares of a forward pass's tokens that an expert takes in training before it drops the rest; default: all"""
    alert_violation: float = Field(default=0.9, gt=0, le=1)
    """warn when a layer's busiest expert is so far from an even share (0) to all tokens (1); an expert without any is
    always told"""

    @model_validator(mode="after")
    def _is_sparse(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} of num_experts {self.num_experts}")
        if not isinstance(self.layers, str) and (
            not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers)
        ):
            raise ValueError(f"layers: expected distinct indices from 0, got {list(self.layers)}")
        return self


class PreferenceStage(_Stage):
    """Preference distillation: chosen responses gain on rejected ones, measured against a reference."""

    type: Literal["preference"]
    """which stage this is"""
    loss: Literal["dpo", "kto_pair", "ipo", "hinge"] = "dpo"
    """which preference loss; the baseline of `kto_pair` is the mean over the global batch"""
    beta: float = Field(default=0.1, gt=0)
    """how strongly the reference holds"""
    reference: Literal["teacher", "initial_student", "none"] = "teacher"
    """whose logprobs the rewards are measured against; the teacher's are in the lake"""
    nll_weight: float = Field(default=0.1, ge=0)
    """weight of the chosen response's negative log-likelihood per token"""
    anchor_weight: float = Field(default=0.0, ge=0)
    """weight of the anchor that keeps the chosen reward above zero"""
    image_weight: float = Field(default=0.0, ge=0)
    """weight of the image-conditional pair: the chosen response must gain more with its images than without them. The
    teacher as reference must have scored it without them (`no_image_pass` of the pairs)"""
    length_normalised: bool = False
    """divide each response's logprob by its tokens before the loss"""
    balance_weight: float = Field(default=0.01, ge=0)
    """weight of the load-balancing loss: mean over layers, frequencies of the global batch"""
    capacity_factor: float | None = Field(default=None, gt=0)
    """even shares of a forward pass's tokens that an expert takes in training before it drops the rest; default: all"""
    alert_violation: float = Field(default=0.9, gt=0, le=1)
    """warn when a layer's busiest expert is so far from an even share (0) to all tokens (1); an expert without any is
    always told"""


StageConfig = Annotated[InitStage | D2DStage | D2SStage | PreferenceStage, Field(discriminator="type")]
