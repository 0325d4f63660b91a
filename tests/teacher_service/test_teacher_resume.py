"""Killed at any time and run again, a capture ends with the lake of an uninterrupted run.

Real processes and real SIGKILLs. No test sleeps for luck: the inline teacher kills its own process on a given unit,
and under Ray the teacher waits for ever on one sample, so that the state in which the driver is killed is known.
"""

import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from logitlake_shared.reader import LakeDataset
from logitlake_shared.stopped import RunStopped
from logitlake_teacher.executors import stop_on_signals
from logitlake_teacher.executors.inline import InlineExecutor

Command = Callable[..., Any]

# A capture that shows no progress for this long is broken, however busy the machine.
PATIENCE_SECONDS = 180


def lake_of_an_uninterrupted_run(world: Any, command: Command) -> dict[str, bytes]:
    """The cache as the inline executor writes it when nothing happens."""
    config = world.config(name="whole.toml", lake={"uri": str(world.folder / "whole")})
    assert command("capture", config).code == 0
    return world.contents(lake=world.folder / "whole")


def wait_for_commits(world: Any, process: "subprocess.Popen[str]", number: int) -> None:
    """Reads the command's progress lines, one after each commit, until `number` units are committed."""
    commits = world.lake / "caches" / "capture" / "commits"
    assert process.stderr is not None
    for _ in process.stderr:
        if len(list(commits.glob("*.json"))) >= number:
            return
    pytest.fail(f"the command ended before {number} units were committed")


@pytest.mark.parametrize("num_units", [0, 1, 4])
def test_sigkill_of_an_inline_capture_changes_nothing_in_the_end(
    teacher_world: Any, teacher_command: Command, num_units: int
) -> None:
    """Killed after `num_units` units: those are committed, no snapshot exists; the next run gives the same objects."""
    config = teacher_world.config()
    killed = teacher_world.start("capture", config, f"engine.die_after_calls={num_units}")
    out, err = killed.communicate(timeout=PATIENCE_SECONDS)
    assert killed.returncode == -signal.SIGKILL, (out, err)
    commits = [name for name in teacher_world.contents() if name.startswith("commits/")]
    assert len(commits) == num_units
    assert not [name for name in teacher_world.contents() if name.startswith("snapshots/")]
    done = teacher_command("capture", config)
    assert done.code == 0, done.err
    assert teacher_world.contents() == lake_of_an_uninterrupted_run(teacher_world, teacher_command)
    ids = LakeDataset(teacher_world.lake, "capture").ids()
    assert ids == sorted(set(ids)) == [f"s{number:03d}" for number in range(24)]


@pytest.mark.ray
@pytest.mark.slow
def test_sigkill_of_a_ray_driver_changes_nothing_in_the_end(
    ray_cluster: Any, teacher_world: Any, teacher_command: Command
) -> None:
    """One actor hangs on its unit, the other commits all the rest, the driver is killed; the next run gives the same
    objects as an inline run without faults."""
    whole = lake_of_an_uninterrupted_run(teacher_world, teacher_command)
    num_units = len([name for name in whole if name.startswith("commits/")])
    config = teacher_world.config(executor={"type": "ray", "num_actors": 2, "units_in_flight": 1})
    process = teacher_world.start("capture", config, "engine.hang_on=['s007']")
    wait_for_commits(teacher_world, process, num_units - 1)
    process.kill()
    process.communicate(timeout=PATIENCE_SECONDS)
    again = teacher_world.start("capture", config)
    _, err = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, err
    assert f"going on, {num_units - 1} of {num_units} units" in err
    assert teacher_world.contents() == whole


def num_units(world: Any, command: Command) -> int:
    """Units of the world's capture."""
    return len([name for name in lake_of_an_uninterrupted_run(world, command) if name.startswith("commits/")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_committed_and_says_how_to_go_on(
    teacher_world: Any, teacher_command: Command, number: signal.Signals
) -> None:
    """B14: a teacher that would hang sooner or later; the units that were committed by then are in a snapshot that
    opens, the exit code is the signal's, and the next run does the rest."""
    config = teacher_world.config(executor={"type": "inline", "grace_s": 0.5})
    process = teacher_world.start("capture", config, "engine.hang_on=['s004']")
    wait_for_commits(teacher_world, process, 1)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + number, err
    kept = len([name for name in teacher_world.contents() if name.startswith("commits/")])
    total = num_units(teacher_world, teacher_command)
    assert 0 < kept < total
    assert f"stopped by {number.name}; {kept} of {total} units are committed" in err
    assert "Run the same command to go on" in err
    assert LakeDataset(teacher_world.lake, "capture").ids()
    assert teacher_command("capture", config).code == 0
    assert LakeDataset(teacher_world.lake, "capture").ids() == [f"s{place:03d}" for place in range(24)]


def test_the_unit_under_way_is_finished_after_a_signal() -> None:
    """The signal comes while the third unit is captured: it is told as committed, the fourth is not begun."""
    begun: list[Any] = []
    units: Any = range(6)
    before = signal.getsignal(signal.SIGTERM)

    class SignalledWorker:
        def run(self, unit: Any, _: Any) -> Any:
            begun.append(unit)
            if unit == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return unit

        def close(self) -> None:
            pass

    told: list[Any] = []
    with pytest.raises(RunStopped, match="SIGTERM"), stop_on_signals(PATIENCE_SECONDS) as stop:
        told += InlineExecutor().run(units, SignalledWorker, stop)
    assert told == begun == [0, 1, 2]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_the_command_at_once(teacher_world: Any) -> None:
    """Nobody waits for a grace of an hour."""
    config = teacher_world.config(executor={"type": "inline", "grace_s": 3600})
    process = teacher_world.start("capture", config, "engine.hang_on=['s004']")
    wait_for_commits(teacher_world, process, 1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT), err


@pytest.mark.ray
@pytest.mark.slow
def test_a_signal_ends_a_ray_capture_as_it_ends_an_inline_one(
    ray_cluster: Any, teacher_world: Any, teacher_command: Command
) -> None:
    """One actor hangs, the other has committed all the rest, SIGTERM: a snapshot of the rest, exit code 143."""
    total = num_units(teacher_world, teacher_command)
    config = teacher_world.config(executor={"type": "ray", "num_actors": 2, "units_in_flight": 1, "grace_s": 1})
    process = teacher_world.start("capture", config, "engine.hang_on=['s007']")
    wait_for_commits(teacher_world, process, total - 1)
    process.terminate()
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert f"stopped by SIGTERM; {total - 1} of {total} units are committed" in err
    assert LakeDataset(teacher_world.lake, "capture").ids()


@pytest.mark.ray
@pytest.mark.slow
def test_a_sample_that_kills_the_teacher_is_set_aside(ray_cluster: Any, teacher_world: Any) -> None:
    """Its actor is replaced, its unit searched; it gets an error row and every other sample is captured."""
    config = teacher_world.config(executor={"type": "ray", "num_actors": 2, "backoff_s": 0.05})
    process = teacher_world.start("capture", config, "engine.die_on=['s010']")
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, (out, err)
    assert "Traceback" not in err
    assert "1 teacher_crashed" in err
    assert "'s010'" in err
    expected = [f"s{number:03d}" for number in range(24) if number != 10]
    assert LakeDataset(teacher_world.lake, "capture").ids() == expected


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_of_an_actor_is_the_commands_error(ray_cluster: Any, teacher_world: Any) -> None:
    """A teacher that fails on Ray ends the command with its own message, no traceback."""
    config = teacher_world.config(executor={"type": "ray", "num_actors": 1, "max_attempts": 2, "backoff_s": 0.05})
    process = teacher_world.start("capture", config, "engine.raise_on=['s010']")
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, (out, err)
    assert "Traceback" not in err
    assert "told to fail on sample 's010'" in err


@pytest.mark.ray
@pytest.mark.slow
def test_a_teacher_that_dies_while_loading_is_blamed_on_no_sample(ray_cluster: Any, teacher_world: Any) -> None:
    """The command ends with a message; nothing is committed, nobody is set aside."""
    config = teacher_world.config(executor={"type": "ray", "num_actors": 1, "max_attempts": 2, "backoff_s": 0.05})
    process = teacher_world.start("capture", config, "engine.die_at_start=true")
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, (out, err)
    assert "Traceback" not in err
    assert "while the teacher was being loaded" in err
    assert not [name for name in teacher_world.contents() if name.startswith("commits/")]


@pytest.mark.ray
@pytest.mark.slow
def test_two_hf_actors_write_the_bytes_of_one_inline_engine(teacher_world: Any) -> None:
    """A real forward pass: who computed a unit, and beside whom, does not show in the lake."""
    engine = {"engine": {"type": "hf"}}
    inline = teacher_world.config(name="inline.toml", **engine)
    ray = teacher_world.config(
        name="ray.toml", **engine, lake={"uri": str(teacher_world.folder / "ray")}, executor={"type": "ray"}
    )
    for config in (inline, ray):
        process = teacher_world.start("capture", config)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, (out, err)
    assert teacher_world.contents() == teacher_world.contents(lake=teacher_world.folder / "ray")
