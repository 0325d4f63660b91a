"""Executors: `inline` (this process) and `ray` (actors). `build_executor` imports Ray only when it is asked for."""

from logitlake_teacher.config import ExecutorConfig, InlineExecutorConfig
from logitlake_teacher.executors.base import Executor, MakeWorker, Worker

__all__ = ["Executor", "MakeWorker", "Worker", "build_executor"]


def build_executor(config: ExecutorConfig) -> Executor:
    """The executor of this configuration. Raises `ConfigError` if Ray is asked for and not installed."""
    if isinstance(config, InlineExecutorConfig):
        from logitlake_teacher.executors.inline import InlineExecutor

        return InlineExecutor()
    from logitlake_teacher.executors.ray import RayExecutor

    return RayExecutor(config)
