"""What is said of a run's students before it begins is what they are in the end; what cannot be is refused then."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import save_tiny_qwen_vl, save_tiny_text

from logitlake_shared.errors import ConfigError
from logitlake_student.config import TrainConfig
from logitlake_student.models.parameters import ParameterReport, PartReport
from logitlake_student.run import plan_run, starting_checkpoint
from logitlake_student.sizes import planned_parameters, size_table

Command = Callable[..., Any]

STAGES = [{"type": name, "steps": 1} for name in ("init", "d2d", "d2s", "preference")]


def test_the_sizes_are_those_of_the_finished_stages(student_world: Any, student_command: Command) -> None:
    """Part by part, for each of the four: `train` says them first, `done.json` holds them last."""
    config = student_world.train_config(*STAGES)
    planned = planned_parameters(config)
    assert not student_world.output.exists()
    result = student_command("train", student_world.file(*STAGES))
    assert result.code == 0, result.err
    assert result.out.startswith(size_table(planned))
    for stage, report in planned.items():
        figures = json.loads((student_world.output / stage / "done.json").read_text(encoding="utf-8"))["figures"]
        assert figures["parts"] == {name: asdict(part) for name, part in report.parts.items()}


def test_a_dry_run_says_the_sizes_beside_the_configuration(student_world: Any, student_command: Command) -> None:
    """On stderr, so that stdout stays a configuration; nothing is written."""
    dry = student_command("train", student_world.file(*STAGES), "--dry-run")
    assert dry.code == 0
    assert dry.err.strip() == size_table(planned_parameters(student_world.train_config(*STAGES)))
    assert not student_world.output.exists()


@pytest.mark.parametrize("place", ["no/such/folder", "some/model"])
def test_a_dry_run_without_the_student_says_that_it_counted_nothing(
    place: str, student_world: Any, student_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template is printed wherever its paths point; a name on the hub is looked up in the cache alone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(student_world.folder / "hub"))
    dry = student_command("train", student_world.file(*STAGES), "--dry-run", f"student.checkpoint={place}")
    assert dry.code == 0
    assert dry.err == f"parameters: not counted, {place} is not here yet\n"
    assert f'checkpoint = "{place}"' in dry.out


def test_the_table_by_hand() -> None:
    """A row a part in their order, a column for each new student and each stage; none is a dash, large is rounded."""
    dense = {"projector": PartReport(2_000, 2_000, 2_000), "dense FFN": PartReport(1_234_567, 1_234_567, 0)}
    sparse = {
        "projector": PartReport(2_000, 2_000, 2_000),
        "experts": PartReport(4_938_268, 2_469_134, 4_938_268),
        "routers": PartReport(12, 12, 12),
    }
    table = size_table({"init": ParameterReport(dense), "d2s": ParameterReport(sparse)})
    assert table.splitlines() == [
        "parameters   dense  init trains  sparse  a token  d2s trains",
        "projector   2.00 k       2.00 k  2.00 k   2.00 k      2.00 k",
        "dense FFN   1.23 M            -       -        -           -",
        "experts          -            -  4.94 M   2.47 M      4.94 M",
        "routers          -            -      12       12          12",
        "all         1.24 M       2.00 k  4.94 M   2.47 M      4.94 M",
    ]


@pytest.mark.parametrize(
    ("family", "options", "stages", "said"),
    [
        ("llama", {}, ["d2d", "d2s"], r"every layer of mixtral is sparse, got dense layers \[1\]"),
        ("qwen3", {}, [{"type": "d2s", "shared_expert": True}], "qwen3_moe has no shared expert"),
        ("qwen2", {}, [{"type": "d2s", "layers": [2]}], r"a model of 2 layers, got \[2\]"),
        ("qwen3_moe", {"num_experts": 4}, ["d2d", "d2s"], "type 'qwen3_moe' has no sparse sibling"),
        ("qwen2", {}, ["init"], "stage init: a model of type 'qwen2' has nothing that it trains"),
        ("gemma", {"head_dim": 32}, ["d2d"], "got 'gemma'"),
    ],
)
def test_what_a_later_stage_cannot_do_is_said_before_the_first(
    family: str, options: dict[str, Any], stages: list[Any], said: str, student_world: Any
) -> None:
    """By the configurations alone, before anything is written."""
    folder = student_world.folder / "model"
    save_tiny_text(folder, family, **options)
    (folder / "model.safetensors").unlink()
    tables = [{"type": stage} if isinstance(stage, str) else stage for stage in stages]
    with pytest.raises(ConfigError, match=said):
        planned_parameters(student_world.train_config(*tables, student={"checkpoint": str(folder)}))
    assert not student_world.output.exists()


def test_every_part_of_a_qwen_vl_has_a_name(student_world: Any) -> None:
    """The mergers are its projector, the tower is frozen, and the parts are the whole."""
    from transformers import AutoModelForImageTextToText

    folder = student_world.folder / "model"
    save_tiny_qwen_vl(folder)
    reports = planned_parameters(student_world.train_config(*STAGES, student={"checkpoint": str(folder)}))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    visual = model.model.visual
    mergers = sum(p.numel() for module in (visual.merger, visual.deepstack_merger_list) for p in module.parameters())
    assert reports["init"].total == model.num_parameters()
    assert reports["init"].trainable == reports["init"].parts["projector"].total == mergers
    assert reports["init"].parts["vision tower"].total == sum(p.numel() for p in visual.parameters()) - mergers
    assert reports["d2s"].parts["vision tower"] == reports["init"].parts["vision tower"]


def test_a_student_by_its_name_goes_on_at_its_revision(student_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained from the cache without a network; when the branch moves, the run stays where it began."""
    from huggingface_hub import constants

    repository = student_world.folder / "hub" / "models--some--model"
    first, second = (repository / "snapshots" / (letter * 40) for letter in "ab")
    shutil.copytree(student_world.checkpoint, first)
    shutil.copytree(student_world.checkpoint, second)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(student_world.folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config: TrainConfig = student_world.train_config({"type": "d2d", "steps": 2}, student={"checkpoint": "some/model"})
    folder: Path = student_world.train(config)
    assert (folder / "model" / "model.safetensors").is_file()
    (repository / "refs" / "main").write_text("b" * 40)
    assert starting_checkpoint(config, plan_run(config)[0]) == first
    elsewhere = config.model_copy(update={"output": student_world.folder / "other"})
    assert starting_checkpoint(elsewhere, plan_run(elsewhere)[0]) == second
