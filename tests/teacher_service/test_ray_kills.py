"""Captures on a two-node Ray cluster whose actors, nodes and drivers are killed, by seed, where the seed says.

Everything is the product's: plan, executor, workers, fake teacher, lake. What must hold is in `tests.faults.laws`, and
that the lake is in the end byte for byte the one that the inline executor writes when nothing happens.
"""

import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.faults.laws import assert_counted_once, assert_nothing_torn, findings

from logitlake_shared.config import load_config
from logitlake_shared.reader import LakeDataset
from logitlake_teacher import service
from logitlake_teacher.config import CaptureConfig
from logitlake_teacher.executors import build_executor
from logitlake_teacher.worker import CaptureJob, UnitWorker

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Command = Callable[..., Any]

PATIENCE_S = 180
NUM_ACTOR_SCHEDULES, NUM_DRIVER_SCHEDULES = 8, 3
# Two find room, the third waits until a node joins.
RAY = {"type": "ray", "num_actors": 3, "backoff_s": 0.05}


class Capture:
    """A capture of the small world on the cluster, told record by record, so that a test can interrupt between two."""

    def __init__(self, world: Any, command: Command) -> None:
        self.root: Path = world.lake
        self.file = world.config(executor=RAY, plan={"unit_tokens": 40}, lake={"uri": str(world.lake), "cache": "main"})
        whole = world.folder / "whole"
        inline = [f"lake.uri={whole}", "executor={type='inline'}"]
        assert command("capture", self.file, *inline).code == 0
        self.expected = world.contents("main", whole)
        self.world = world
        self.config = load_config(CaptureConfig, self.file)
        self.prepared = service.prepare(self.config)
        self.cache = service.open_cache(self.config, self.prepared)

    def records(self) -> Iterator[Any]:
        """Runs what is left."""
        units = service.remaining_units(self.config, self.prepared, self.cache)
        prepared, lake = self.prepared, self.config.lake
        job = CaptureJob(
            prepared.kind, str(self.root), lake.cache, self.config.engine, prepared.setup, self.config.images
        )
        executor = build_executor(self.config.executor, self.config.engine)
        for done in executor.run(units, partial(UnitWorker, job)):
            yield done.record

    def assert_whole(self) -> None:
        """The lake that the inline executor wrote, every sample once, nothing else in it."""
        service.summarise(self.cache)
        # What a killed writer leaves half written is no object, and collection names it: `assert_nothing_torn`.
        written = {name: data for name, data in self.world.contents("main").items() if "#" not in name}
        assert written == self.expected
        assert findings(self.root) == []
        assert LakeDataset(self.root, "main").ids() == [f"s{number:03d}" for number in range(24)]


@pytest.fixture
def capture(teacher_world: Any, teacher_command: Command) -> Capture:
    """See `Capture`."""
    return Capture(teacher_world, teacher_command)


def actor_pids(ray_cluster: Any) -> list[int]:
    """The processes of our cluster's actors: children of its nodes, by the title that Ray gives them."""
    nodes = {entry.process.pid for node in ray_cluster.list_all_nodes() for entry in node.all_processes["raylet"]}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if parent in nodes and title.startswith(b"ray::_ActorWorker"):
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.parametrize("seed", range(NUM_ACTOR_SCHEDULES))
def test_actors_that_are_killed_change_nothing_in_the_end(ray_cluster: Any, capture: Capture, seed: int) -> None:
    """B1: SIGKILL of a drawn actor after drawn commits, up to three times in one run."""
    draw = random.Random(seed)
    points = set(draw.sample(range(1, 12), draw.randint(1, 3)))
    acknowledged: set[str] = set()
    for record in capture.records():
        assert record.unit not in acknowledged, "a unit was told twice"
        acknowledged.add(record.unit)
        pids = actor_pids(ray_cluster)
        if len(acknowledged) in points and pids:
            os.kill(draw.choice(pids), signal.SIGKILL)
        assert acknowledged <= capture.cache.committed_units()
    assert_nothing_torn(capture.root, acknowledged)
    capture.assert_whole()


def test_a_node_that_is_killed_changes_nothing_in_the_end(ray_cluster: Any, capture: Capture) -> None:
    """B10: one of three nodes goes with all that runs on it; the others do the rest."""
    doomed = ray_cluster.add_node(num_cpus=1)
    for number, _ in enumerate(capture.records()):
        if number == 1:
            ray_cluster.remove_node(doomed, allow_graceful=False)
    capture.assert_whole()


@pytest.mark.parametrize("seed", range(NUM_DRIVER_SCHEDULES))
def test_a_driver_that_is_killed_is_finished_by_the_next(ray_cluster: Any, capture: Capture, seed: int) -> None:
    """B10: SIGKILL of the command after a drawn progress line; the next command does what is left."""
    draw = random.Random(seed)
    planned = {unit.unit_id: [item.item_id for item in unit.items] for unit in capture.prepared.plan.units}
    acknowledged: set[str] = set()
    for point in (draw.randint(0, 4), 99):
        process = capture.world.start("capture", capture.file)
        assert process.stderr is not None
        for number, _ in enumerate(process.stderr):
            if number == point:
                process.kill()
        process.communicate(timeout=PATIENCE_S)
        assert_nothing_torn(capture.root, acknowledged)
        pending = assert_counted_once(capture.root, planned)
        acknowledged = capture.cache.committed_units()
    assert process.returncode == 0
    assert pending == 0
    capture.assert_whole()
