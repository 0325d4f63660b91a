"""Where the data comes from: one `[[data]]` table a source, a union on `type`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["LlavaSource", "RlaifVSource"]


class LlavaSource(StrictModel):
    """Conversations in LLaVA's JSON."""

    type: Literal["llava"] = "llava"
    path: Path
    """the JSON file"""
    image_root: Path = Path()
    """folder that the records' `image` paths are relative to"""
    source: str | None = None
    """name of the source in the lake; default: the file's name"""
    task: str = "chat"
    """task of records that name none"""
    split: str = "train"
    """split of records that name none"""
    limit: int | None = Field(default=None, gt=0)
    """take this many records from the top of the file; default: all"""


class RlaifVSource(StrictModel):
    """Preference pairs in the Parquet form of RLAIF-V."""

    type: Literal["rlaif_v"] = "rlaif_v"
    path: Path
    """the Parquet file"""
    limit: int | None = Field(default=None, gt=0)
    """take this many records from the top of the file; default: all"""
