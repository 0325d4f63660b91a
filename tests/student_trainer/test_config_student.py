"""The student's configuration: presets, templates, the table in the README, and every mistake by name."""

import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import logitlake_student
from logitlake_shared.config import field_table, load_config, to_toml
from logitlake_shared.errors import ConfigError
from logitlake_student.config import (
    FAITHFUL,
    STAGE_ORDER,
    EvalConfig,
    ExportConfig,
    ReportConfig,
    TrainConfig,
)
from logitlake_student.config.serve import StudentServeConfig

PACKAGE = Path(logitlake_student.__file__).parent
CONFIGS = sorted((PACKAGE / "configs").glob("*.toml"))
EXAMPLE = PACKAGE.parents[1] / "examples" / "digit_scenes" / "configs" / "train.toml"
COMMANDS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "serve": StudentServeConfig,
}

MINIMAL: dict[str, Any] = {
    "output": "out",
    "student": {"checkpoint": "dense"},
    "data": {"lake": "lake", "samples": "main", "pairs": "pairs"},
    "stages": [{"type": name, "steps": 10, "learning_rate": 1e-3} for name in STAGE_ORDER],
}


def with_preset(preset: str, **stage: Any) -> TrainConfig:
    """The minimal configuration under a preset, with settings for the preference stage."""
    stages = [*MINIMAL["stages"][:-1], MINIMAL["stages"][-1] | stage]
    return TrainConfig.model_validate(MINIMAL | {"preset": preset, "stages": stages})


# ---- presets ----


def test_the_presets_differ_in_the_faithful_table_and_nowhere_else() -> None:
    """Field by field: what `faithful` changes is what `FAITHFUL` lists, and all of it is a change."""
    improved, faithful = with_preset("improved"), with_preset("faithful")
    differences = {
        one.type: {
            name: getattr(other, name) for name in type(one).model_fields if getattr(one, name) != getattr(other, name)
        }
        for one, other in zip(improved.stages, faithful.stages, strict=True)
    }
    assert differences == FAITHFUL
    assert improved.model_dump(exclude={"preset", "stages"}) == faithful.model_dump(exclude={"preset", "stages"})


def test_what_the_file_sets_wins_over_the_preset() -> None:
    """Also where it sets the other preset's value."""
    stage = with_preset("faithful", loss="dpo").stages[-1]
    assert (stage.type, stage.adam_beta2) == ("preference", 0.98)
    assert stage.type == "preference"
    assert stage.loss == "dpo"


@pytest.mark.parametrize("stages", [3, "d2d", [3], [{"steps": 1}], [{"type": ["d2d"]}]])
def test_stages_that_are_none_are_refused_under_both_presets(stages: Any, tmp_path: Path) -> None:
    """A message and no traceback, whatever stands there."""
    import tomli_w

    for preset in ("improved", "faithful"):
        path = tmp_path / f"{preset}.toml"
        path.write_text(tomli_w.dumps(MINIMAL | {"preset": preset, "stages": stages}), encoding="utf-8")
        with pytest.raises(ConfigError, match="stages"):
            load_config(TrainConfig, path)


# ---- templates ----


@pytest.mark.parametrize("path", [*CONFIGS, EXAMPLE], ids=lambda path: f"{path.parts[-3]}-{path.name}")
def test_a_shipped_configuration_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    """`--dry-run` of a template is itself a configuration, equal to it; under the other preset too."""
    for overrides in ([], ["preset=faithful"]):
        config = load_config(COMMANDS[path.stem], path, overrides if path.stem == "train" else [])
        (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
        assert load_config(COMMANDS[path.stem], tmp_path / "resolved.toml") == config


def test_the_template_names_all_stages_in_order() -> None:
    """A newcomer sees the whole recipe."""
    document = tomllib.loads((PACKAGE / "configs" / "train.toml").read_text(encoding="utf-8"))
    assert tuple(stage["type"] for stage in document["stages"]) == STAGE_ORDER


# ---- the README ----


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_holds_the_table_of_all_fields(command: str) -> None:
    """Between its markers stands what `field_table` makes of the configuration now."""
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    _, _, rest = text.partition(f"<!-- fields of {command} -->\n")
    table, end, _ = rest.partition("<!-- end -->")
    assert end
    assert table.strip() == field_table(COMMANDS[command]).strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_is_explained(command: str) -> None:
    """No row of the table without a meaning, none without a type, each key once."""
    rows = [line.strip("| ").split(" | ") for line in field_table(COMMANDS[command]).splitlines()[2:]]
    assert all(len(row) == 4 and all(row[place].strip() for place in (0, 1, 3)) for row in rows), rows
    keys = [row[0] for row in rows]
    assert len(set(keys)) == len(keys)


def test_the_table_reaches_every_field() -> None:
    """Each leaf of the tree is a row, under its section or its alternative."""

    def leaves(annotation: Any) -> set[str]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return {
                name for field, info in annotation.model_fields.items() for name in (leaves(info.annotation) or {field})
            }
        return {name for argument in get_args(annotation) for name in leaves(argument)}

    table = field_table(TrainConfig)
    for name in leaves(TrainConfig):
        assert f"{name}` |" in table


# ---- mistakes ----


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.1.learn_rate=1", "`stages.1.d2d.learn_rate` is not a known key"),
        ("stages.1.steps=0", "greater than 0, got 0"),
        ("stages.1.learning_rate=-1", "greater than 0"),
        ("stages.1.warmup_ratio=1", "less than 1"),
        ("stages.1.seed=-1", "seed"),
        ("stages.2.num_experts=1", "num_experts"),
        ("stages.2.layers=every_third", "layers"),
        ("stages.2.layers=[]", "layers: expected distinct indices from 0, got []"),
        ("stages.2.layers=[0, 0]", "layers: expected distinct indices from 0, got [0, 0]"),
        ("stages.2.layers=[-1]", "layers: expected distinct indices from 0, got [-1]"),
        ("stages.2.num_experts_per_tok=5", "num_experts_per_tok 5 of num_experts 4"),
        ("stages.3.loss=ppo", "loss"),
        ("stages.3.reference=nobody", "reference"),
        ("stages.3.beta=0", "beta"),
        ("stages.0.type=warmup", "warmup"),
        ("stages.0.micro_batch_size=48", "micro_batch_size 48 does not divide batch_size 64"),
        ("stages.0.save_every=15", "save_every 15 is not a multiple of log_every 10"),
        ("stages.0.type=d2s", "distinct and in the order init, d2d, d2s, preference; got d2s, d2d, d2s, preference"),
        ("stages=[]", "at least 1"),
        ("student.vision_tower=clip", "either `checkpoint`, or both"),
        ("data.snapshot=0", "snapshot"),
        ("data.lakes=x", "`data.lakes` is not a known key"),
        ("preset=paper", "preset"),
        ("device=tpu", "device"),
    ],
)
def test_a_mistake_is_named(override: str, said: str, tmp_path: Path) -> None:
    """One `ConfigError` with the key and what is wrong."""
    path = tmp_path / "train.toml"
    path.write_text(to_toml(TrainConfig.model_validate(MINIMAL)), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_config(TrainConfig, path, [override])
    assert said in str(refused.value)


def test_a_preference_stage_needs_pairs() -> None:
    """Refused by the configuration, before any lake is opened."""
    with pytest.raises(ValueError, match=r"a preference stage needs `data.pairs`"):
        TrainConfig.model_validate(MINIMAL | {"data": {"lake": "lake", "samples": "main"}})


def test_a_student_is_given_in_one_way() -> None:
    """A checkpoint, or both parts: not both, not half, not nothing."""
    for student in ({}, {"vision_tower": "a"}, {"language_model": "a"}, {"checkpoint": "c", "language_model": "a"}):
        with pytest.raises(ValueError, match="either `checkpoint`, or both"):
            TrainConfig.model_validate(MINIMAL | {"student": student})
