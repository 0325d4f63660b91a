"""Training as jobs: the configuration of `logitlake-student train`, with bounds.

A job writes the run that its `output` names, in the folder of runs; it reads lakes and models below `data_roots`, and
lakes at the addresses that the operator allows.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from logitlake_schemas import layout
from logitlake_shared.config import parse_config
from logitlake_shared.config_paths import check_roots, is_below
from logitlake_shared.errors import ConfigError
from logitlake_shared.jobs.records import Job, NewJob
from logitlake_shared.web.jobs import Resolve, Submission, new_job
from logitlake_student.config import TrainConfig
from logitlake_student.config.serve import StudentJobsSettings

__all__ = ["command_of", "kinds_of_jobs"]


def kinds_of_jobs(runs: Path, settings: StudentJobsSettings) -> Mapping[str, Resolve]:
    """What a submission of each kind becomes."""
    return {"train": partial(_resolve, runs, settings)}


def command_of(job: Job, config: Path) -> Sequence[str]:
    """The command that does a job."""
    return ["logitlake_student.cli:cli", job.kind, str(config)]


def _resolve(runs: Path, settings: StudentJobsSettings, submission: Submission) -> NewJob:
    if submission.plan_digest is not None:
        raise ConfigError("plan_digest: is of captures; leave it out")
    run = submission.config.get("output")
    if not isinstance(run, str) or not layout.valid_name(run):
        raise ConfigError("config: `output` is required: the name of the run, letters, digits and `._-`")
    config = parse_config(TrainConfig, submission.config | {"output": str(runs / run)}, "config")
    check_roots(config.student, settings.data_roots, "student")
    lake = config.data.lake
    if "://" not in lake:
        check_roots(config.data, settings.data_roots, "data")
    elif not is_below(lake, settings.allow_lakes):
        raise ConfigError(f"`data.lake`: {lake!r} is not a lake that jobs may use (jobs.allow_lakes); ask the operator")
    return new_job(submission, config, run, settings)
