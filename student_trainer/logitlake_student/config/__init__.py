"""The configuration of the student trainer: one strict tree for each command.

A stage's defaults stand on its fields and are the preset `improved`. `preset = "faithful"` starts from what the
reference code of arXiv 2408.15881 does instead (`presets.FAITHFUL`, the one table of differences); a field that the
file sets wins over either.

    train       rows, student, stages (`stages`, `targets`, `student`, `presets`)
    evaluation  checkpoints on held-out data
    release     export and report
"""

from logitlake_student.config.evaluation import EvalConfig, ModelUnderTest
from logitlake_student.config.presets import FAITHFUL
from logitlake_student.config.release import ExportConfig, ReportConfig
from logitlake_student.config.stages import (
    STAGE_ORDER,
    D2DStage,
    D2SStage,
    InitStage,
    PreferenceStage,
    StageConfig,
)
from logitlake_student.config.student import StudentConfig
from logitlake_student.config.train import DataConfig, TrainConfig

__all__ = [
    "FAITHFUL",
    "STAGE_ORDER",
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
