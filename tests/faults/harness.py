"""Faults for a child process: what to inject, how to run a job under it, and what the shim saw.

A `Fault` is one environment for `faults.c`. `Workers` runs jobs of `worker.py` in children forked from one warm
process. Nothing here knows what a lake is; the laws are in `laws.py` and the tests.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["NO_FAULT", "Call", "Fault", "Outcome", "Running", "Workers"]

_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Call:
    """One counted call. `errno` is None where the call never returned, and 0 where it succeeded."""

    number: int
    op: str
    path: str
    """relative to the root; `from -> to` for link and rename; without the length for a write"""
    length: int = 0
    """bytes of a write or read"""
    errno: int | None = None


@dataclass(frozen=True)
class Fault:
    """What happens at call `call` of the counted operations: see `faults.c`."""

    do: str = ""
    call: int = 0
    lasting: bool = False
    """every call from `call` on, not that one alone"""
    ops: tuple[str, ...] = ()
    """the operations that are counted; none: all that change something"""
    clock: int = 0
    """seconds that the wall clock is off"""

    def environment(self, root: Path | str, log: Path) -> dict[str, str]:
        """The shim's settings."""
        settings = {
            "FAULTS_ROOT": str(root),
            "FAULTS_LOG": str(log),
            "FAULTS_DO": self.do,
            "FAULTS_CALL": str(self.call),
            "FAULTS_LAST": str(0 if self.lasting else self.call),
            "FAULTS_CLOCK": str(self.clock),
        }
        return settings | ({"FAULTS_OPS": f",{','.join(self.ops)},"} if self.ops else {})


NO_FAULT = Fault()


@dataclass(frozen=True)
class Outcome:
    """How a job ended, what it said and what it did to the disk."""

    ended: str
    """`done`, `raised`, `killed` or `stopped`"""
    said: list[dict[str, Any]]
    calls: list[Call]

    def all(self, key: str) -> list[Any]:
        """Every value that the job said under `key`."""
        return [fact[key] for fact in self.said if key in fact]

    @property
    def error(self) -> dict[str, Any]:
        """What was raised: class name, whether it is one of ours, message, traceback."""
        return next(fact for fact in self.said if "raised" in fact)

    def last_calls(self) -> str:
        """The end of the log, for a failure's message."""
        return "\n".join(f"{call.number} {call.op} {call.path} errno={call.errno}" for call in self.calls[-5:])


@dataclass(frozen=True)
class Running:
    """A job under way."""

    pid: int
    root: Path | str
    report: Path
    log: Path


@dataclass
class Workers:
    """The warm process. Close it."""

    shim: Path
    folder: Path
    """for reports and logs; outside every root"""
    script: Path = _WORKER
    """what the warm process runs: `worker.py`, or a script that adds jobs to it"""
    _started: int = 0
    _process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(self.shim), "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(self.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def start(
        self, job: str, root: Path | str, scenario: Path, fault: Fault = NO_FAULT, **arguments: object
    ) -> Running:
        """Begins a job below `root`."""
        self._started += 1
        report = self.folder / f"{self._started}.report"
        log = self.folder / f"{self._started}.log"
        order = {
            "job": job,
            "root": str(root),
            "scenario": str(scenario),
            "report": str(report),
            "environment": {**_object_store_settings(), **fault.environment(root, log)},
            "arguments": arguments,
        }
        return Running(self._ask(order)["pid"], root, report, log)

    def wait(self, running: Running) -> Outcome:
        """Waits until the job ends, or is stopped."""
        status = self._ask({"wait": running.pid})
        if "code" in status:
            ended = {0: "done", 3: "raised"}[status["code"]]
        else:
            ended = "stopped" if "stopped" in status else "killed"
        said = [json.loads(line) for line in running.report.read_text().splitlines()] if running.report.exists() else []
        return Outcome(ended, said, _calls(running.log, running.root))

    def resume(self, running: Running) -> None:
        """Lets a stopped job go on."""
        os.kill(running.pid, signal.SIGCONT)

    def run(self, job: str, root: Path | str, scenario: Path, fault: Fault = NO_FAULT, **arguments: object) -> Outcome:
        """`start` and `wait`."""
        return self.wait(self.start(job, root, scenario, fault, **arguments))

    def close(self) -> None:
        """Ends the warm process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that runs the faulted children ended; its standard error says why"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _object_store_settings() -> dict[str, str]:
    """Where this test's object store is: the warm process is older than the test."""
    return {key: value for key, value in os.environ.items() if key.startswith("AWS_")}


def _calls(log: Path, root: Path | str) -> list[Call]:
    """The log as calls, in their order."""
    calls: dict[int, dict[str, Any]] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        first, second, third = line.split("\t")
        if first == "=":
            calls[int(second)]["errno"] = int(third)
            continue
        path, length = third, 0
        if second in ("write", "read", "copy"):
            path, _, digits = third.rpartition(":")
            length = int(digits)
        path = " -> ".join(part.removeprefix(str(root)).removeprefix("/") for part in path.split(" -> "))
        calls[int(first)] = {"number": int(first), "op": second, "path": path, "length": length}
    return [Call(**call) for _, call in sorted(calls.items())]
