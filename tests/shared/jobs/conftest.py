"""A store of jobs, and jobs whose work waits where a test tells it to."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.shared.jobs.work import WorkConfig

from logitlake_shared.jobs.processes import ProcessRunner
from logitlake_shared.jobs.records import Job, JobState, NewJob
from logitlake_shared.jobs.settings import JobsSettings
from logitlake_shared.jobs.states import ACTIVE
from logitlake_shared.jobs.store import JobStore
from logitlake_shared.jobs.supervisor import Supervisor

# A process imports Python and ours in a second or two; a busy machine gets the rest.
PATIENCE_S = 60.0


class Workshop:
    """A folder with a store, a runner and a supervisor without its thread: a test takes its steps."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = JobsSettings(folder=folder / "jobs", **({"retry_s": 0.001} | settings))
        (folder / "gate").exists() or os.mkfifo(folder / "gate")
        self.gate = os.open(folder / "gate", os.O_RDWR)
        self.restart()

    def restart(self) -> None:
        """As if the service's process were another: nothing is kept but what lies in the folder."""
        self.store = JobStore(self.settings.folder / "jobs.sqlite")
        self.runner = ProcessRunner(self.settings.folder / "attempts", command_of)
        self.supervisor = Supervisor(self.store, lambda _: self.runner, self.settings)

    def submit(self, **work: Any) -> Job:
        """A job of this work."""
        job: dict[str, Any] = {"subject": "one"}
        job |= {name: work.pop(name) for name in ("subject", "lane", "max_attempts", "expires_in_s") if name in work}
        config = WorkConfig(folder=self.folder, **work).model_dump(mode="json")
        new = NewJob(
            kind="work", config=config, digest="0", **({"subject": "one", "lane": job.get("subject", "one")} | job)
        )
        return self.store.submit(new, "local")[0]

    def job(self, job: Job) -> Job:
        """The job as it is now."""
        found = self.store.find(job.id)
        assert found is not None
        return found

    def until(self, job: Job, condition: Callable[[Job], bool]) -> Job:
        """Takes steps until the job is so."""
        end = time.monotonic() + PATIENCE_S
        while not condition(self.job(job)):
            assert time.monotonic() < end, (self.job(job), self.log(job))
            self.supervisor.step()
            time.sleep(0.01)  # another process has to get somewhere
        return self.job(job)

    def until_state(self, job: Job, *states: JobState) -> Job:
        """Takes steps until the job is in one of these states."""
        return self.until(job, lambda now: now.state in states)

    def until_it_waits(self, job: Job) -> Job:
        """Takes steps until the newest attempt's work waits at the gate."""
        return self.until(
            job, lambda now: now.state in ACTIVE and "waits" in now.figures and now.figures["pid"] == self.pid(now)
        )

    def pid(self, job: Job) -> int:
        """The process of the job's newest attempt; 0 before it has one."""
        lock = self.settings.folder / "attempts" / job.id / str(len(self.job(job).attempts)) / "lock"
        return int((lock.read_text() if lock.exists() else "") or 0)

    def open_gate(self) -> None:
        """Lets work that waits go on, once."""
        os.write(self.gate, b"x")

    def done(self) -> list[str]:
        """What was done, item by item."""
        path = self.folder / "done"
        return path.read_text().split() if path.exists() else []

    def log(self, job: Job) -> str:
        """What the newest attempt wrote."""
        number = len(self.job(job).attempts)
        return self.runner.log_tail(job, number, 10_000).decode() if number else ""

    def states(self, job: Job) -> list[str]:
        """The states that the job was in, in order."""
        return [event.data["to"] for event in self.store.events(job.id, 0, 1000) if event.event == "state"]


def command_of(job: Job, config: Path) -> list[str]:
    """The command of every job here."""
    return ["tests.shared.jobs.work:cli", str(config)]


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    """One, whose processes end with the test."""
    made = Workshop(tmp_path)
    try:
        yield made
    finally:
        for job in made.store.unfinished(*ACTIVE):
            made.runner.stop(job, len(job.attempts), now=True)
        os.close(made.gate)
