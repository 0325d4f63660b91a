"""What strangers are kept from: the sandbox of SQL workers, the file of tokens; and how many files may be open."""

import os
import resource
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from logitlake_shared.doctor.records import Check, blocked, ok, warn
from logitlake_shared.errors import LogitLakeError
from logitlake_shared.sql_service import Layer, layers

__all__ = ["check_open_files", "check_sandbox", "check_tokens", "safety_checks"]

# A worker of SQL has 256, a reader one for each shard that it holds, Ray some hundred for itself.
_LEAST_FILES = 256
_FEW_FILES = 1024
_SQLITE = b"SQLite format 3\0"


def safety_checks(lake: str | None, tokens: Path | None) -> Iterator[Check]:
    """All of them; `tokens` is the file that the service is to have."""
    yield _sandbox(lake)
    if tokens is not None:
        yield check_tokens(tokens)
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def check_sandbox(found: Sequence[Layer]) -> Check:
    """The layers that a worker enters here."""
    missing = [layer for layer in found if not layer.active]
    shown = f"{len(found) - len(missing)} of {len(found)} layers"
    if not missing:
        return ok("sandbox", shown)
    why = "; ".join(f"without `{layer.name}`: {layer.detail}" for layer in missing)
    return warn(
        "sandbox", f"{shown}; {why}", "docs/sql-service.md says what each stops; sql.required_layers insists on one"
    )


def check_tokens(path: Path) -> Check:
    """The file of tokens: its owner's alone, and what it should be."""
    advice = f"make one with `logitlake-teacher token create NAME --file {path}`"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return blocked("tokens", f"{path}: not a file", advice)
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            return blocked("tokens", f"{path}: others may read it or write to it (mode {mode:o})", f"chmod 600 {path}")
        with path.open("rb") as file:
            head = file.read(len(_SQLITE))
    except FileNotFoundError:
        return warn("tokens", f"{path}: no such file; a service without tokens answers this machine alone", advice)
    except OSError as error:
        return blocked(
            "tokens", f"{path}: {error.strerror}", "make it readable for the user of the service, and no other"
        )
    if head and head != _SQLITE:
        return blocked("tokens", f"{path}: not a file of tokens", advice)
    folder = path.absolute().parent.stat()
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        return blocked("tokens", f"{path}: anybody may replace it", f"chmod o-w {path.absolute().parent}")
    if status.st_uid not in (os.geteuid(), 0):
        return warn("tokens", f"{path}: belongs to user {status.st_uid}", "run the service as that user, or chown it")
    return ok("tokens", f"{path}: its owner's alone")


def check_open_files(soft: int, hard: int) -> Check:
    """How many files a process may have open."""

    def number(limit: int) -> str:
        return "any number" if limit == resource.RLIM_INFINITY else f"{limit:,}"

    shown = number(soft) if soft == hard else f"{number(soft)}, to be raised to {number(hard)}"
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        return ok("open files", shown)
    advice = "raise it: `ulimit -n 65536`, LimitNOFILE= of the unit, --ulimit nofile= of the container"
    return (blocked if soft < _LEAST_FILES else warn)("open files", shown, advice)


def _sandbox(lake: str | None) -> Check:
    """As for the lake: one in an object store is read through the network. A worker looks at none of its objects."""
    try:
        with tempfile.TemporaryDirectory(prefix="logitlake-doctor-") as folder:
            return check_sandbox(layers(lake or folder))
    except (LogitLakeError, OSError) as error:
        return blocked("sandbox", f"no worker of SQL can be started: {error}", "`logitlake-teacher serve` needs one")
