"""The warm process of `worker.py` with one more job: a capture by the fake teacher, as `capture` runs it inline.

Started by the harness as a script. What to capture comes pickled, so that a child does nothing but capture.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from worker import JOBS, main

from logitlake_shared.lake import Lake
from logitlake_shared.rendering import Renderer
from logitlake_teacher.capture import capture_unit
from logitlake_teacher.engines import build_engine
from logitlake_teacher.executors import Committed
from logitlake_teacher.executors.inline import InlineExecutor
from logitlake_teacher.items import Unit


class _Worker:
    """A `UnitWorker` that decodes images in its own process: a child that is killed leaves no other behind."""

    def __init__(self, root: str, scenario: dict[str, Any]) -> None:
        self._cache = Lake.open(root).cache("main")
        self._engine = build_engine(scenario["engine"], scenario["setup"])

    def run(self, unit: Unit, crashed: Mapping[str, str]) -> Committed:
        # A renderer is asked for where the teacher writes the answers; here they are given.
        return Committed(capture_unit(self._engine, unit, self._cache, crashed, cast(Renderer, None)), None)

    def close(self) -> None:
        self._engine.close()


def teach(root: str, scenario: Any, say: Callable[..., None], *, everything: bool = False) -> None:
    """What is left of the plan, unit by unit, then a snapshot. With `everything` committed units are done, too."""
    made = scenario.teacher
    cache = Lake.create(root).create_cache("main", made["spec"])
    done = set() if everything else cache.committed_units()
    for unit in done:
        say(found=unit)
    left = (unit for unit in made["units"] if unit.unit_id not in done)
    for committed in InlineExecutor().run(left, lambda: _Worker(root, made)):
        say(committed=committed.record.unit)
    say(snapshot=cache.snapshot().number)


class _Scenario:
    """What a schedule captures; what `worker.Scenario` is for the lake's own jobs."""

    def __init__(self, path: str) -> None:
        self.teacher = pickle.loads(Path(path).read_bytes())


if __name__ == "__main__":
    import worker

    worker.Scenario = _Scenario
    JOBS["teach"] = teach
    main()
