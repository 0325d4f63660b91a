"""Killed at any time and run again, a stage ends with the weights and the metrics of an uninterrupted run, bit for bit.

Two tests kill a real process. The others end the run at a named point by an exception that nothing catches: what is
on disk is then what a kill at that point leaves.
"""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from logitlake_shared.errors import ConfigError
from logitlake_student import trainer as trainer_module
from logitlake_student.models import assemble as assemble_module
from logitlake_student.models import parameters as parameters_module
from logitlake_student.objectives import distillation as distillation_module

# A training run that shows no progress for this long is broken, however busy the machine.
PATIENCE_SECONDS = 180

D2D = {"type": "d2d"}
STAGES: dict[str, dict[str, Any]] = {
    "d2d": D2D,
    "d2s": {"type": "d2s", "ce_weight": 0.5},
    "preference": {"type": "preference", "reference": "initial_student"},
}


class Killed(BaseException):
    """Ends a run where a test wants it to end."""


def results(folder: Path) -> tuple[bytes, bytes]:
    """The weights and the metrics of a finished stage."""
    return (folder / "model" / "model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_bytes()


def uninterrupted(world: Any, *stages: dict[str, Any]) -> tuple[bytes, bytes]:
    """What a run gives that nothing happens to."""
    return results(world.train(world.train_config(*stages, output=str(world.folder / "whole"))))


def wait_for_checkpoint(process: "subprocess.Popen[str]", stage_dir: Path) -> None:
    """Reads the command's progress lines, one a tenth of the steps, until a checkpoint is there."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if list(stage_dir.glob("checkpoint-*")):
            return
    pytest.fail(f"the command ended before a checkpoint was there: {lines}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d2d", "d2s"])
def test_sigkill_changes_nothing_in_the_end(student_world: Any, student_command: Callable[..., Any], name: str) -> None:
    """A real process is killed as soon as it has a checkpoint; the same command goes on from there."""
    # Steps of some ten milliseconds: seconds of work are left when the first tenth is reported.
    stage = STAGES[name] | {"steps": 200, "save_every": 5}
    config = student_world.file(stage)
    process = student_world.start(config)
    wait_for_checkpoint(process, student_world.output / name)
    process.kill()
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert not (student_world.output / name / "done.json").exists()
    again = student_command("train", config)
    assert again.code == 0, again.err
    done = json.loads((student_world.output / name / "done.json").read_text(encoding="utf-8"))
    assert 0 < done["figures"]["resumed_at_step"] < 200
    assert results(student_world.output / name) == uninterrupted(student_world, stage)


def before(name: str, occasion: int = 1) -> Callable[[pytest.MonkeyPatch, Any], None]:
    """Ends the run instead of the `occasion`-th call of a function."""

    def arm(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        function, calls = getattr(module, name), []

        def counted(*arguments: Any, **keywords: Any) -> Any:
            calls.append(arguments)
            if len(calls) == occasion:
                raise Killed
            return function(*arguments, **keywords)

        monkeypatch.setattr(module, name, counted)

    return arm


# Four steps, a checkpoint every two: what ends the run, and the step that the next one goes on from.
CRASH_POINTS: dict[str, tuple[Any, Callable[[pytest.MonkeyPatch, Any], None], int]] = {
    "before the trainable tensors of the first checkpoint": (trainer_module, before("save_file"), 0),
    "before the first checkpoint has its name": (trainer_module, before("publish_folder"), 0),
    "after it, before old ones are removed": (trainer_module, before("prune_checkpoints"), 2),
    "in a step after it": (distillation_module, before("hidden_response_rows", 4), 2),
    "before the second checkpoint has its name": (trainer_module, before("publish_folder", 2), 2),
    "before the checkpoint of the last step is pruned": (trainer_module, before("prune_checkpoints", 2), 4),
    "before the model has its name": (assemble_module, before("save_student"), 4),
    "before the stage is done": (parameters_module, before("parameter_report"), 4),
}


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_run_that_ends_anywhere_goes_on(student_world: Any, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """At every point of a checkpoint's life: the next run ends with the uninterrupted one's bytes."""
    module, arm, resumed_at = CRASH_POINTS[point]
    config = student_world.train_config(D2D)
    with monkeypatch.context() as patch:
        arm(patch, module)
        with pytest.raises(Killed):
            student_world.train(config)
    folder = student_world.train(config)
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    assert done["figures"]["resumed_at_step"] == resumed_at
    assert results(folder) == uninterrupted(student_world, D2D)
    assert not list(folder.glob("checkpoint-*"))
    assert not (folder / ".building").exists()


@pytest.mark.parametrize("name", ["d2s", "preference"])
def test_sparse_and_preference_stages_go_on(student_world: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The fresh routers and the reference of a resumed stage are those of its beginning, not those of its middle."""
    stage = STAGES[name] | {"micro_batch_size": 2}
    config = student_world.train_config(stage)
    with monkeypatch.context() as patch:
        before("publish_folder", 2)(patch, trainer_module)
        with pytest.raises(Killed):
            student_world.train(config)
    assert results(student_world.train(config)) == uninterrupted(student_world, stage)


def test_a_damaged_checkpoint_costs_its_steps_only(student_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes back to the one before it, says so, and still ends with the same bytes."""
    stage = D2D | {"steps": 6}
    config = student_world.train_config(stage)
    with monkeypatch.context() as patch:
        before("publish_folder", 3)(patch, trainer_module)
        with pytest.raises(Killed):
            student_world.train(config)
    weights = student_world.output / "d2d" / "checkpoint-4" / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint-4: not used: trainable.safetensors is not what was written"):
        folder = student_world.train(config)
    assert json.loads((folder / "done.json").read_text(encoding="utf-8"))["figures"]["resumed_at_step"] == 2
    assert results(folder) == uninterrupted(student_world, stage)


def test_a_half_written_line_of_metrics_is_written_again(student_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the lines of steps that are done again do not stand there twice."""
    config = student_world.train_config(D2D)
    with monkeypatch.context() as patch:
        before("publish_folder", 2)(patch, trainer_module)
        with pytest.raises(Killed):
            student_world.train(config)
    metrics = student_world.output / "d2d" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 4
    metrics.write_text(metrics.read_text() + '{"step": 5, "lo')
    assert results(student_world.train(config)) == uninterrupted(student_world, D2D)


def test_another_configuration_does_not_go_on_from_here(student_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that was begun with one learning rate is not finished with another; the message names the field."""
    with monkeypatch.context() as patch:
        before("publish_folder", 2)(patch, trainer_module)
        with pytest.raises(Killed):
            student_world.train(student_world.train_config(D2D))
    with pytest.raises(ConfigError, match=r"`stage.learning_rate` is 0.001 there, 0.002 here"):
        student_world.train(student_world.train_config(D2D | {"learning_rate": 2e-3}))


def test_rows_that_come_later_do_not_change_the_run(student_world: Any, tmp_path: Path) -> None:
    """The snapshot of the first run stays that of every later one, also of stages that had not begun."""
    from logitlake_shared.lake import Lake, UnitResult
    from logitlake_shared.reader import LakeDataset

    lake = tmp_path / "lake"
    shutil.copytree(student_world.lake, lake)
    world = replace(student_world, lake=lake)
    world.train(world.train_config(D2D))
    sample = LakeDataset(lake, "main", split="train")[4]
    cache = Lake.open(lake).cache("main")
    cache.publish_unit(UnitResult(unit="999999-later", samples=[replace(sample, sample_id="later", image_sha256=())]))
    assert cache.snapshot().number == 2
    d2s = STAGES["d2s"]
    folder = world.train(world.train_config(D2D, d2s))
    identity = json.loads((folder / "done.json").read_text(encoding="utf-8"))["identity"]
    assert identity["lake"]["snapshot"] == 1
    with pytest.raises(ConfigError, match=r"`lake.snapshot` is 1 there, 2 here"):
        world.train(world.train_config(D2D, d2s, data={"snapshot": 2}))
