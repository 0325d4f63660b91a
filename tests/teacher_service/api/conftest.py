"""The teacher service over a small lake."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.served import served
from tests.shared.conftest import small_lake

from logitlake_shared.lake import Lake
from logitlake_shared.web.tokens import TokenStore
from logitlake_teacher.api.app import teacher_app
from logitlake_teacher.config.serve import ServeConfig

__all__ = ["small_lake"]

# Of an answer to a request, on a busy machine.
PATIENCE_S = 120.0

Api = Callable[..., httpx.Client]


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    """The service's tokens: none yet."""
    return TokenStore(tmp_path / "tokens.sqlite")


@pytest.fixture
def teacher(small_lake: Path, tmp_path: Path, tokens: TokenStore) -> Iterator[Callable[..., tuple[Any, str]]]:
    """`teacher(max_concurrent=1)`: the application over the small lake with these settings, and its address."""
    with ExitStack() as stack:

        def start(**settings: Any) -> tuple[Any, str]:
            service = {"tokens": tmp_path / "tokens.sqlite"} | settings
            # Workers start when they are needed: most tests ask none.
            config = {"lake": str(small_lake), "service": service, "sql": {"num_warm": 0}, "runs": tmp_path / "runs"}
            app = teacher_app(ServeConfig.model_validate(config))
            return app, stack.enter_context(served(app))

        yield start


@pytest.fixture
def api(teacher_world: Any, tmp_path: Path) -> Iterator[Api]:
    """`api(max_running=2)`: a client of a service over an empty lake that takes jobs, with these settings of theirs."""
    Lake.create(teacher_world.lake)
    with ExitStack() as stack:

        def start(token: str | None = None, service: dict[str, Any] | None = None, **jobs: Any) -> httpx.Client:
            settings = {"folder": tmp_path / "jobs", "data_roots": [tmp_path, teacher_world.model_dir], "look_s": 0.05}
            config = {
                "lake": str(teacher_world.lake),
                "service": {"requests_per_minute": 10**6} | (service or {}),
                "sql": {"num_warm": 0},
                "jobs": settings | jobs,
            }
            url = stack.enter_context(served(teacher_app(ServeConfig.model_validate(config))))
            return stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE_S))

        yield start


@pytest.fixture
def capture(teacher_world: Any) -> Callable[..., dict[str, Any]]:
    """`capture("main", engine={...})`: a submission of the world's capture into a cache."""

    def make(cache: str = "main", **sections: Any) -> dict[str, Any]:
        data = {
            "type": "llava",
            "path": str(teacher_world.folder / "train.json"),
            "image_root": str(teacher_world.folder),
        }
        config = {
            "teacher": {"model_dir": str(teacher_world.model_dir)},
            "engine": {"type": "fake"},
            "lake": {"cache": cache},
            "plan": {"unit_tokens": 100},
            "codec": {"k_max": 8, "k_min": 2},
            "data": [data],
        }
        return {"kind": "capture", "config": config | sections}

    return make
