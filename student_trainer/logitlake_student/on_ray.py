"""The stages of a run as Ray Train workers: the same training, started, watched and started again by Ray.

Ray says who is who and joins the ranks; data, checkpoints and resuming are the trainer's own, so a run may change
between plain processes, torchrun and Ray. Output and lake must be within reach of every worker, by the same paths.

SIGTERM comes to the command alone. It asks the workers by a file beside the output, since Ray has no way to tell them.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from logitlake_shared.errors import TrainingError
from logitlake_shared.stopped import RunStopped
from logitlake_student.config import TrainConfig
from logitlake_student.run import plan_run, train_run
from logitlake_student.stopping import stop_on_sigterm

__all__ = ["train_on_ray"]


def train_on_ray(config: TrainConfig, num_workers: int, max_failures: int) -> None:
    """Trains all stages that are not done with `num_workers` ranks, on `RAY_ADDRESS`'s cluster or one started here.

    Ranks that die are started again, with the others, from the newest checkpoint, `max_failures` times. Raises
    `TrainingError` where they gave up, and `RunStopped` where SIGTERM ended them.
    """
    storage = config.output.resolve().with_name(f".{config.output.name}.ray")
    storage.mkdir(parents=True, exist_ok=True)
    stop_file = storage / f"stop-{uuid4().hex}"
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), ignore_reinit_error=True)
    on_gpu = config.device == "cuda"
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "folder": str(Path.cwd()),
            "stop_file": str(stop_file),
        },
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=max(1, round(config.rank_timeout_s))),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=on_gpu),
        run_config=RunConfig(
            name=config.output.name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    with stop_on_sigterm(stop_file) as stop:  # `ray.init` has taken the signal for itself
        try:
            trainer.fit()
        except Exception as error:  # Ray's classes for it differ by version; the cause is in the text
            raise TrainingError(f"training on Ray with {num_workers} workers: the ranks gave up: {error}") from error
        finally:
            ray.shutdown()
            stop_file.unlink(missing_ok=True)
        if not all(run.is_done() for run in plan_run(config)):
            stop.check()


def _train_rank(arguments: dict[str, Any]) -> None:
    os.chdir(arguments["folder"])
    with suppress(RunStopped):  # what a rank raises is a failure to Ray, after which it starts them again
        for _ in train_run(TrainConfig.model_validate(arguments["config"]), Path(arguments["stop_file"])):
            pass
