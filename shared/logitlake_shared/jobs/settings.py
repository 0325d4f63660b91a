"""What a service may be told about its jobs."""

from pathlib import Path

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["JobsSettings"]


class JobsSettings(StrictModel):
    """The part of a service's configuration about jobs that both services share."""

    folder: Path = Path("jobs")
    """where jobs, their logs and their configurations are kept; of this service alone"""
    max_running: int = Field(default=1, gt=0)
    """jobs that run at once; jobs of one cache, or one run, run one after the other anyway"""
    max_light: int = Field(default=2, gt=0)
    """jobs that run beside them because they only read: plans"""
    max_attempts: int = Field(default=3, gt=0)
    """attempts of a job that may end before their time, where the job says nothing else; then it failed"""
    retry_s: float = Field(default=5.0, gt=0)
    """seconds before an interrupted job goes on; twice as many after each further interruption"""
    stop_s: float = Field(default=120.0, gt=0)
    """seconds that an attempt has to end when it is asked to; then it is killed"""
    look_s: float = Field(default=1.0, gt=0)
    """seconds between two looks at the jobs that run"""
    data_roots: tuple[Path, ...] = ()
    """folders that the data, models and outputs of a job may be in; nothing else of the machine is read or written"""
