"""`logitlake-student train` as its users meet it: exit code, messages, what is written and what is not."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

# The promise of the house for a command that only prints its help is half a second; a busy machine gets four times it.
HELP_SECONDS = 2.0

D2D = {"type": "d2d", "steps": 2}


def test_help_imports_nothing_heavy() -> None:
    """`--help` is fast because torch and all that comes with it stays away."""
    code = (
        "import sys; from logitlake_student import cli; "
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "logitlake_student.cli", "--help"], capture_output=True, check=True, timeout=60
    )
    assert time.monotonic() - start < HELP_SECONDS


def test_dry_run_prints_the_resolved_configuration(student_world: Any, student_command: Command) -> None:
    """Preset, file and overrides in one TOML, and nothing is touched."""
    result = student_command("train", student_world.file(D2D), "--dry-run", "preset=faithful", "stages.0.seed=5")
    assert result.code == 0, result.err
    assert "adam_beta2 = 0.98" in result.out
    assert "seed = 5" in result.out
    assert not student_world.output.exists()


def test_four_stages_from_parts_to_a_sparse_student(
    student_world: Any, student_command: Command, tiny_teacher: Path
) -> None:
    """A tower and a language model become a LLaVA, each stage begins where the one before it ended, the last is a
    stock checkpoint; run again, every stage is done and nothing changes."""
    from transformers import AutoModelForImageTextToText

    tower, language_model = parts_of(student_world.checkpoint, student_world.folder)
    stages = [
        {"type": "init", "steps": 2, "tasks": ["caption"]},
        D2D,
        {"type": "d2s", "steps": 2},
        {"type": "preference", "steps": 2, "tasks": ["caption"]},
    ]
    config = student_world.file(*stages, student={"vision_tower": str(tower), "language_model": str(language_model)})
    first = student_command("train", config)
    assert first.code == 0, first.err
    for name in ("init", "d2d", "d2s", "preference"):
        assert f"{name}: 2 steps in" in first.out
        folder = student_world.output / name
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        assert provenance["config"]["data"]["samples"] == "main"
        looked_at = set() if name == "preference" else {"cached-mass.json"}
        assert {path.name for path in folder.iterdir()} == looked_at | {
            "done.json",
            "metrics.jsonl",
            "model",
            "provenance.json",
            "started.json",
        }
        for file in ("tokenizer.json", "chat_template.jinja"):
            assert (folder / "model" / file).read_bytes() == (tiny_teacher / file).read_bytes()
    figures = {
        name: json.loads((student_world.output / name / "done.json").read_text(encoding="utf-8"))["figures"]
        for name in ("init", "d2d", "d2s", "preference")
    }
    assert figures["d2s"]["params_total"] > figures["d2s"]["params_active"] > figures["d2d"]["params_total"]
    assert figures["init"]["params_trainable"] < figures["d2s"]["params_trainable"]
    assert figures["preference"]["params_trainable"] == figures["d2s"]["params_trainable"]
    model = AutoModelForImageTextToText.from_pretrained(student_world.output / "preference" / "model")
    assert model.config.text_config.model_type == "qwen3_moe"

    before = contents(student_world.output)
    again = student_command("train", config)
    assert again.code == 0
    assert again.out.count("trained already") == 4
    assert contents(student_world.output) == before


def parts_of(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """The session's student taken apart: its vision tower and its language model, as ordinary checkpoints."""
    import torch
    from transformers import CLIPVisionModel, Qwen3ForCausalLM

    from logitlake_student.models.assemble import copy_processor_files
    from logitlake_student.models.load import load_student

    model = load_student(checkpoint, dtype=torch.float32)
    tower = CLIPVisionModel(model.config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(folder / "tower")
    shutil.copyfile(checkpoint / "preprocessor_config.json", folder / "tower" / "preprocessor_config.json")
    language_model = Qwen3ForCausalLM(model.config.text_config)
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.save_pretrained(folder / "language-model")
    copy_processor_files([checkpoint], folder / "language-model")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / "language-model" / name).unlink(missing_ok=True)
    return folder / "tower", folder / "language-model"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_finished_run_is_recognised_without_torch(student_world: Any) -> None:
    """With torch and transformers made impossible to import, the command still says that all is done."""
    student_world.train(student_world.train_config(D2D))
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from logitlake_student.cli import main; main()"
    )
    config = student_world.file(D2D)
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(config)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "d2d: trained already" in done.stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.learning_rate=0.5", "`stage.learning_rate` is 0.001 there, 0.5 here"),
        ("stages.0.tasks=['caption']", "`stage.tasks` is None there, ['caption'] here"),
        ("data.split=test", "`lake.split` is 'train' there, 'test' here"),
        ("student.projector_seed=1", "`student.projector_seed` is 0 there, 1 here"),
    ],
)
def test_a_finished_stage_of_another_run_is_not_taken_for_this_one(
    student_world: Any, student_command: Command, override: str, said: str
) -> None:
    """The message names the field with both values, and what to do."""
    student_world.train(student_world.train_config(D2D))
    result = student_command("train", student_world.file(D2D), override)
    assert result.code == 2
    assert said in result.err
    assert "Choose another `output`, or remove the folder" in result.err


MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": ("data.sample=main", ("`data.sample` is not a known key",)),
    "no lake": ("data.lake=/nowhere/lake", ("/nowhere/lake: no such folder", "logitlake-teacher capture")),
    "not a lake": ("data.lake=.", ("not a lake",)),
    "no cache": ("data.samples=other", ("no cache 'other'", "main")),
    "no cache of pairs": ("data.pairs=other", ("no cache 'other'", "preference")),
    "no snapshot": ("data.samples=empty", ("cache 'empty' has no snapshot", "run it again")),
    "no such snapshot": ("data.snapshot=7", ("no snapshot 7",)),
    "no student": ("student.checkpoint=/nowhere/dense", ("/nowhere/dense: no checkpoint there",)),
    "no rows": ("data.split=holiday", ("holds no samples with split='holiday'",)),
    "a cache of pairs": ("data.samples=preference", ("holds pairs, expected samples",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_is_written(
    student_world: Any, student_command: Command, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """Exit code 2, one message that says what and where, no traceback, no folder of the run."""
    monkeypatch.chdir(student_world.folder)
    override, expected = MISTAKES[mistake]
    preference = {"type": "preference", "steps": 2}
    result = student_command("train", student_world.file(D2D, preference), override)
    assert result.code == 2, result.err
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    for part in expected:
        assert part in result.err
    assert not student_world.output.exists()


def test_a_preference_stage_without_pairs_is_refused(student_world: Any, student_command: Command) -> None:
    """The configuration says what is missing."""
    config = student_world.file(D2D, {"type": "preference", "steps": 2})
    text = "\n".join(line for line in config.read_text().splitlines() if not line.startswith("pairs ="))
    config.write_text(text, encoding="utf-8")
    result = student_command("train", config)
    assert result.code == 2
    assert "a preference stage needs `data.pairs`" in result.err
    assert not student_world.output.exists()


def other_tokenizer(model_dir: Path) -> str:
    """Two tokens trade their ids."""
    path = model_dir / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(document), encoding="utf-8")
    return "token_map_sha256"


def other_template(model_dir: Path) -> str:
    """The template says one word more."""
    path = model_dir / "chat_template.jinja"
    path.write_text("please " + path.read_text(encoding="utf-8"), encoding="utf-8")
    return "chat_template_sha256"


def other_splitting(model_dir: Path) -> str:
    """Same ids, same template, but the tokenizer no longer merges."""
    path = model_dir / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["model"]["merges"] = []
    path.write_text(json.dumps(document), encoding="utf-8")
    return "sample s000: the student renders other prompt_ids"


@pytest.mark.parametrize("change", [other_tokenizer, other_template, other_splitting])
def test_a_student_of_another_lake_is_refused(
    student_world: Any, student_command: Command, change: Callable[[Path], str]
) -> None:
    """Before the first step, naming the field that differs; nothing is written."""
    student = student_world.folder / "dense"
    shutil.copytree(student_world.checkpoint, student)
    field = change(student)
    result = student_command("train", student_world.file(D2D, student={"checkpoint": str(student)}))
    assert result.code == 2
    assert field in result.err
    assert not student_world.output.exists()


def test_a_loss_that_is_not_finite_ends_in_one_message(student_world: Any, student_command: Command) -> None:
    """Stage, step, value and what to do; exit code 2."""
    config = student_world.file(D2D | {"steps": 8, "learning_rate": 1e30})
    result = student_command("train", config)
    assert result.code == 2
    assert "error: stage d2d, step" in result.err
    assert "Lower the learning rate" in result.err
    assert "Traceback" not in result.err
