"""What of a job can be edited, its name and labels, and how nobody overwrites what somebody else wrote meanwhile.

A job's tag changes with these two and with nothing else: a job that goes on is not another one to who edits its labels.
So `ETag` is strong for what PATCH edits, and says nothing of state, counts or figures.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from logitlake_shared.jobs.records import Job
from logitlake_shared.web.problems import Problem

__all__ = ["JobEdit", "Labels", "Name", "check_unchanged", "etag"]

Name = Annotated[str, Field(max_length=100, examples=["nightly"])]
Labels = Annotated[
    dict[Annotated[str, Field(max_length=63)], Annotated[str, Field(max_length=200)]],
    Field(max_length=20, examples=[{"team": "vision"}]),
]


class JobEdit(BaseModel):
    """What a job is to be called from now on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Name | None = None
    """default: the one that it has"""
    labels: Labels | None = None
    """all of them: they replace those that it has; default: those stay"""


def etag(job: Job) -> str:
    """The header's value."""
    return f'"{job.tag}"'


def check_unchanged(if_match: str | None, job: Job) -> None:
    """Raises `Problem` `precondition_failed` where the header names tags, and none is the job's (RFC 9110, 13.1.1)."""
    if if_match is None:
        return
    if not {"*", etag(job)}.intersection(map(str.strip, if_match.split(","))):
        raise Problem(
            "precondition_failed",
            f"name or labels of job {job.id} are others than you looked at: expected {if_match}, got {etag(job)}",
            headers={"ETag": etag(job)},
        )
