"""A process that forks one child for each job, so that a fault costs milliseconds and not an interpreter's start.

It is started by `tests.faults.harness` with the shim preloaded, imports the product once, touches no store itself and
then reads orders, one JSON line each. A child sets the fault's environment, arms the shim, does its job and writes what
it did, line by line and each with the number of calls counted by then, to a file of its own: a child that is killed
has said everything it did before.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from logitlake_shared.catalog import open_catalog, publish_catalog
from logitlake_shared.errors import LakeConflictError, LogitLakeError
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_shared.tools.gc import collect, find_garbage

# A child that hangs is ended by the kernel; no job takes a second.
_DEADLINE_S = 120
# A snapshot reads every record of its cache; caches that stay small keep a round cheap.
ROUNDS_OF_A_CACHE = 20

Say = Callable[..., None]


class Scenario:
    """What a capture publishes: a spec and units, pickled by the test."""

    def __init__(self, path: str) -> None:
        loaded = pickle.loads(Path(path).read_bytes())
        self.spec = loaded["spec"]
        self.units: list[UnitResult] = loaded["units"]


def capture(root: str, scenario: Scenario, say: Say, *, everything: bool = False, snapshot: bool = True) -> None:
    """A whole capture, as a resumed one does it: make what is missing, publish what is not committed, pin it.

    With `everything` units are published whether they are committed or not.
    """
    cache = Lake.create(root).create_cache("main", scenario.spec)
    done = set() if everything else cache.committed_units()
    for unit in scenario.units:
        if unit.unit not in done:
            cache.publish_unit(unit)
        say(committed=unit.unit)
    if snapshot:
        say(snapshot=cache.snapshot().number)


def make(root: str, scenario: Scenario, say: Say) -> None:
    """A lake and its cache, and nothing in it."""
    Lake.create(root).create_cache("main", scenario.spec)


def publish(root: str, scenario: Scenario, say: Say, *, unit: int, content_of: int | None = None) -> None:
    """One unit, by its place; with `content_of` another's rows under its name."""
    content = scenario.units[unit if content_of is None else content_of]
    _cache(root).publish_unit(replace(content, unit=scenario.units[unit].unit))
    say(committed=scenario.units[unit].unit)


def snapshot(root: str, scenario: Scenario, say: Say) -> None:
    """The next snapshot."""
    say(snapshot=_cache(root).snapshot().number)


def read(root: str, scenario: Scenario, say: Say) -> None:
    """Everything the newest snapshot holds, as a digest of its rows."""
    dataset = LakeDataset(root, "main")
    digest = hashlib.sha256()
    for place in range(len(dataset)):
        digest.update(pickle.dumps(dataset[place]))
    say(rows=len(dataset), digest=digest.hexdigest())


def gc(root: str, scenario: Scenario, say: Say) -> None:
    """Collection that waits for nobody: what is garbage now goes, however young."""
    lake = Lake.open(root)
    for garbage in find_garbage(lake, grace_s=0):
        say(listed=garbage.path)
        collect(lake, [garbage])


def catalog(root: str, scenario: Scenario, say: Say) -> None:
    """The catalog of the newest snapshots, published."""
    say(catalog=publish_catalog(Lake.open(root)))


def ask(root: str, scenario: Scenario, say: Say) -> None:
    """What a SQL client sees."""
    with open_catalog(root) as opened:
        found = opened.query("SELECT sample_id, task, num_tokens FROM sample_index ORDER BY sample_id").to_pylist()
        tokens = opened.query("SELECT count(*) AS tokens, sum(label_logprob) AS total FROM tokens").to_pylist()
    say(rows=found, tokens=tokens)


def race(root: str, scenario: Scenario, say: Say, *, rounds: int, kind: str) -> None:
    """Two processes that meet at a barrier before every round and then publish the same thing, or different things.

    `unit`: both publish one unit of equal content. `conflict`: one unit, each with content of its own. `snapshot`: a
    unit each, and the next snapshot at once. Says what each of them got in each round. Every twenty rounds they go on
    in another cache, and race to create it.
    """
    barrier = multiprocessing.get_context("fork").Barrier(2, timeout=_DEADLINE_S)
    children = []
    for me in range(2):
        child = os.fork()
        if not child:
            try:
                for number in range(rounds):
                    barrier.wait()
                    say(round=number, by=me, got=_publish(root, scenario, kind, number, me))
            except BaseException:
                say(broken=traceback.format_exc())
                barrier.abort()
                os._exit(1)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _publish(root: str, scenario: Scenario, kind: str, number: int, me: int) -> dict[str, Any]:
    cache = Lake.create(root).create_cache(f"block-{number // ROUNDS_OF_A_CACHE:02d}", scenario.spec)
    name = f"{number:06d}-{me if kind == 'snapshot' else 'both'}"
    content = scenario.units[me if kind == "conflict" else 0]
    samples = [replace(sample, sample_id=f"{name}-{place}") for place, sample in enumerate(content.samples)]
    unit = replace(content, unit=name, samples=samples)
    try:
        record = cache.publish_unit(unit)
    except LakeConflictError as error:
        return {"conflict": str(error)}
    if kind == "snapshot":
        return {"unit": name, "snapshot": cache.snapshot().number}
    return {"unit": name, "shards": [entry.sha256 for entry in record.shards]}


def _cache(root: str) -> Cache:
    return Lake.open(root).cache("main")


JOBS: dict[str, Callable[..., None]] = {
    job.__name__: job for job in (capture, make, publish, snapshot, read, gc, catalog, ask, race)
}


def _child(order: dict[str, Any]) -> None:
    """Does the job and ends the process. Exit code 0: done, 3: it raised, and the last line says what."""
    signal.alarm(_DEADLINE_S)
    report = os.open(order["report"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    shim = ctypes.CDLL(None)

    def say(**fact: object) -> None:
        os.write(report, json.dumps({**fact, "after": shim.faults_counted()}).encode() + b"\n")

    code = 0
    try:
        os.environ.update(order["environment"])
        scenario = Scenario(order["scenario"])
        shim.faults_arm()
        JOBS[order["job"]](order["root"], scenario, say, **order["arguments"])
    except BaseException as error:
        code = 3
        say(
            raised=type(error).__name__,
            explained=isinstance(error, LogitLakeError),
            message=str(error),
            traceback=traceback.format_exc(),
        )
    os._exit(code)


def main() -> None:
    """Takes orders until its input ends: `{"job": …}` starts a child, `{"wait": pid}` waits until it ends or stops."""
    # What the first child would import or set up, each child would: pyarrow looks for pandas at its first conversion.
    pa.array([0])
    _answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], os.WUNTRACED)
            if os.WIFSTOPPED(status):
                answer = {"stopped": os.WSTOPSIG(status)}
            elif os.WIFSIGNALED(status):
                answer = {"signal": os.WTERMSIG(status)}
            else:
                answer = {"code": os.WEXITSTATUS(status)}
        else:
            pid = os.fork()
            if not pid:
                _child(order)
            answer = {"pid": pid}
        _answer(answer)


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
