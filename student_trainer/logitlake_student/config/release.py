"""`logitlake-student export` and `report`: what leaves a run."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["ExportConfig", "ReportConfig"]


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
