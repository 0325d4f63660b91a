"""Two ranks of a program on this machine, as a user starts them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

__all__ = ["TIMEOUT_S", "TwoRanks", "run_two_ranks", "two_ranks"]

# A start, some steps and an end of two processes on a busy machine.
TIMEOUT_S = 240


class TwoRanks:
    """A launcher and its ranks, as long as they last."""

    def __init__(self, launcher: "subprocess.Popen[str]") -> None:
        self._launcher = launcher

    def read_until(self, text: str) -> None:
        """Reads what they say on stderr, until a line holds `text`."""
        assert self._launcher.stderr is not None
        said = []
        for line in self._launcher.stderr:
            said.append(line)
            if text in line:
                return
        pytest.fail(f"they ended and never said {text!r}: {''.join(said)[-6000:]}")

    def signal_launcher(self, number: signal.Signals) -> None:
        """To the launcher, which passes on what asks it to end."""
        self._launcher.send_signal(number)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """To one rank alone."""
        os.kill(self.processes()[rank], number)

    def processes(self) -> dict[int, int]:
        """The process of each rank."""
        found = subprocess.run(["pgrep", "-P", str(self._launcher.pid)], capture_output=True, text=True, check=False)
        environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in found.stdout.split()}
        return {rank: pid for pid, given in environments.items() for rank in (0, 1) if b"\0RANK=%d\0" % rank in given}

    def end(self) -> tuple[int, str]:
        """The launcher's exit code, and all that was said on stderr since it was last read."""
        _, said = self._launcher.communicate(timeout=TIMEOUT_S)
        return self._launcher.returncode, said

    def kill(self) -> None:
        """Whatever is left of them. Each rank has a session of its own."""
        for process in (*self.processes().values(), self._launcher.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextmanager
def two_ranks(*program: str) -> Iterator[TwoRanks]:
    """`torchrun PROGRAM...` on the loopback interface; none of its processes outlives the context."""
    rendezvous = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *rendezvous, *program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        ranks = TwoRanks(launcher)
        try:
            yield ranks
        finally:
            if launcher.poll() is None:
                ranks.kill()


def run_two_ranks(*program: str) -> str:
    """The same, from the beginning to an end that has to be good. Returns what they said on stderr."""
    with two_ranks(*program) as ranks:
        code, said = ranks.end()
    assert code == 0, said[-6000:]
    return said
