"""Executors: `inline` (this process) and `ray` (actors). `build_executor` imports Ray only when it is asked for."""

from logitlake_shared.errors import ConfigError
from logitlake_teacher.config import (
    EngineConfig,
    ExecutorConfig,
    HfEngineConfig,
    InlineExecutorConfig,
    VllmEngineConfig,
)
from logitlake_teacher.executors.base import Committed, Executor, MakeWorker, UnitCost, Worker
from logitlake_teacher.executors.stopping import StopRequest, stop_on_signals

__all__ = [
    "Committed",
    "Executor",
    "MakeWorker",
    "StopRequest",
    "UnitCost",
    "Worker",
    "build_executor",
    "stop_on_signals",
]


def build_executor(config: ExecutorConfig, engine: EngineConfig | None = None) -> Executor:
    """The executor of this configuration, its actors as big as the engine needs.

    Raises `ConfigError` if Ray is asked for and not installed, or an actor is too small for the engine.
    """
    if isinstance(config, InlineExecutorConfig):
        from logitlake_teacher.executors.inline import InlineExecutor

        return InlineExecutor()
    from logitlake_teacher.executors.ray import RayExecutor

    needed = _num_gpus(engine)
    if config.gpus_per_actor and needed > 1 and config.gpus_per_actor < needed:
        raise ConfigError(
            f"executor.gpus_per_actor is {config.gpus_per_actor:g}, but the engine spreads one teacher over {needed} "
            "GPUs (tensor times pipeline parallel size); leave it out, or set it to that"
        )
    return RayExecutor(config, needed)


def _num_gpus(engine: EngineConfig | None) -> int:
    """GPUs of one engine, where there are any."""
    if isinstance(engine, VllmEngineConfig):
        return engine.tensor_parallel_size * engine.pipeline_parallel_size
    return int(isinstance(engine, HfEngineConfig) and engine.device == "cuda")
