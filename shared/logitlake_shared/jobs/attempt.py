"""The process of an attempt: `python -m logitlake_shared.jobs.attempt LOCK_FD FOLDER MODULE:COMMAND ARGUMENT...`

It runs one click command and writes down how that ended. It holds the lock that it was born with until it is gone,
whatever ends it; so whoever comes later, even after a restart, knows whether it lives, and that there is no end record
because it was killed.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from logitlake_shared.cli_support import run_cli
from logitlake_shared.durable import create_file

__all__ = ["main"]


def main(lock: str, folder: str, target: str, *arguments: str) -> None:
    """Runs the command in this process; ends as it ends."""
    os.set_inheritable(int(lock), False)
    # Whoever started it writes this, too, and may have been killed before that.
    os.pwrite(int(lock), str(os.getpid()).encode(), 0)
    module, _, name = target.partition(":")
    code = 1
    try:
        command = getattr(import_module(module), name)
        sys.argv = [name, *arguments]
        run_cli(command)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        sys.stdout.flush()
        create_file(Path(folder, "end.json"), json.dumps({"exit_code": code}).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
