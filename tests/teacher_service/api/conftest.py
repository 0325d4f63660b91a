"""The teacher service over a small lake."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.served import served
from tests.shared.conftest import small_lake

from logitlake_shared.web.tokens import TokenStore
from logitlake_teacher.api.app import teacher_app
from logitlake_teacher.config.serve import ServeConfig

__all__ = ["small_lake"]


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
            config = {"lake": str(small_lake), "service": service, "sql": {"num_warm": 0}}
            app = teacher_app(ServeConfig.model_validate(config))
            return app, stack.enter_context(served(app))

        yield start
