"""`logitlake-student export` as its users meet it: what it writes and says, what it refuses and why."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

Command = Callable[..., Any]

D2D = {"type": "d2d", "steps": 2, "seed": 7}
D2S = {"type": "d2s", "steps": 2}


@pytest.fixture
def export_file(student_world: Any) -> Callable[..., Path]:
    """`export_file(stage="d2s")` is a configuration that exports the world's run."""

    def write(**settings: Any) -> Path:
        path = Path(student_world.folder) / "export.toml"
        document = {"run": str(student_world.output), "output": str(student_world.folder / "out" / "release")}
        path.write_text(tomli_w.dumps(document | {"vllm": "skip"} | settings), encoding="utf-8")
        return path

    return write


def test_a_trained_stage_leaves_with_its_lineage_and_figures(
    student_world: Any, student_command: Command, export_file: Callable[..., Path]
) -> None:
    """Card: teacher, lake, stages with seeds, the figures of just this checkpoint; a second run finds it done."""
    from logitlake_shared.lake import Lake
    from logitlake_student.evaluate import checkpoint_sha256

    student_world.train(student_world.train_config(D2D, D2S))
    results = student_world.folder / "results"
    results.mkdir()
    model = student_world.output / "d2s" / "model"
    figures = {"vqa_accuracy": 0.8125, "kl_to_teacher": 0.5, "tasks": {"reading": 0.25}, "num_records": 3}
    for name, identity in (("other", "0" * 64), ("d2s", checkpoint_sha256(model))):
        result = {
            "name": name,
            "identity": {"model": identity},
            **(figures if name == "d2s" else {"vqa_accuracy": 0.1}),
        }
        (results / f"{name}.json").write_text(json.dumps(result))
    config = export_file(stage="d2s", evaluation=str(results))
    result = student_command("export", config)
    assert result.code == 0, result.err
    assert "transformers: the trained student's logprobs, bit for bit" in result.out
    release = student_world.folder / "out" / "release"
    card = (release / "README.md").read_text()
    fingerprint = Lake.open(student_world.lake).cache("main").fingerprint
    for row in (
        f"| lake fingerprint | {fingerprint} |",
        "| lake snapshot | 1 |",
        "| stage | d2s |",
        "| student's checkpoint | dense |",
        "| vqa accuracy | 0.8125 |",
        "| accuracy: reading | 0.25 |",
        "| records | 3 |",
    ):
        assert row in card
    assert "| d2d | steps 2, batch_size 4, learning_rate 0.001" in card
    assert "seed 7" in card
    assert "0.1 |" not in card

    again = without_torch("export", config)
    assert (again.returncode, again.stdout.strip()) == (0, f"{release}: exported already"), again.stderr
    without_figures = export_file(stage="d2s")
    for other in (["--to", "gguf"], [f"evaluation={results}", "stage=d2d"], []):
        refused = student_command("export", without_figures, *other)
        assert refused.code == 2
        assert "remove it or choose another `output`" in refused.err


def without_torch(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """The command with torch and transformers made impossible to import."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from logitlake_student.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_mistakes_are_one_message_and_write_nothing(
    student_world: Any, student_command: Command, export_file: Callable[..., Path]
) -> None:
    """No run, an unfinished stage, figures of another checkpoint, a check that cannot be left out."""
    student_world.train(student_world.train_config(D2D))
    results = student_world.folder / "results"
    results.mkdir()
    (results / "old.json").write_text(json.dumps({"name": "old", "identity": {"model": "0" * 64}}))
    mistakes = {
        ("run=/nowhere",): ("/nowhere/preference: the stage is not finished", "logitlake-student train"),
        ("stage=d2s",): ("of this run, d2d can be exported: stage=d2d",),
        ("stage=d2d", f"evaluation={results}"): ("holds no result of", "results there: old", "logitlake-student eval"),
        ("stage=d2d", "--to", "vllm"): ("only if vLLM loads it",),
        ("stage=d2d", "--to", "gguf"): ("llava has a vision tower", "export to=hf"),
        ("stage=d2d", "to=onnx"): ("`to`",),
    }
    for overrides, said in mistakes.items():
        result = student_command("export", export_file(), *overrides)
        assert result.code == 2, (overrides, result.err)
        assert result.err.startswith("error: ")
        assert "Traceback" not in result.err
        for part in said:
            assert part in result.err
    assert not list((student_world.folder / "out").glob("*"))


def test_a_text_student_leaves_as_gguf(
    student_world: Any, student_command: Command, export_file: Callable[..., Path], tiny_teacher: Path
) -> None:
    """The whole command, on the one sample of the lake that has no picture."""
    pytest.importorskip("gguf")
    text_run(student_world, tiny_teacher)
    result = student_command("export", export_file(stage="d2d", llama_cpp="if_installed"), "--to", "gguf")
    assert result.code == 0, result.err
    assert "tensors: 25 equal bit for bit" in result.out
    release = student_world.folder / "out" / "release"
    assert {path.name for path in release.iterdir()} == {"README.md", "release-F32.gguf"}
    assert "| teacher |" in (release / "README.md").read_text()


def text_run(student_world: Any, tiny_teacher: Path) -> None:
    """A finished stage of a student that reads text only, as a run would have left it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from logitlake_shared.rendering import Renderer
    from logitlake_student.models.assemble import copy_processor_files

    student_world.train(student_world.train_config(D2D))
    model = student_world.output / "d2d" / "model"
    shutil.rmtree(model)
    renderer = Renderer(tiny_teacher)
    text = Qwen3Config(
        vocab_size=renderer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
        eos_token_id=renderer.eos_id,
    )
    Qwen3ForCausalLM(text).float().save_pretrained(model)
    copy_processor_files([tiny_teacher], model)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (model / name).unlink(missing_ok=True)
