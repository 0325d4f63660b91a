"""The warm process of `worker.py` with one more job: the stages of a training configuration, one after the other.

Started by the harness as a script. torch and transformers are imported before the first child is forked, and no thread
of theirs has begun by then: each child computes on one.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers.trainer  # noqa: F401  # heavy: once for all children
import worker

import logitlake_student.trainer  # noqa: F401
from logitlake_student.config import TrainConfig
from logitlake_student.run import train_run


def train(root: str, scenario: Any, say: Callable[..., None]) -> None:
    """What is left to train, into the folder `run` below the root."""
    config = TrainConfig.model_validate(scenario.document | {"output": f"{root}/run"})
    for run, figures in train_run(config):
        say(done=run.stage.type, now=figures is not None)


class _Scenario:
    """What is trained; what `worker.Scenario` is for the lake's own jobs."""

    def __init__(self, path: str) -> None:
        self.document = pickle.loads(Path(path).read_bytes())


if __name__ == "__main__":
    worker.Scenario = _Scenario  # type: ignore[misc,assignment]
    worker.JOBS["train"] = train
    worker.main()
