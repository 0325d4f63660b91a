"""Where units run: a union on `type`. Nothing here changes a stored byte."""

from typing import Annotated, Literal

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["ExecutorConfig", "InlineExecutorConfig", "RayExecutorConfig"]


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
