"""A small world of LLaVA and RLAIF-V data on disk, and the teacher command as a real process."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NUM_IMAGES = 6
NUM_SAMPLES = 24


def noise_png(seed: int) -> bytes:
    """A 32x32 picture of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels, "RGB").save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class TeacherWorld:
    """Data in `folder`, a tiny teacher, and the command line to use them."""

    folder: Path
    model_dir: Path

    @property
    def lake(self) -> Path:
        """The lake that captures write to unless a test says otherwise."""
        return self.folder / "lake"

    def write_records(self, records: list[dict[str, Any]]) -> None:
        """Replaces the LLaVA file."""
        (self.folder / "train.json").write_text(json.dumps(records), encoding="utf-8")

    def config(self, command: str = "capture", name: str = "config.toml", **sections: dict[str, Any]) -> Path:
        """A TOML file for the fake engine, inline; keys of `sections` override."""
        import tomli_w

        document: dict[str, Any] = {
            "teacher": {"model_dir": str(self.model_dir)},
            "engine": {"type": "fake"},
            "lake": {"uri": str(self.lake), "cache": command},
            "plan": {"unit_tokens": 100, "folder": str(self.folder / "plans")},
        }
        if command == "capture":
            document["data"] = [
                {"type": "llava", "path": str(self.folder / "train.json"), "image_root": str(self.folder)}
            ]
            document["codec"] = {"k_max": 8, "k_min": 2}
        else:
            document["data"] = [{"type": "rlaif_v", "path": str(self.folder / "preference.parquet")}]
        for section, values in sections.items():
            # Another type is another table: its keys are not those of the default.
            document[section] = values if "type" in values else {**document.get(section, {}), **values}
        path = self.folder / name
        path.write_text(tomli_w.dumps(document), encoding="utf-8")
        return path

    def plan(self, kind: Any = "samples", *sources: Any, **options: Any) -> Any:
        """The plan of the sources (default: the LLaVA file) as they are now, for the fake teacher."""
        from logitlake_shared.rendering import Renderer
        from logitlake_teacher.config import FakeEngineConfig, ImagesConfig, LlavaSource, PlanConfig
        from logitlake_teacher.engines.facts import engine_facts
        from logitlake_teacher.planning import make_plan

        own = LlavaSource(path=self.folder / "train.json", image_root=str(self.folder))
        config = PlanConfig(**{"unit_tokens": 100, "folder": self.folder / "plans", **options})
        facts = engine_facts(FakeEngineConfig(), self.model_dir)
        return make_plan(kind, sources or [own], Renderer(self.model_dir), facts, config, ImagesConfig())

    def start(self, command: str, config: Path, *overrides: str) -> "subprocess.Popen[str]":
        """`logitlake-teacher COMMAND CONFIG OVERRIDES...` as a process of its own session."""
        return subprocess.Popen(
            [sys.executable, "-m", "logitlake_teacher.cli", command, str(config), *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )

    def contents(self, cache: str = "capture", lake: Path | None = None) -> dict[str, bytes]:
        """Every object of the cache by its name in the lake: what two captures must have in common."""
        root = (lake or self.lake) / "caches" / cache
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def teacher_world(tmp_path: Path, tiny_teacher: Path) -> TeacherWorld:
    """Six pictures, four questions about each; the last of each picture has two turns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "images").mkdir()
    for number in range(NUM_IMAGES):
        (tmp_path / "images" / f"{number}.png").write_bytes(noise_png(number))
    records = []
    for number in range(NUM_SAMPLES):
        picture, question = divmod(number, NUM_SAMPLES // NUM_IMAGES)
        turns = [
            {"from": "human", "value": f"<image>\nquestion {question}?"},
            {"from": "gpt", "value": f"answer {number}"},
        ]
        if question == 3:
            turns += [{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
        records.append(
            {"id": f"s{number:03d}", "image": f"images/{picture}.png", "conversations": turns, "task": "caption"}
        )
    world = TeacherWorld(tmp_path, tiny_teacher)
    world.write_records(records)
    rows = [
        {
            "ds_name": "made",
            "image": {"bytes": noise_png(number), "path": f"{number}.png"},
            "question": "what is in the picture?",
            "chosen": f"a red {number}",
            "rejected": f"two blue {number}",
            "origin_dataset": "made",
            "origin_split": "caption",
            "idx": number,
            "image_path": f"{number}.png",
        }
        for number in range(NUM_IMAGES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "preference.parquet")
    return world


@pytest.fixture(scope="session")
def shared_ray_cluster() -> Iterator[Any]:
    """A head without room for actors, and two nodes with room for one each: processes of this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for name in ("first", "second"):
        cluster.add_node(num_cpus=1, resources={name: 1})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def ray_cluster(shared_ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cluster, as `RAY_ADDRESS` names it; one for the run, for a local Ray costs each test ten seconds."""
    monkeypatch.setenv("RAY_ADDRESS", shared_ray_cluster.address)
    return shared_ray_cluster


@pytest.fixture
def teacher_command(run_command: Callable[..., Any]) -> Callable[..., Any]:
    """`teacher_command("capture", config, "a.b=c")`: see `run_command`."""
    return partial(run_command, "logitlake-teacher")


@pytest.fixture
def records(teacher_world: TeacherWorld) -> Callable[[], list[dict[str, Any]]]:
    """The records of the LLaVA file, to be changed and written back."""
    return lambda: json.loads((teacher_world.folder / "train.json").read_text(encoding="utf-8"))
