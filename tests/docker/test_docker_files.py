"""What can be known of the images without a container engine: that everything they name is there and means the same.

Building and running them is not tested here (`docs/docker.md` says so).
"""

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from examples.digit_scenes import make
from examples.digit_scenes.demo import steps

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINNED = {
    line.partition("==")[0]
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def compose() -> dict[str, Any]:
    """The compose file with every variable at its default."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DOCKER / "compose.yaml").read_text())
    assert "${" not in text, "a variable without a default"
    document: dict[str, Any] = yaml.safe_load(text)
    return document


SERVICES: dict[str, Any] = compose()["services"]
DEMO_STEPS = {step.name: step.command for step in steps() if not step.name.startswith("sql")}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_every_copied_path_exists_and_is_sent_to_the_builder(dockerfile: Path) -> None:
    """A COPY source is a file or folder of the repository, and `.dockerignore` lets it through."""
    ignore = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    sources = [
        source for name, arguments in instructions(dockerfile) if name == "COPY" for source in arguments.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert source in allowed, source


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_everything_the_wheel_is_made_of_is_copied_before_it_is_installed(dockerfile: Path) -> None:
    """Each package folder, the README and the licence that pyproject names stand in the image when pip runs."""
    before: set[str] = set()
    for name, arguments in instructions(dockerfile):
        if name == "RUN" and "pip install" in arguments:
            break
        if name == "COPY":
            before |= set(arguments.split()[:-1])
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {Path(package).parts[0] for package in wheel["packages"]}
    assert needed | {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= before


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_image_is_pinned_and_its_user_is_not_root(dockerfile: Path) -> None:
    """A base with a version, versions from constraints.txt, and an ordinary user at the end."""
    parsed = instructions(dockerfile)
    base = next(arguments for name, arguments in parsed if name == "ARG" and arguments.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.1[12]-slim-\w+", base)
    assert [arguments for name, arguments in parsed if name == "FROM"] == ["${BASE}"]
    installs = [arguments for name, arguments in parsed if name == "RUN" and "pip install" in arguments]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    users = [arguments for name, arguments in parsed if name == "USER"]
    assert users == ["logitlake"]
    assert parsed.index(("USER", "logitlake")) > max(place for place, (name, _) in enumerate(parsed) if name == "RUN")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_named_extras_and_commands_exist(dockerfile: Path) -> None:
    """The default extra, every extra that the comments offer, and the command of CMD are in pyproject."""
    parsed = instructions(dockerfile)
    default = next(arguments for name, arguments in parsed if name == "ARG" and arguments.startswith("EXTRA="))
    offered = set(re.findall(r"`((?:teacher|student)[a-z-]*)`", dockerfile.read_text()))
    assert {default.partition("=")[2], *offered} <= PROJECT["optional-dependencies"].keys()
    command = next(arguments for name, arguments in parsed if name == "CMD")
    assert yaml.safe_load(command)[0] in PROJECT["scripts"]


def test_compose_builds_from_files_extras_and_versions_that_exist() -> None:
    """Context, Dockerfile, extra and further packages of every service."""
    for name, service in SERVICES.items():
        build = service["build"]
        context = (DOCKER / build["context"]).resolve()
        assert context == REPOSITORY
        dockerfile = context / build["dockerfile"]
        assert dockerfile in DOCKERFILES, name
        declared = {
            arguments.partition("=")[0] for instruction, arguments in instructions(dockerfile) if instruction == "ARG"
        }
        assert build["args"].keys() <= declared
        assert build["args"]["EXTRA"] in PROJECT["optional-dependencies"]
        assert set(build["args"].get("ALSO", "").split()) <= PINNED


def test_compose_starts_what_the_demo_runs_in_its_order() -> None:
    """One service a step of the demo, each waiting for the success of the one before it, all on one volume."""
    assert list(SERVICES) == list(DEMO_STEPS)
    before: str | None = None
    for name, service in SERVICES.items():
        expected = {} if before is None else {before: {"condition": "service_completed_successfully"}}
        assert service.get("depends_on", {}) == expected
        assert service["volumes"] == ["runs:/app/runs"]
        before = name
    assert compose()["volumes"].keys() == {"runs"}


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "data"])
def test_compose_command_means_what_the_demo_command_means(name: str) -> None:
    """The real command line resolves both to the same configuration. The walk-through's stopwatch stays out of it."""
    demo_command = [argument for argument in DEMO_STEPS[name] if not argument.startswith("seconds=")]
    assert _dry_run(SERVICES[name]["command"]) == _dry_run(demo_command)


def test_compose_makes_the_data_that_the_demo_makes() -> None:
    """The same module, and the same options as its own parser reads them."""
    parsed = []
    for command in (SERVICES["data"]["command"], DEMO_STEPS["data"]):
        assert tuple(command[:3]) == ("python", "-m", make.__name__)
        assert isinstance(make.main, click.Command)
        parsed.append(make.main.make_context("make", list(command[3:])).params)
    assert parsed[0] == parsed[1]


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "data"])
def test_image_of_a_service_holds_the_folders_its_configuration_names(name: str) -> None:
    """Paths into the repository are copied into the image; all others lie on the volume."""
    dockerfile = REPOSITORY / SERVICES[name]["build"]["dockerfile"]
    copied = {source for kind, args in instructions(dockerfile) if kind == "COPY" for source in args.split()[:-1]}
    # A part of a plan, "1/4", is no path: those begin with a letter here.
    paths = re.findall(r'"([A-Za-z.][\w./-]*/[\w./-]+)"', _dry_run(SERVICES[name]["command"]))
    assert paths
    for path in (SERVICES[name]["command"][2], *paths):
        if path.startswith("runs/"):
            continue
        assert (REPOSITORY / path).exists(), path
        assert Path(path).parts[0] in copied, path


def test_nothing_that_a_builder_must_not_see_is_sent() -> None:
    """Data, environments and history stay out, whatever is in the working tree."""
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for kept_out in (".git", ".venv", "runs", ".env", "tests", "docker"):
        assert not any(fnmatch.fnmatch(kept_out, pattern) for pattern in allowed)


def _dry_run(command: tuple[str, ...] | list[str]) -> str:
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [str(program), *command[1:], "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stdout
