"""Configuration trees of the teacher's commands. Alternatives (engine, executor, data source) are unions on `type`.

jobs        what a command reads: `CaptureConfig`, `PairsConfig`
pairs       `[pairs]`: where preference pairs come from
sources     `[[data]]`: where records and images come from
images      `[images]`: which images may be loaded, and what one may cost
engines     `[engine]`: what runs the teacher
executors   `[executor]`: where units run
"""

from logitlake_teacher.config.engines import EngineConfig, FakeEngineConfig, HfEngineConfig, VllmEngineConfig
from logitlake_teacher.config.estimate import EstimateConfig
from logitlake_teacher.config.executors import ExecutorConfig, InlineExecutorConfig, RayExecutorConfig
from logitlake_teacher.config.images import ImagesConfig
from logitlake_teacher.config.jobs import CONFIGS, CaptureConfig, LakeConfig, PairsConfig, PlanConfig, TeacherConfig
from logitlake_teacher.config.pairs import (
    GivenPairs,
    GoldRanking,
    JudgeRanking,
    MadePairs,
    PairsOptions,
    Ranking,
    VisualAdvantageRanking,
)
from logitlake_teacher.config.sources import (
    ConversationSource,
    FakeSource,
    HfDatasetSource,
    LlavaSource,
    OpenAiSource,
    RlaifVSource,
    Source,
    TextSource,
    TokensSource,
)

__all__ = [
    "CONFIGS",
    "CaptureConfig",
    "ConversationSource",
    "EngineConfig",
    "EstimateConfig",
    "ExecutorConfig",
    "FakeEngineConfig",
    "FakeSource",
    "GivenPairs",
    "GoldRanking",
    "HfDatasetSource",
    "HfEngineConfig",
    "ImagesConfig",
    "InlineExecutorConfig",
    "JudgeRanking",
    "LakeConfig",
    "LlavaSource",
    "MadePairs",
    "OpenAiSource",
    "PairsConfig",
    "PairsOptions",
    "PlanConfig",
    "Ranking",
    "RayExecutorConfig",
    "RlaifVSource",
    "Source",
    "TeacherConfig",
    "TextSource",
    "TokensSource",
    "VisualAdvantageRanking",
    "VllmEngineConfig",
]
