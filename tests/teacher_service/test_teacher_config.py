"""Every configuration that ships loads; every mistake in one is refused by name."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import logitlake_teacher
from logitlake_schemas import SampledPolicy
from logitlake_shared.config import load_config, to_toml
from logitlake_shared.errors import ConfigError
from logitlake_teacher.config import CaptureConfig, HfEngineConfig, PairsConfig, RayExecutorConfig
from logitlake_teacher.config.serve import ServeConfig

CONFIGS = sorted((Path(logitlake_teacher.__file__).parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_template_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    """`--dry-run` of a template is itself a configuration, equal to it."""
    classes: dict[str, type[BaseModel]] = {"pairs": PairsConfig, "capture": CaptureConfig, "serve": ServeConfig}
    cls = classes[path.stem.partition("-")[0]]
    config = load_config(cls, path)
    (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(cls, tmp_path / "resolved.toml") == config


def test_alternatives_are_chosen_by_type() -> None:
    """`type` picks the class, and its keys are the only ones allowed."""
    config = load_config(CaptureConfig, CONFIGS[1])
    assert CONFIGS[1].name == "capture.toml"
    assert isinstance(config.engine, HfEngineConfig)
    assert isinstance(config.executor, RayExecutorConfig)
    with pytest.raises(ConfigError, match="num_actors"):
        load_config(CaptureConfig, CONFIGS[1], ["executor.type=inline"])


def test_the_codec_is_chosen_by_type_and_must_suit_the_engine(tmp_path: Path) -> None:
    """`codec.type=sampled` has keys of its own, and an engine that sees the most probable tokens only refuses it."""
    with pytest.raises(ConfigError, match="k_max"):
        load_config(CaptureConfig, CONFIGS[1], ["codec.type=sampled"])
    text = CONFIGS[1].read_text(encoding="utf-8")
    sampled = tmp_path / "sampled.toml"
    sampled.write_text(
        re.sub(r"\[codec\]\n(\w.*\n)+", '[codec]\ntype = "sampled"\ndraws = 30\n', text), encoding="utf-8"
    )
    assert load_config(CaptureConfig, sampled).codec == SampledPolicy(type="sampled", draws=30)
    vllm = CONFIGS[0].read_text(encoding="utf-8")
    sampled.write_text(re.sub(r"\[codec\]\n(\w.*\n)+", '[codec]\ntype = "sampled"\n', vllm), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"codec\.type is 'sampled'.*'vllm' returns the most probable"):
        load_config(CaptureConfig, sampled)


@pytest.mark.parametrize(
    "override",
    [
        "teacher.revision=main",
        "engine.batch_tokens=0",
        "engine.dtype=float64",
        "executor.num_actors=0",
        "plan.unit_tokens=-1",
        "codec.k_max=0",
        "codec.k_min=64",
        "max_error_rate=1.5",
        "data=[]",
    ],
)
def test_a_value_out_of_range_is_refused_by_name(override: str) -> None:
    """One `ConfigError` that names the key."""
    key = override.partition("=")[0].split(".")[-1]
    with pytest.raises(ConfigError, match=key):
        load_config(CaptureConfig, CONFIGS[1], [override])
