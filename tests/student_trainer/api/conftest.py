"""The student service over the runs of a small world."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.served import served

from logitlake_student.api.app import student_app
from logitlake_student.config.serve import StudentServeConfig

# Of an answer to a request, on a busy machine.
PATIENCE_S = 120.0

StudentApi = Callable[..., httpx.Client]


@pytest.fixture
def student_api(student_world: Any, tmp_path: Path) -> Iterator[StudentApi]:
    """`student_api(max_running=2)`: a client of a service over the folder `runs`, with these settings of its jobs."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    with ExitStack() as stack:

        def start(service: dict[str, Any] | None = None, **jobs: Any) -> httpx.Client:
            roots = [student_world.lake, student_world.checkpoint]
            config = {
                "runs": tmp_path / "runs",
                "service": {"requests_per_minute": 10**6} | (service or {}),
                "jobs": {"folder": tmp_path / "jobs", "data_roots": roots, "look_s": 0.05} | jobs,
            }
            url = stack.enter_context(served(student_app(StudentServeConfig.model_validate(config))))
            return stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE_S))

        yield start


@pytest.fixture
def training(student_world: Any) -> Callable[..., dict[str, Any]]:
    """`training("demo", {"type": "d2d"})`: a submission of these stages into a run."""

    def make(run: str, *stages: dict[str, Any], **sections: Any) -> dict[str, Any]:
        return {"kind": "train", "config": student_world.document(*stages, **sections) | {"output": run}}

    return make
