"""The fault matrix of a lake: one fault at one call, every call in turn, in real processes.

`faults.c` is a library between a child process and libc. It counts the calls that change a lake's folder and breaks
the n-th; the product knows nothing of it. A test's id names what is broken and where, so that one case is replayed by
`pytest tests/faults -k "kill_before and 17"`; nothing is drawn at random without a seed in the id.

    A1  killed at every call           test_kill             A12 two publishers            test_races
    A2-5 a disk that fails             test_errors           A13 a publisher that slept    test_races
    A6  power loss                     test_power_loss       A14 object store faults       test_object_store
    A7-10 damaged shards               test_damage           A16 collection, readers       test_gc_and_readers
    A11, E2 other and half formats     test_formats          A17-19 the catalog            test_catalog_faults
    B1, B2, B10 a teacher killed       test_teacher_kills
                                                             A20, 21 places and clocks     test_places_and_clocks

Here are the shim, compiled once a run, the warm process whose children it breaks, and the small capture they do.
"""

import os
import pickle
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.contract.conftest import s3_bucket, s3_endpoint
from tests.faults.harness import NO_FAULT, Fault, Outcome, Running, Workers
from tests.faults.laws import tree

from logitlake_schemas import CaptureSpec
from logitlake_shared.lake import UnitResult

__all__ = ["Bench", "bench", "finished", "place", "s3_bucket", "s3_endpoint", "shim", "workers"]

_SOURCE = Path(__file__).with_name("faults.c")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that `faults.c` describes. Linux and a C compiler are needed, and are not optional."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("the fault tests compile tests/faults/faults.c: install a C compiler (gcc)")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, _SOURCE, "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, f"{compiler} cannot compile {_SOURCE}:\n{built.stderr}"
    return library


@pytest.fixture(scope="session")
def workers(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """The warm process, one for the run."""
    workers = Workers(shim, tmp_path_factory.mktemp("reports"))
    yield workers
    workers.close()


@dataclass(frozen=True)
class Bench:
    """One lake to break, and the capture that is done in it."""

    workers: Workers
    scenario: Path
    root: Path
    spec: CaptureSpec
    units: list[UnitResult]

    def run(self, job: str, fault: Fault = NO_FAULT, root: Path | str | None = None, **arguments: object) -> Outcome:
        """A job in a child, to its end."""
        return self.workers.run(job, root or self.root, self.scenario, fault, **arguments)

    def start(self, job: str, fault: Fault = NO_FAULT, **arguments: object) -> Running:
        """A job in a child."""
        return self.workers.start(job, self.root, self.scenario, fault, **arguments)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in memory where there is one: a sync is counted there and costs nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="logitlake-faults-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def bench(workers: Workers, place: Path, capture_spec: CaptureSpec, make_unit: Callable[..., UnitResult]) -> Bench:
    """An absent lake and a capture of two units of two samples."""
    units = [make_unit(1), make_unit(2)]
    scenario = place / "scenario.pickle"
    scenario.write_bytes(pickle.dumps({"spec": capture_spec, "units": units}))
    return Bench(workers, scenario, place / "lake", capture_spec, units)


_FINISHED: dict[str, dict[str, bytes]] = {}


@pytest.fixture
def finished(bench: Bench) -> dict[str, bytes]:
    """Every file of the lake after a capture that nothing disturbed: name to bytes. The same for every test."""
    if not _FINISHED:
        root = bench.root.with_name("undisturbed")
        outcome = bench.run("capture", root=root)
        assert outcome.ended == "done", outcome.said
        _FINISHED.update(tree(root))
    return _FINISHED
