"""SIGTERM while a stage trains: it costs no step, however many ranks there are and whichever hears it."""

import signal
from typing import Any

import pytest
from tests.student_trainer.test_resume import results
from tests.student_trainer.torchrun import run_two_ranks, two_ranks

from logitlake_student.checkpoints import newest_checkpoint

# Nine tenths of them are left when the first line of progress is read; no checkpoint is ever due.
STEPS = 100
STAGE = {"type": "d2d", "steps": STEPS, "save_every": 1000}


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
        ranks.say(f"/{STEPS} steps")
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
