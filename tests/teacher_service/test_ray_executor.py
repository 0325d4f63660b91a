"""The Ray executor on real actors: what is lost, what is done twice, and what it says, when processes really end.

The workers are made here and not the product's, so that one of them dies where a test wants it; a "record" says which
unit was done, on which node, what was set aside and in how many pieces. The nodes are processes on this machine
(`ray.cluster_utils`), one cluster for the file: a local Ray of its own would cost each test ten seconds.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitlake_shared.errors import ConfigError, DataError, EngineError, LakeError
from logitlake_teacher.config import HfEngineConfig, RayExecutorConfig, VllmEngineConfig
from logitlake_teacher.executors import build_executor
from logitlake_teacher.items import PlannedSample, Unit

pytestmark = [pytest.mark.ray, pytest.mark.slow]

IDS = np.zeros(1, np.int32)
# A head that is not there is reported after five seconds at most; a busy machine gets the rest.
REFUSED_S = 20.0
# A node that joins gets an actor within some seconds.
JOINED_S = 120.0


def units_of(number: int, num_items: int) -> Iterator[Unit]:
    """`u0` to `u<number - 1>`, with items like `u3-0`."""
    for unit in range(number):
        yield Unit(
            f"u{unit}",
            tuple(
                PlannedSample(f"u{unit}-{place}", "t", "s", "train", [], IDS, IDS, IDS, IDS, (), ())
                for place in range(num_items)
            ),
        )


def made_units(number: int, num_items: int = 4) -> list[Unit]:
    """See `units_of`."""
    return list(units_of(number, num_items))


def worker_maker(**faults: Any) -> Callable[[], Any]:
    """A maker of workers that misbehave as told. Everything is inside it: an actor cannot import a test.

    die_on, hang_on     ids of items that end the process, or are never answered
    too_big             units whose items do not fit into memory in one piece
    once                a folder: the first worker that meets `item` there dies (`once_item`)
    fail                `(unit, error class, times)`: the unit raises so often; times are counted in the folder `tally`
    start               an error that making a worker raises
    """

    def make() -> Any:
        import os
        import threading
        from pathlib import Path
        from typing import Any

        import ray

        if "start" in faults:
            raise faults["start"]

        class MadeWorker:
            def run(self, unit: Any, crashed: dict[str, str], pieces: int = 1) -> dict[str, Any]:
                if unit.unit_id in faults.get("too_big", ()) and pieces < 2:
                    raise MemoryError
                name, error, times = faults.get("fail", ("", None, 0))
                if unit.unit_id == name:
                    tally = Path(faults["tally"])
                    seen = len(list(tally.iterdir()))
                    if seen < times:
                        (tally / f"{seen}-{os.getpid()}").touch()
                        raise error(f"try {seen}")
                self.probe([item for item in unit.items if item.item_id not in crashed])
                node = ray.get_runtime_context().get_node_id()
                return {"unit": unit.unit_id, "node": node, "crashed": dict(crashed), "pieces": pieces}

            def probe(self, items: Any) -> None:
                for item in items:
                    if item.item_id in faults.get("die_on", ()):
                        os._exit(1)
                    if item.item_id in faults.get("hang_on", ()):
                        threading.Event().wait()

            def close(self) -> None:
                pass

        return MadeWorker()

    return make


def run(units: Any, make_worker: Callable[[], Any], **config: Any) -> list[dict[str, Any]]:
    """All records of a run on two actors; waits are short, for nobody here is overloaded."""
    executor = build_executor(RayExecutorConfig(**({"num_actors": 2, "backoff_s": 0.05} | config)))
    records: Any = list(executor.run(units, make_worker))
    return records


def test_every_unit_runs_once_and_no_more_are_taken_than_needed(ray_cluster: Any) -> None:
    """Two actors with two units each, and two that wait: the plan is never further ahead than that."""
    taken: list[str] = []

    def plan() -> Iterator[Unit]:
        for unit in made_units(200):
            taken.append(unit.unit_id)
            yield unit

    executor = build_executor(RayExecutorConfig(num_actors=2, units_in_flight=2))
    done: list[str] = []
    record: Any
    for record in executor.run(plan(), worker_maker()):
        done.append(record["unit"])
        # Records that came together are told one by one: the actors may have been given work for all of them.
        assert len(taken) - len(done) <= 2 + 2 * 2 + 2 * 2
    assert sorted(done) == sorted(taken) == sorted(unit.unit_id for unit in made_units(200))


def test_no_units_need_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to do is done, even where no cluster answers."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert run([], worker_maker()) == []


def test_a_sample_that_kills_the_teacher_is_set_aside_and_nobody_else(ray_cluster: Any) -> None:
    """A killer in a unit that runs beside others: its unit comes back without it, the others whole."""
    records = run(made_units(8), worker_maker(die_on=("u5-3",)))
    assert sorted(record["unit"] for record in records) == [f"u{number}" for number in range(8)]
    crashed = {item: text for record in records for item, text in record["crashed"].items()}
    assert crashed.keys() == {"u5-3"}
    assert crashed["u5-3"].startswith("teacher_crashed: the teacher's process ended: ")


def test_a_sample_that_is_never_answered_is_set_aside(ray_cluster: Any) -> None:
    """The actor that waits for it is ended after `unit_timeout_s`; the code says that it was time, not a crash."""
    records = run(made_units(3, num_items=1), worker_maker(hang_on=("u1-0",)), unit_timeout_s=2.0)
    crashed = {item: text for record in records for item, text in record["crashed"].items()}
    assert crashed == {
        "u1-0": "teacher_timeout: the teacher gave no answer within 2 s (executor.unit_timeout_s)",
    }


def test_a_unit_that_does_not_fit_into_memory_is_done_in_pieces(ray_cluster: Any) -> None:
    """B11: as a whole it ends its actor, each half survives: it is captured in two pieces, nobody is set aside."""
    records = run(made_units(3), worker_maker(too_big=("u1",)))
    assert {record["unit"]: record["pieces"] for record in records} == {"u0": 1, "u1": 2, "u2": 1}
    assert not any(record["crashed"] for record in records)


@pytest.mark.parametrize("error", [LakeError, EngineError])
def test_an_error_that_may_go_away_is_tried_again(ray_cluster: Any, tmp_path: Path, error: type[Exception]) -> None:
    """Three failures of a unit and four tries: it is captured. A teacher that failed is not used again."""
    records = run(made_units(4), worker_maker(fail=("u1", error, 3), tally=str(tmp_path)))
    assert sorted(record["unit"] for record in records) == ["u0", "u1", "u2", "u3"]
    pids = [name.name.partition("-")[2] for name in tmp_path.iterdir()]
    assert len(pids) == 3
    if error is EngineError:
        assert len(set(pids)) == 3


def test_an_error_that_stays_is_the_commands_error(ray_cluster: Any, tmp_path: Path) -> None:
    """After `max_attempts` the lake's own error, and nothing of Ray's around it."""
    with pytest.raises(LakeError, match=r"^try 1$"):
        run(made_units(4), worker_maker(fail=("u1", LakeError, 9), tally=str(tmp_path)), max_attempts=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_of_the_data_is_not_tried_again(ray_cluster: Any, tmp_path: Path) -> None:
    """Input that changed does not change back."""
    with pytest.raises(DataError, match=r"^try 0$"):
        run(made_units(4), worker_maker(fail=("u1", DataError, 9), tally=str(tmp_path)))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_teacher_that_explains_why_it_cannot_load_ends_the_run(ray_cluster: Any) -> None:
    """At once, and in its own words: another actor would say the same."""
    with pytest.raises(EngineError, match=r"^no such checkpoint$"):
        run(made_units(4), worker_maker(start=EngineError("no such checkpoint")))


def test_no_room_says_what_is_missing(ray_cluster: Any) -> None:
    """Actors of 64 cores: what one needs, what the biggest node has, within the time that was given."""
    with pytest.raises(EngineError, match="CPU: an actor needs 64, the biggest node has 1,"):
        run(made_units(4), worker_maker(), cpus_per_actor=64, start_timeout_s=1.0)


def test_actors_run_where_the_resources_are(ray_cluster: Any) -> None:
    """A custom resource binds them to the nodes that have it; those that find no room hold nobody up."""
    records = run(made_units(20), worker_maker(), num_actors=5, resources={"first": 1})
    assert len(records) == 20
    assert len({record["node"] for record in records}) == 1


def test_a_killed_node_loses_nothing_and_a_new_one_gets_work(ray_cluster: Any) -> None:
    """One of two nodes dies in the middle, another joins later: every unit once, and all three had some."""
    doomed = ray_cluster.add_node(num_cpus=1)
    executor = build_executor(RayExecutorConfig(num_actors=4, units_in_flight=2, backoff_s=0.05))
    wanted, done, nodes = [], [], set()
    joined = None
    start = time.monotonic()

    def plan() -> Iterator[Unit]:
        """As long as it takes."""
        for unit in units_of(1_000_000, num_items=1):
            if (joined is not None and joined.node_id in nodes) or time.monotonic() - start > JOINED_S:
                return
            wanted.append(unit.unit_id)
            yield unit

    record: Any
    for record in executor.run(plan(), worker_maker()):
        done.append(record["unit"])
        nodes.add(record["node"])
        if doomed is not None and doomed.node_id in nodes:
            ray_cluster.remove_node(doomed, allow_graceful=False)
            doomed = None
            joined = ray_cluster.add_node(num_cpus=1)
    assert sorted(done) == sorted(wanted)
    assert joined is not None
    ray_cluster.remove_node(joined)
    assert joined.node_id in nodes


def test_an_address_without_a_head_is_refused_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for a hundred."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ConfigError, match="no Ray cluster answers there"):
            run(made_units(1), worker_maker())
        assert time.monotonic() - start < REFUSED_S


def test_a_local_ray_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    """HOME may be unwritable; environment and signal handlers are those from before, and a Ray of one's own starts
    afterwards; stdout holds no word of Ray's, though an actor died."""
    code = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.teacher_service.test_ray_executor import made_units, run, worker_maker
before = dict(os.environ)
handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
records = run(made_units(2), worker_maker(die_on=("u1-0",)), num_actors=1)
assert [record["unit"] for record in records] == ["u0", "u1"], records
assert dict(os.environ) == before
assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
assert not list(pathlib.Path.home().iterdir())
os.environ["HOME"] = sys.argv[1]
import ray
ray.init(address="local", include_dashboard=False, num_cpus=1)
ray.shutdown()
print("done")
"""
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**environment, "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_the_actors_are_as_big_as_the_engine() -> None:
    """Four GPUs for tensor parallelism over four; fewer are refused before anything starts."""
    with pytest.raises(ConfigError, match="one teacher over 4 GPUs"):
        build_executor(RayExecutorConfig(gpus_per_actor=2), VllmEngineConfig(tensor_parallel_size=4))
    build_executor(RayExecutorConfig(gpus_per_actor=4), VllmEngineConfig(tensor_parallel_size=4))
    build_executor(RayExecutorConfig(gpus_per_actor=0.5), HfEngineConfig(device="cuda"))
