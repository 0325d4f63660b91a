"""`logitlake-student export` and `report`: what leaves a run."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from logitlake_shared.config import StrictModel

__all__ = ["ExportConfig", "ReportConfig"]


class ExportConfig(StrictModel):
    """`logitlake-student export`: a trained stage as others load it, reloaded and compared before it is kept."""

    run: Path
    """folder of the training run"""
    stage: Literal["init", "d2d", "d2s", "preference"] = "preference"
    """which stage to export"""
    output: Path
    """folder to make"""
    to: Literal["hf", "vllm", "gguf"] = "hf"
    """`hf`: a stock checkpoint for transformers and vLLM; `vllm`: the same, and vLLM must load it; `gguf`: one file for
    llama.cpp"""
    evaluation: Path | None = None
    """folder of the evaluation's results; the figures of just this checkpoint go onto the model card"""
    num_samples: int = Field(default=4, gt=0)
    """samples of the lake that trained and exported student are compared on"""
    tolerance: float = Field(default=1e-4, gt=0)
    """largest allowed difference of a logprob, in nats"""
    vllm: Literal["if_installed", "require", "skip"] = "if_installed"
    """whether vLLM must load an `hf` export too"""
    gguf_type: Literal["f32", "f16"] = "f32"
    """type of the matrices in a `gguf` export; `f32` is exact, and what llama-quantize likes best"""
    llama_cpp: Literal["if_installed", "require", "skip"] = "if_installed"
    """whether llama.cpp (package xllamacpp) must load a `gguf` export"""

    @model_validator(mode="after")
    def _asks_vllm(self) -> Self:
        if self.to == "vllm" and self.vllm == "skip":
            raise ValueError('an export to vllm is kept only if vLLM loads it; leave vllm = "skip" out, or to = "hf"')
        return self


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
