"""Configuration: one clear sentence for every fault, and nothing believed that was not said."""

import tomllib
from pathlib import Path

import pytest
from pydantic import Field

from logitlake_shared.config import StrictModel, load_config, to_toml, write_provenance
from logitlake_shared.errors import ConfigError


class Inner(StrictModel):
    """A section."""

    rate: float = Field(default=0.5, gt=0)
    """a positive number"""
    name: str | None = None


class Outer(StrictModel):
    """A tree."""

    inner: Inner = Inner()
    stages: tuple[Inner, ...] = (Inner(), Inner())
    count: int = 1


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    """Each layer wins over the one before it."""
    file = tmp_path / "c.toml"
    file.write_text("count = 2\n[inner]\nrate = 0.25\n")
    assert load_config(Outer, None) == Outer()
    config = load_config(Outer, file, ["inner.rate=1e-3", "inner.name=a plain string"])
    assert (config.count, config.inner.rate, config.inner.name) == (2, 1e-3, "a plain string")


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    """stages.1.rate=… changes the second stage of the file."""
    file = tmp_path / "c.toml"
    file.write_text("[[stages]]\nrate = 1.0\n[[stages]]\nrate = 2.0\n")
    assert [stage.rate for stage in load_config(Outer, file, ["stages.1.rate=3.0"]).stages] == [1.0, 3.0]
    with pytest.raises(ConfigError, match="index below 2"):
        load_config(Outer, file, ["stages.2.rate=3.0"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["inner.rat=1"], "`inner.rat` is not a known key"),
        (["inner.rate=-1"], "`inner.rate`: Input should be greater than 0, got -1"),
        (["count=many"], "`count`"),
        (["count"], "expected section.key=value"),
        (["count.deeper=1"], "count"),
    ],
)
def test_each_fault_is_named(overrides: list[str], said: str) -> None:
    """The message holds the key and what was got."""
    with pytest.raises(ConfigError, match=said):
        load_config(Outer, None, overrides)


def test_file_faults_name_the_file(tmp_path: Path) -> None:
    """A missing file and a broken one say so with their path."""
    with pytest.raises(ConfigError, match=r"none\.toml: no such configuration file"):
        load_config(Outer, tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("count = = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_config(Outer, broken)


def test_printed_configuration_loads_back(tmp_path: Path) -> None:
    """--dry-run's output is a configuration file for the same configuration."""
    config = load_config(Outer, None, ["count=7"])
    assert Outer.model_validate(tomllib.loads(to_toml(config))) == config


def test_instances_are_frozen_and_provenance_holds_them(tmp_path: Path) -> None:
    """Nobody changes a configuration after it was read, and it lies beside what it made."""
    config = Outer()
    with pytest.raises(ValueError, match="frozen"):
        config.count = 3  # type: ignore[misc]  # the point of the test
    write_provenance(tmp_path / "out" / "provenance.json", config)
    text = (tmp_path / "out" / "provenance.json").read_text()
    assert '"count": 1' in text
    assert '"logitlake"' in text
