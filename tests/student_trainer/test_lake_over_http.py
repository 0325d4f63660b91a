"""A student that reads its lake over HTTP, in another process than the service, is the one trained from the disk."""

from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from tests.served import served

from logitlake_shared.store import open_store
from logitlake_shared.web.lake_files import LakeFiles

STAGES = (
    {"type": "d2d", "steps": 4, "log_every": 1},
    {"type": "d2s", "steps": 2, "log_every": 1},
    {"type": "preference", "steps": 2, "log_every": 1, "batch_size": 3},
)
TIMEOUT_S = 240


@pytest.mark.slow
def test_the_student_is_the_same_to_the_last_bit(student_world: Any, tmp_path: Path) -> None:
    """Every stage: samples with pictures, pairs with theirs. Weights and metrics, byte for byte."""
    app = Starlette(routes=[Route("/v1/files/{path:path}", LakeFiles(open_store(student_world.lake), lambda *_: True))])
    lakes = {"disk": str(student_world.lake)}
    with served(app) as url:
        lakes["http"] = f"{url}/v1/files"
        for name, lake in lakes.items():
            config = student_world.file(
                *STAGES, name=f"{name}.toml", data={"lake": lake}, num_threads=1, output=str(tmp_path / name)
            )
            with student_world.start(config) as process:
                _, err = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, err
    for stage in STAGES:
        for name in ("model/model.safetensors", "metrics.jsonl"):
            disk, http = (tmp_path / output / str(stage["type"]) / name for output in lakes)
            assert disk.read_bytes() == http.read_bytes()
