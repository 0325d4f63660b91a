"""SIGTERM while a stage trains: it costs no step, however many ranks there are and whichever hears it."""

import os
import signal
from typing import Any

import pytest
from tests.student_trainer.test_resume import results, uninterrupted
from tests.student_trainer.torchrun import TIMEOUT_S, run_two_ranks, two_ranks

from logitlake_shared.stopped import RunStopped
from logitlake_student.checkpoints import newest_checkpoint
from logitlake_student.losses.distillation import distillation_loss
from logitlake_student.objectives import distillation as objective_module

# Nine tenths of them are left when the first line of progress is read; no checkpoint is ever due.
STEPS = 50
STAGE = {"type": "d2d", "steps": STEPS, "save_every": 1000}


def test_a_stop_between_two_lines_of_metrics_changes_neither(
    student_world: Any, metrics_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the steps before it would have added to the next line is in the checkpoint."""
    stage = {"type": "d2d", "steps": 8, "log_every": 4, "save_every": 4}
    calls: list[int] = []

    def asked_in_step_6(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return distillation_loss(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(objective_module, "distillation_loss", asked_in_step_6)
        with pytest.raises(RunStopped, match="SIGTERM"):
            student_world.train(student_world.train_config(stage))
    newest = newest_checkpoint(student_world.output / "d2d")
    assert newest is not None
    assert newest[0] == 6
    assert [line["step"] for line in metrics_of(student_world.output / "d2d")] == [4]
    assert results(student_world.train(student_world.train_config(stage))) == uninterrupted(student_world, stage)


@pytest.mark.slow
@pytest.mark.parametrize(("data_parallel", "heard_by"), [("ddp", "rank 1"), ("fsdp", "the launcher")])
def test_ranks_end_at_one_step_whichever_heard_it(
    student_world: Any, metrics_of: Any, data_parallel: str, heard_by: str
) -> None:
    """One rank alone and not the one that writes, or the launcher, which passes it on: the last step is in a
    checkpoint, though none was due; and the run that goes on from it ends with the weights and the metrics of two ranks
    that nothing happened to, to the last bit."""
    config = student_world.file(STAGE, data_parallel=data_parallel)
    folder = student_world.output / "d2d"
    with two_ranks(*student_world.command(config)) as ranks:
        ranks.read_until(f"/{STEPS} steps")
        if heard_by == "rank 1":
            ranks.signal_rank(1, signal.SIGTERM)
        else:
            ranks.signal_launcher(signal.SIGTERM)
        code, said = ranks.end()
    assert code == 1, said
    assert said.count(f"{student_world.output}: stopped by SIGTERM; run the same command to go on") == 1, said
    if heard_by == "rank 1":  # of ranks that it ended itself torchrun says nothing
        assert said.count("exitcode  : 143") == 2, said
    newest = newest_checkpoint(folder)
    assert newest is not None, said
    assert newest[0] == metrics_of(folder)[-1]["step"] < STEPS
    run_two_ranks(*student_world.command(config))
    whole = student_world.folder / "whole"
    run_two_ranks(*student_world.command(student_world.file(STAGE, data_parallel=data_parallel, output=str(whole))))
    assert results(folder) == results(whole / "d2d")


@pytest.mark.slow
def test_workers_on_ray_end_when_the_command_is_asked_to(student_world: Any, metrics_of: Any) -> None:
    """They hear no signal themselves; and are not taken for failed and started again."""
    folder = student_world.output / "d2d"
    steps = 10 * STEPS  # Ray passes on what they say about a second later
    config = student_world.file(STAGE | {"steps": steps})
    with student_world.start(config, "--ray-workers", "2") as process:
        try:
            assert any(f"/{steps} steps" in line for line in process.stderr)
            process.terminate()
            _, said = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert said.count(f"{student_world.output}: stopped by SIGTERM; run the same command to go on") == 1, said
    newest = newest_checkpoint(folder)
    assert newest is not None, said
    assert newest[0] == metrics_of(folder)[-1]["step"] < steps
    assert not list(student_world.folder.glob(".run.ray/stop-*"))
