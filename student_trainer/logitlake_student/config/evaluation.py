"""`logitlake-student eval`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["EvalConfig", "ModelUnderTest"]


class ModelUnderTest(StrictModel):
    """A checkpoint to examine."""

    name: str
    """name in the results, e.g. `teacher` or `d2s`"""
    path: Path
    """folder of the checkpoint"""


class EvalConfig(StrictModel):
    """`logitlake-student eval`: every model on held-out data, and against the teacher's cached distribution."""

    output: Path
    """folder of the results, one JSON file a model"""
    models: tuple[ModelUnderTest, ...] = Field(min_length=1)
    test_data: Path
    """LLaVA JSON with exact answers"""
    image_root: Path
    """folder that its image paths are relative to"""
    lake: str
    """lake whose held-out rows hold the teacher's distribution"""
    cache: str
    """cache of those rows"""
    split: str = "test"
    """split of those rows"""
    caption_task: str = "caption"
    """task whose answers are searched for mentions of objects"""
    existence_task: str = "existence"
    """task of yes/no questions, scored as POPE scores them"""
    mention_pattern: str
    """regular expression whose whole match is one mentioned object"""
    objects_key: str = "objects"
    """key of a record that lists the objects truly in its image"""
    max_new_tokens: int = Field(default=48, gt=0)
    """tokens of an answer, at most; decoding is greedy"""
    batch_size: int = Field(default=128, gt=0)
    """samples of one forward pass"""
    num_examples: int = Field(default=6, ge=0)
    """captions kept for the report"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the models run"""
