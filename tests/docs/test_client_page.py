"""The code on docs/client.md runs as it stands there, but for the service's address and a capture's configuration."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.shared.conftest import small_lake
from tests.teacher_service.api.conftest import Api, api, capture, teacher, tokens
from tests.teacher_service.conftest import teacher_world

import logitlake

__all__ = ["api", "capture", "small_lake", "teacher", "teacher_world", "tokens"]

PAGE = Path(__file__).parents[2] / "docs" / "client.md"


def blocks() -> list[str]:
    """The page's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_questions_and_documents(teacher: Callable[..., tuple[Any, str]]) -> None:
    """The first block, against a real service."""
    names: dict[str, Any] = {}
    exec(blocks()[0].replace("http://127.0.0.1:8321", teacher()[1]), names)
    assert names["frame"].height
    assert names["num_rows"]
    assert names["lake"].cache_names()
    names["client"].close()


def test_jobs(api: Api, capture: Callable[..., dict[str, Any]]) -> None:
    """The second."""
    with logitlake.Client(str(api().base_url)) as client:
        names = {"client": client, "config": capture("main")["config"]}
        exec(blocks()[1], names)
        assert names["done"]["state"] == "succeeded"
