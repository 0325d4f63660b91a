"""Configuration trees of the teacher's commands. Alternatives (engine, executor, data source) are unions on `type`.

jobs        what a command reads: `CaptureConfig`, `PairsConfig`
sources     `[[data]]`: where records and images come from
engines     `[engine]`: what runs the teacher
executors   `[executor]`: where units run
"""

from logitlake_teacher.config.engines import EngineConfig, FakeEngineConfig, HfEngineConfig, VllmEngineConfig
from logitlake_teacher.config.executors import ExecutorConfig, InlineExecutorConfig, RayExecutorConfig
from logitlake_teacher.config.jobs import CaptureConfig, LakeConfig, PairsConfig, PlanConfig, TeacherConfig
from logitlake_teacher.config.sources import LlavaSource, RlaifVSource

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
