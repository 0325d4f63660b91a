"""Configuration: one clear sentence for every fault, and nothing believed that was not said."""

import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import pytest
from pydantic import AliasChoices, BaseModel, Field, ValidationError, model_validator

from logitlake_shared.config import StrictModel, _sections, load_config, to_toml, write_provenance
from logitlake_shared.errors import ConfigError
from logitlake_shared.spelling import did_you_mean


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
        (["inner.rat=1"], "`inner.rat` is not a known key; did you mean `rate`?"),
        (["inner.quite_another=1"], "`inner.quite_another` is not a known key; remove it or check its spelling"),
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


class Even(StrictModel):
    """An alternative."""

    type: Literal["even"] = "even"
    num_steps: int = 1
    inner: Inner = Inner()


class Odd(StrictModel):
    """Another one, with a field of the first one's kind."""

    type: Literal["odd"] = "odd"
    even: int = 1
    learning_rate: float = Field(default=1.0, validation_alias=AliasChoices("lr", "learning-rate"))

    @model_validator(mode="after")
    def _checked(self) -> Self:
        return self


class Many(StrictModel):
    """Every way in which a section may lie in another."""

    one: Even | None = None
    of_two: Annotated[Even | Odd, Field(discriminator="type")] = Even()
    listed: tuple[Annotated[Even | Odd, Field(discriminator="type")], ...] = ()
    pair: tuple[Even, Inner] = (Even(), Inner())
    named: dict[str, Inner] = {}  # noqa: RUF012  # pydantic copies it
    either: Even | Odd = Even()
    renamed: int = Field(default=1, alias="other-name")
    nested: tuple[tuple[Inner, ...], ...] = ()


@pytest.mark.parametrize(
    ("document", "meant"),
    [
        ({"onw": 1}, "one"),
        ({"other-nme": 1}, "other-name"),
        ({"one": {"num_step": 1}}, "num_steps"),
        ({"one": {"numSteps": 1}}, "num_steps"),
        ({"one": {"inner": {"nam": 1}}}, "name"),
        ({"of_two": {"type": "even", "nun_steps": 1}}, "num_steps"),
        ({"of_two": {"type": "odd", "evn": 1}}, "even"),
        ({"of_two": {"type": "odd", "learning_rte": 1}}, "learning-rate"),
        ({"of_two": {"type": "odd", "num_step": 1}}, None),  # a key of the other one's
        ({"listed": [{"type": "odd"}, {"type": "even", "inner": {"rte": 1}}]}, "rate"),
        ({"pair": [{}, {"raet": 1}]}, "rate"),
        ({"pair": [{"num-steps": 1}, {}]}, "num_steps"),
        ({"named": {"inner": {"rat": 1}}}, "rate"),
        ({"nested": [[{}, {"nmae": 1}]]}, "name"),
        ({"either": {"num_step": 1}}, "num_steps"),
        ({"either": {"type": "odd", "lrr": 1}}, "lr"),
        ({"one": {"x": 1}}, None),
        ({"one": {"": 1}}, None),
    ],
)
def test_an_unknown_key_names_its_nearest(document: dict[str, Any], meant: str | None) -> None:
    """Of the section that it stands in: through lists, tables, alternatives and aliases."""
    with pytest.raises(ValidationError) as caught:
        Many.model_validate(document)
    unknown = [fault["loc"] for fault in caught.value.errors() if fault["type"] == "extra_forbidden"]
    assert unknown
    expected = None if meant is None else f"did you mean `{meant}`?"
    assert expected in [did_you_mean(Many, location) for location in unknown]


def places_of(model: type[BaseModel], path: tuple[int | str, ...] = ()) -> Iterator[tuple[Any, type[BaseModel]]]:
    """Every section of a tree, and where pydantic says it is."""
    yield path, model
    for name, field in model.model_fields.items():
        sections = list(_sections(field.annotation))
        is_list = get_origin(field.annotation) is tuple
        for section in sections:
            tag = (get_args(section.model_fields["type"].annotation)[0],) if len(sections) > 1 else ()
            yield from places_of(section, (*path, name, *((0,) if is_list else ()), *tag))


@pytest.mark.parametrize(
    "tree",
    [
        "teacher.config.jobs:CaptureConfig",
        "teacher.config.jobs:PairsConfig",
        "teacher.config.serve:ServeConfig",
        "student.config.train:TrainConfig",
    ],
)
def test_a_letter_too_few_is_told_in_every_section_of_the_real_trees(tree: str) -> None:
    module, _, name = tree.partition(":")
    root = getattr(import_module(f"logitlake_{module}"), name)
    asked = 0
    for path, section in places_of(root):
        for key in section.model_fields:
            if len(key) > 4:
                assert did_you_mean(root, (*path, key[0] + key[2:])) == f"did you mean `{key}`?", (path, key)
                asked += 1
    assert asked > 20
