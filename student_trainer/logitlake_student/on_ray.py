"""The stages of a run as Ray Train workers: the same training, started, watched and started again by Ray.

Ray says who is who and joins the ranks; data, checkpoints and resuming are the trainer's own, so a run may change
between plain processes, torchrun and Ray. Output and lake must be within reach of every worker, by the same paths.
"""

import os
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from logitlake_shared.errors import TrainingError
from logitlake_student.config import TrainConfig
from logitlake_student.run import train_run

__all__ = ["train_on_ray"]


def train_on_ray(config: TrainConfig, num_workers: int, max_failures: int) -> None:
    """Trains all stages that are not done with `num_workers` ranks, on `RAY_ADDRESS`'s cluster or one started here.

    Ranks that die are started again, with the others, from the newest checkpoint, `max_failures` times. Raises
    `TrainingError` where they gave up.
    """
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), ignore_reinit_error=True)
    on_gpu = config.device == "cuda"
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config={"config": config.model_dump(mode="json"), "folder": str(Path.cwd())},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=max(1, round(config.rank_timeout_s))),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=on_gpu),
        run_config=RunConfig(
            name=config.output.name,
            storage_path=str(config.output.resolve().with_name(f".{config.output.name}.ray")),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray's classes for it differ by version; the cause is in the text
        raise TrainingError(f"training on Ray with {num_workers} workers: the ranks gave up: {error}") from error
    finally:
        ray.shutdown()


def _train_rank(arguments: dict[str, Any]) -> None:
    os.chdir(arguments["folder"])
    for _ in train_run(TrainConfig.model_validate(arguments["config"])):
        pass
