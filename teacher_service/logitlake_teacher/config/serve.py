"""`logitlake-teacher serve`: a lake over HTTP."""

from pathlib import Path

from logitlake_shared.config import StrictModel
from logitlake_shared.jobs.settings import JobsSettings
from logitlake_shared.sql_service.records import SqlLimits
from logitlake_shared.web.settings import ServiceSettings

__all__ = ["ServeConfig", "TeacherJobsSettings"]


class TeacherJobsSettings(JobsSettings):
    """Captures that are submitted over HTTP, and what they may do."""

    ray_address: str | None = None
    """Jobs API (`http://head:8265`) of a Ray cluster that the jobs run on; default: processes of this machine. Paths
    must mean the same there"""
    allow_hosts: tuple[str, ...] = ()
    """hosts that a job's `images.allow_hosts` may name"""
    allow_stores: tuple[str, ...] = ()
    """object stores, with a prefix if need be, that a job may load images from; with this machine's credentials"""


class ServeConfig(StrictModel):
    """What the service serves, and how."""

    lake: str
    """folder or object-store address of the lake"""
    tokenizer: Path | None = None
    """the teacher's model folder, to show tokens as text; default: a folder of the teacher's name, if there is one"""
    runs: Path | None = None
    """folder of the student's runs: a stage that was scored on a cache is shown beside the teacher"""
    service: ServiceSettings = ServiceSettings()
    """where it listens, whom it lets in, how much it takes"""
    sql: SqlLimits = SqlLimits()
    """what a question in SQL may cost"""
    jobs: TeacherJobsSettings | None = None
    """captures as jobs; without this table the service takes none"""
