"""`logitlake-student serve`: runs over HTTP."""

from pathlib import Path

from logitlake_shared.config import StrictModel
from logitlake_shared.jobs.settings import JobsSettings
from logitlake_shared.web.settings import ServiceSettings

__all__ = ["StudentJobsSettings", "StudentServeConfig"]


class StudentJobsSettings(JobsSettings):
    """Training that is submitted over HTTP, and what it may do."""

    allow_lakes: tuple[str, ...] = ()
    """addresses of lakes that a job may learn from, beside folders below `data_roots`"""


class StudentServeConfig(StrictModel):
    """What the service serves, and how."""

    runs: Path
    """folder of the runs: each folder in it is the `output` of one"""
    service: ServiceSettings = ServiceSettings()
    """where it listens, whom it lets in, how much it takes; a token's caches are the names of runs here"""
    jobs: StudentJobsSettings | None = None
    """training as jobs; without this table the service takes none"""
