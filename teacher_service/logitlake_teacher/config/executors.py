"""Where units run: a union on `type`. Nothing here changes a stored byte."""

from typing import Annotated, Literal

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["ExecutorConfig", "InlineExecutorConfig", "RayExecutorConfig"]


class InlineExecutorConfig(StrictModel):
    """One engine in the command's own process."""

    type: Literal["inline"] = "inline"
    grace_s: float = Field(default=30.0, ge=0)
    """seconds that units under way may take to finish after SIGTERM or Ctrl-C; a second signal ends the command"""
    num_threads: int = Field(default=1, gt=0)
    """CPU threads of the engine"""


class RayExecutorConfig(StrictModel):
    """Ray actors, one engine each; a local Ray is started unless `RAY_ADDRESS` names a cluster."""

    type: Literal["ray"] = "ray"
    grace_s: float = Field(default=30.0, ge=0)
    """seconds that units under way may take to finish after SIGTERM or Ctrl-C; a second signal ends the command"""
    num_actors: int = Field(default=2, gt=0)
    """engines that run side by side, at most; those that find no room yet wait for nodes while the others work"""
    min_actors: int = Field(default=1, gt=0)
    """fewer engines than this for `start_timeout_s` end the command with what is missing"""
    cpus_per_actor: int = Field(default=1, gt=0)
    """CPU cores reserved for an actor, and its engine's threads"""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs reserved for an actor, all on one node; default: what the engine needs (vllm: tensor times pipeline
    parallel size, hf on cuda: 1) where the cluster has GPUs when the command starts, else 0"""
    resources: dict[str, float] = Field(default_factory=dict)
    """custom Ray resources that an actor needs, e.g. `{a100 = 1}`"""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """labels of the nodes that may run actors, e.g. `{"ray.io/market-type" = "spot"}`"""
    units_in_flight: int = Field(default=2, gt=0)
    """units of one actor at a time: one is loaded and committed while the teacher works on the other"""
    max_attempts: int = Field(default=4, gt=0)
    """times that a unit is tried when the lake or the teacher fails, and that an actor may fail to start in a row"""
    backoff_s: float = Field(default=1.0, ge=0)
    """wait before a second try; doubled each time, up to a minute, with jitter"""
    unit_timeout_s: float = Field(default=3600.0, gt=0)
    """an actor that finishes no unit for so long hangs: it is killed and its units treated like after a crash"""
    start_timeout_s: float = Field(default=1800.0, gt=0)
    """seconds that actors may wait for a place, and after that a teacher may take to load"""


ExecutorConfig = Annotated[InlineExecutorConfig | RayExecutorConfig, Field(discriminator="type")]
