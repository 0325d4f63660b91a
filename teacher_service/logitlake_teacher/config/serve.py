"""`logitlake-teacher serve`: a lake over HTTP."""

from pathlib import Path

from logitlake_shared.config import StrictModel
from logitlake_shared.sql_service.records import SqlLimits
from logitlake_shared.web.settings import ServiceSettings

__all__ = ["ServeConfig"]


class ServeConfig(StrictModel):
    """What the service serves, and how."""

    lake: str
    """folder or object-store address of the lake"""
    tokenizer: Path | None = None
    """the teacher's model folder, to show tokens as text; default: a folder of the teacher's name, if there is one"""
    service: ServiceSettings = ServiceSettings()
    """where it listens, whom it lets in, how much it takes"""
    sql: SqlLimits = SqlLimits()
    """what a question in SQL may cost"""
