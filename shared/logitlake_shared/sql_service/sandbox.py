"""What the kernel is told to keep from a worker, layer by layer.

The engine is not trusted to hold a question that it was not meant to answer: DuckDB says so itself. So the process
gives up, before it reads a question, what no question needs: writing, other files, other processes, the network,
rights, memory and time without end. `enter_early` comes before there are workers, `enter_own` in each of them, and
`enter_late` when it is known which files its question reads. All say of every layer whether it is active and, where it
is not, why: nothing degrades silently, and who must have a layer names it in `SqlLimits.required_layers`.

A layer is a few system calls by ctypes, so that none needs a package or a privilege. Linux only; elsewhere the layers
say that they are not available.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from logitlake_shared.sql_service.syscalls import DENIED, NUMBERS

__all__ = ["LAYERS", "Layer", "enter_early", "enter_late", "enter_own"]

LAYERS = (
    "environment",
    "network",
    "privileges",
    "session",
    "descriptors",
    "limits",
    "processes",
    "files",
    "calls",
)
"""The layers, in the order in which they are entered; `docs/sql-service.md` says what each one stops."""

_PROCESSES_MORE = 256
# What a worker's environment may hold: where modules and libraries are, and what makes the libraries behave.
_CLEAN = (
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "TZ",
    "LC_CTYPE",
    "MALLOC_ARENA_MAX",
    "JE_ARROW_MALLOC_CONF",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
)

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CLONE_THREAD, _CLONE_NEWUSER, _CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_SIGNALS_BY_FCNTL = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
_SIGNALS_BY_IOCTL = (0x5412, 0x8901, 0x8902)  # TIOCSTI, FIOSETOWN, SIOCSPGRP
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# How many rights over files each version of Landlock knows; then those over ports, then those over other processes.
_LANDLOCK_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}


@dataclass(frozen=True)
class Layer:
    """One layer: whether it is there, and what it does or why it is not."""

    name: str
    active: bool
    detail: str


class _NotAvailableError(Exception):
    """A layer that this kernel or this process cannot have; the message says why."""


def enter_early(*, network: bool) -> list[Layer]:
    """Enters the layers that a process hands on to the workers that it forks. Call it while there is one thread.

    With `network` the network stays: a lake in an object store is read through it.
    """
    return [
        _layer("environment", _clean_environment),
        _layer("network", _keep_network if network else _leave_network),
        _layer("privileges", _drop_privileges),
    ]


def enter_own() -> list[Layer]:
    """Enters the layers that separate a worker from the process that forked it."""
    return [_layer("session", _own_session), _layer("descriptors", _three_descriptors)]


def enter_late(
    readable: Sequence[Path] | None, *, network: bool, memory_bytes: int, cpu_s: int, open_files: int
) -> list[Layer]:
    """Enters the layers that depend on the question: `readable` is all that may be read, None for any file."""
    return [
        _layer("limits", lambda: _limit(memory_bytes, cpu_s, open_files)),
        _layer("processes", _limit_processes),
        _layer("files", lambda: _only_read(readable)),
        _layer("calls", lambda: _filter_calls(network=network)),
    ]


def _layer(name: str, enter: Callable[[], str]) -> Layer:
    try:
        return Layer(name, True, enter())
    except _NotAvailableError as reason:
        return Layer(name, False, str(reason))
    except (OSError, ValueError) as error:
        return Layer(name, False, f"the kernel refused: {error}")


def _own_session() -> str:
    if os.getsid(0) != os.getpid():
        with contextlib.suppress(PermissionError):  # a leader of a group is in a session already
            os.setsid()
    if os.getsid(0) != os.getpid():
        raise _NotAvailableError("the process belongs to the session of the one that started it")
    return "a session of its own: no terminal, killed as a group"


def _clean_environment() -> str:
    kept = {name: value for name, value in os.environ.items() if name in _CLEAN}
    left = sorted(set(os.environ) - set(kept))
    if left:
        raise _NotAvailableError(f"variables that a worker of a local lake would not have: {', '.join(left)}")
    return f"{len(kept)} variables, none of the service's"


def _three_descriptors() -> str:
    more = [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]  # noqa: PTH208  # names are numbers
    for descriptor in more:
        with contextlib.suppress(OSError):  # one is the listing itself
            os.close(descriptor)
    return "two pipes, nothing inherited"


def _keep_network() -> str:
    raise _NotAvailableError("the lake lies in an object store, which is read through the network")


def _leave_network() -> str:
    with contextlib.suppress(OSError):
        _call("unshare", _CLONE_NEWNET)
        return "a network without interfaces"
    try:
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
    except OSError as error:
        raise _NotAvailableError(f"no network of its own ({error}); the layer `calls` refuses sockets") from error
    return "a network without interfaces, in a user namespace"


def _drop_privileges() -> str:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    machine = _machine()
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _syscall(_SYS_CAPSET[machine], header, none)
    return "no capability, none to be gained, no tracing"


def _limit(memory_bytes: int, cpu_s: int, open_files: int) -> str:
    ceiling = _address_space() + memory_bytes
    for what, value in (
        (resource.RLIMIT_AS, ceiling),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (value, value))
    return f"{memory_bytes >> 20} MiB of memory, {cpu_s} s of processor time, {open_files} files, none written"


def _limit_processes() -> str:
    if os.geteuid() == 0:
        raise _NotAvailableError("the kernel does not count the processes of root; the layer `calls` refuses new ones")
    most = _tasks_of(os.getuid()) + _PROCESSES_MORE
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    return f"at most {_PROCESSES_MORE} threads and processes more than this user had"


def _tasks_of(user: int) -> int:
    count = 0
    for process in Path("/proc").glob("[0-9]*/task"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == user:
                count += len(list(process.iterdir()))
    return count


def _only_read(readable: Sequence[Path] | None) -> str:
    if readable is None:
        raise _NotAvailableError("the lake lies in an object store; certificates and modules are read when needed")
    abi = _landlock_version()
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise _NotAvailableError(f"{threads - 1} threads were there before, which Landlock would not bind")
    file_rights = (1 << _LANDLOCK_FILE_RIGHTS[min(abi, 5)]) - 1
    attributes = struct.pack("=QQQ", file_rights, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _syscall(_LANDLOCK_CREATE, attributes[:size], size, 0)
    try:
        for path in readable:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rights = _READ_FILE | (_READ_DIR if path.is_dir() else 0)
                _syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, handle), 0)
            finally:
                os.close(handle)
        _syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)
    return f"Landlock {abi}: {len(readable)} places of the lake can be read, nothing can be written"


def _landlock_version() -> int:
    if platform.system() != "Linux":
        raise _NotAvailableError("Landlock is Linux's")
    try:
        return _syscall(_LANDLOCK_CREATE, None, 0, 1)
    except OSError as error:
        why = "switched off" if error.errno == errno.EOPNOTSUPP else "older than 5.13, or without Landlock"
        raise _NotAvailableError(f"this kernel is {why} ({error})") from error


def _filter_calls(*, network: bool) -> str:
    machine = _machine()
    denied = dict(DENIED[machine])
    if network:
        for name in ("socket", "socketpair", "connect", "bind"):
            denied.pop(name)
    program = _program(machine, list(denied.values()), NUMBERS[machine])
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_program = struct.pack("=H6xQ", len(program), ctypes.addressof(buffer))
    synchronize = 1  # all threads
    if _syscall(_SYS_SECCOMP[machine], 1, synchronize, filter_program) != 0:
        raise _NotAvailableError("a thread could not be bound to the filter")
    return f"{len(denied) + len(NUMBERS[machine])} system calls refused or judged by their arguments"


def _program(machine: str, denied: Sequence[int], judged: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """The filter, as classic BPF: (code, jump if true, jump if false, value)."""
    load, equal, has_bit, answer, at_least = 0x20, 0x15, 0x45, 0x06, 0x35
    allow, refuse, unknown = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    kill = 0x80000000
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def argument(number: int, *, high: bool = False) -> tuple[int, int, int, int]:
        return (load, 0, 0, 16 + 8 * number + (4 if high else 0))

    program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # the calls of x32 have numbers of their own
        program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]
    for number in denied:
        program += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    # Their arguments lie in memory, where a filter cannot look: the C library uses the older call instead.
    for name in ("clone3", "openat2"):
        program += [(equal, 0, 1, judged[name]), (answer, 0, 0, unknown)]
    # A thread, not a process.
    program += [(equal, 0, 4, judged["clone"]), argument(0), (has_bit, 1, 0, _CLONE_THREAD)]
    program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    # To read, not to write.
    for name, place in (("open", 1), ("openat", 2)):
        if name in judged:
            program += [(equal, 0, 4, judged[name]), argument(place), (has_bit, 0, 1, writes)]
            program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    # A signal to oneself, as `abort` sends it.
    program += [(equal, 0, 4, judged["tgkill"]), argument(0), (equal, 1, 0, os.getpid())]
    program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    # Not to have the kernel send signals to others, or put keys into a terminal.
    for name, operations in (("fcntl", _SIGNALS_BY_FCNTL), ("ioctl", _SIGNALS_BY_IOCTL)):
        count = len(operations)
        program += [(equal, 0, count + 3, judged[name]), argument(1)]
        program += [(equal, count - place, 0, operation) for place, operation in enumerate(operations)]
        program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    # To ask for a limit, not to set one.
    program += [(equal, 0, 5, judged["prlimit64"]), argument(2), (equal, 0, 2, 0), argument(2, high=True)]
    program += [(equal, 1, 0, 0), (answer, 0, 0, refuse)]
    program += [(answer, 0, 0, allow)]
    return program


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _machine() -> str:
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in DENIED:
        raise _NotAvailableError(f"the numbers of the system calls are not known for {platform.system()} on {machine}")
    return machine


def _call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, value, 0, 0, 0)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """A system call that the C library has no function for. Raises `OSError`."""
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    given = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(library.syscall(ctypes.c_long(number), *given))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
