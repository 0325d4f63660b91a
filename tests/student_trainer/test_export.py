"""An export loads elsewhere and says what the trained student says, or it does not exist."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from logitlake_shared.errors import ExportError
from logitlake_student.export.card import CardFacts
from logitlake_student.export.checkpoint import export_checkpoint
from logitlake_student.export.comparison import GateSample
from logitlake_student.export.gate import check_export
from logitlake_student.export.layout import canonical_name
from logitlake_student.models.assemble import save_student
from logitlake_student.models.parameters import parameter_report
from logitlake_student.models.parts import routers
from logitlake_student.models.upcycle import upcycle

# Reloading changes no bit of a float32 model.
RELOAD_TOLERANCE = 0.0
# Other kernels for the same float32 sums: 5e-6 was measured on models of this size.
VLLM_TOLERANCE = 1e-4

FACTS = CardFacts(
    {"teacher": "tiny|teacher", "lake snapshot": "3"},
    [("d2d", "steps 2, seed 0"), ("d2s", "steps 3, seed 1")],
    {"vqa accuracy": "0.75"},
)
NO_FACTS = CardFacts({})


@pytest.fixture
def gate_samples() -> list[GateSample]:
    """One conversation of two turns about an image, and one without."""

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((20, 16)).convert("RGB").save(buffer, "PNG")
    with_image = [5, 60, 6, 7, 1, 8, 9, 10, 1], [0, 0, 0, 1, 1, 0, 0, 1, 1]
    without = [5, 11, 12, 13, 1], [0, 0, 1, 1, 1]
    return [
        GateSample(np.array(ids), np.array(is_response, dtype=bool), images)
        for (ids, is_response), images in ((with_image, (buffer.getvalue(),)), (without, ()))
    ]


@pytest.fixture
def trained(tmp_path: Path, tiny_llava: Callable[..., Any], processor_files: Callable[[Path], None]) -> Any:
    """A sparse student whose experts have parted, saved in `tmp_path / "student"`."""
    model = upcycle(tiny_llava(initializer_range=0.05), 4, 2, router_seed=3)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index in routers(model):
            for weight in model.model.language_model.layers[index].mlp.experts.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=g)
    processor_files(tmp_path / "files")
    save_student(model, tmp_path / "student", files_from=tmp_path / "files")
    write_processor_config(tmp_path / "student")
    return model


def write_processor_config(model_dir: Path) -> None:
    """As `save_assembled` writes it."""
    content = {
        "processor_class": "LlavaProcessor",
        "image_processor": json.loads((model_dir / "preprocessor_config.json").read_text()),
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
    }
    (model_dir / "processor_config.json").write_text(json.dumps(content))


def test_names_are_canonical_and_tensors_unchanged(tmp_path: Path, trained: Any) -> None:
    """The tower gains `vision_model.`, experts are one tensor each, and every tensor is the saved one."""
    result = export_checkpoint(tmp_path / "student", tmp_path / "release", facts=FACTS)
    before = load_file(tmp_path / "student" / "model.safetensors")
    after = load_file(tmp_path / "release" / "model.safetensors")
    assert result.num_tensors == len(after) == len(before)
    assert result.parameters.total == trained.num_parameters()
    for name, tensor in before.items():
        assert torch.equal(after[canonical_name(name)], tensor)
    tower = [name for name in after if name.startswith("vision_tower.")]
    assert tower
    assert all(name.startswith("vision_tower.vision_model.") for name in tower)
    experts = {f"mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")}
    layer = "language_model.model.layers.0."
    assert {name.removeprefix(layer) for name in after if name.startswith(f"{layer}mlp.experts.")} == experts


def test_canonical_names_are_kept() -> None:
    """Canonical in, canonical out; other parts are not touched."""
    for name in ("vision_tower.vision_model.post_layernorm.bias", "language_model.lm_head.weight", "lm_head.weight"):
        assert canonical_name(name) == name
    assert canonical_name("vision_tower.embeddings.class_embedding") == (
        "vision_tower.vision_model.embeddings.class_embedding"
    )


def test_release_holds_files_and_card(tmp_path: Path, trained: Any) -> None:
    """Tokenizer and processor are the same bytes; the card tells the lineage in order; nothing else is left."""
    export_checkpoint(tmp_path / "student", tmp_path / "release", facts=FACTS)
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
    for name in (*files, "processor_config.json", "generation_config.json"):
        assert (tmp_path / "release" / name).read_bytes() == (tmp_path / "student" / name).read_bytes()
    card = (tmp_path / "release" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    assert "# release\n" in card
    report = parameter_report(trained)
    assert f"| parameters | {report.total:,} |\n| parameters a token meets | {report.active:,} |\n" in card
    assert "| experts | 4, 2 per token |\n" in card
    assert "| teacher | tiny\\|teacher |\n| lake snapshot | 3 |\n" in card
    assert "| d2d | steps 2, seed 0 |\n| d2s | steps 3, seed 1 |\n" in card
    assert "## Figures\n\n|  |  |\n|---|---|\n| vqa accuracy | 0.75 |\n" in card
    assert "\n# license: choose one" in card  # left to the user, in so many words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "release", "student"]


def test_text_architecture_is_named(tmp_path: Path, trained: Any) -> None:
    """Converters look for the language model's class; where training lost it, export finds it again."""
    config_path = tmp_path / "student" / "config.json"
    config = json.loads(config_path.read_text())
    config["text_config"]["architectures"] = None
    config_path.write_text(json.dumps(config))
    export_checkpoint(tmp_path / "student", tmp_path / "release", facts=NO_FACTS)
    exported = json.loads((tmp_path / "release" / "config.json").read_text())
    assert exported["text_config"]["architectures"] == ["Qwen3MoeForCausalLM"]


def test_sharded_weights_keep_their_index(tmp_path: Path, trained: Any, gate_samples: list[GateSample]) -> None:
    trained.save_pretrained(tmp_path / "student", max_shard_size="200KB")
    (tmp_path / "student" / "model.safetensors").unlink()
    result = export_checkpoint(
        tmp_path / "student",
        tmp_path / "release",
        facts=NO_FACTS,
        gate=lambda path: check_export(path, trained, gate_samples, tolerance=RELOAD_TOLERANCE, vllm="skip"),
    )
    index = json.loads((tmp_path / "release" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert len(index["weight_map"]) == result.num_tensors


def test_gate_passes_the_trained_student(tmp_path: Path, trained: Any, gate_samples: list[GateSample]) -> None:
    """Reloaded in transformers, not a bit of a logprob differs; the student stays in training mode."""
    trained.train()
    result = export_checkpoint(
        tmp_path / "student",
        tmp_path / "release",
        facts=NO_FACTS,
        gate=lambda path: check_export(path, trained, gate_samples, tolerance=RELOAD_TOLERANCE, vllm="skip"),
    )
    assert result.gate == {"transformers": {"max_abs_diff": 0.0}, "vllm": "skipped"}
    assert trained.training


def test_gate_stops_a_student_with_other_weights(tmp_path: Path, trained: Any, gate_samples: list[GateSample]) -> None:
    """One changed expert is enough; the destination never appears, and a later export is not in its way."""

    def gate(path: Path) -> dict[str, Any]:
        return check_export(path, trained, gate_samples, tolerance=1e-4, vllm="skip")

    weights_path = tmp_path / "student" / "model.safetensors"
    weights = load_file(weights_path)
    name = "language_model.model.layers.0.mlp.experts.2.down_proj.weight"
    save_file(weights | {name: weights[name] * 1.5}, weights_path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"transformers gives other logprobs .* expected at most 0\.0001"):
        export_checkpoint(tmp_path / "student", tmp_path / "release", facts=NO_FACTS, gate=gate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "student"]
    save_file(weights, weights_path, metadata={"format": "pt"})
    export_checkpoint(tmp_path / "student", tmp_path / "release", facts=NO_FACTS, gate=gate)


def test_gate_stops_missing_and_unknown_tensors(tmp_path: Path, trained: Any, gate_samples: list[GateSample]) -> None:
    """A tensor under another name is one missing and one unexpected, whatever value it would be given."""
    export_checkpoint(tmp_path / "student", tmp_path / "release", facts=NO_FACTS)
    weights_path = tmp_path / "release" / "model.safetensors"
    weights = load_file(weights_path)
    weights["language_model.model.final_norm.weight"] = weights.pop("language_model.model.norm.weight")
    save_file(weights, weights_path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"1 missing_keys: .*norm.*; 1 unexpected_keys"):
        check_export(tmp_path / "release", trained, gate_samples, tolerance=1e-4, vllm="skip")


def test_gate_wants_something_to_compare(tmp_path: Path, trained: Any, gate_samples: list[GateSample]) -> None:
    only_prompt = GateSample(gate_samples[1].ids_S, np.zeros(5, dtype=bool))
    for samples in ([], [*gate_samples, only_prompt]):
        with pytest.raises(ExportError, match="at least one sample"):
            check_export(tmp_path / "student", trained, samples, tolerance=1e-4, vllm="skip")


def test_impossible_exports_are_refused(tmp_path: Path, trained: Any) -> None:
    """Not a checkpoint, no weights, an occupied destination, a destination in no folder; the source stays."""
    with pytest.raises(ExportError, match="not a checkpoint"):
        export_checkpoint(tmp_path / "files", tmp_path / "release", facts=NO_FACTS)
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(tmp_path / "student", tmp_path / "files", facts=NO_FACTS)
    with pytest.raises(ExportError, match="does not exist; create it"):
        export_checkpoint(tmp_path / "student", tmp_path / "no" / "release", facts=NO_FACTS)
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"holds no weights \(expected model\.safetensors"):
        export_checkpoint(tmp_path / "student", tmp_path / "release", facts=NO_FACTS)
    assert not list(tmp_path.glob("*release*"))


def test_leftovers_of_a_killed_export_do_not_matter(tmp_path: Path, trained: Any) -> None:
    leftover = tmp_path / ".release.partial"
    leftover.mkdir()
    (leftover / "model-00009-of-00009.safetensors").write_bytes(b"half")
    export_checkpoint(tmp_path / "student", tmp_path / "release", facts=NO_FACTS)
    assert not list((tmp_path / "release").glob("model-*"))
    assert not leftover.exists()


@pytest.fixture
def real_vllm() -> None:
    """Skips where vLLM is not installed, except in the suite that promises to run it."""
    if not os.environ.get("LOGITLAKE_REQUIRE_VLLM"):
        pytest.importorskip("vllm", reason="vLLM is not installed", exc_type=ImportError)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("real_vllm")
@pytest.mark.filterwarnings("default")  # vLLM and its dependencies warn at will
def test_gate_stops_what_only_transformers_loads(tmp_path: Path, trained: Any, gate_samples: list[GateSample]) -> None:
    """Before its names are canonical, a saved student loads in transformers and not in vLLM: the gate says so."""
    with pytest.raises(ExportError, match=r"vLLM cannot load .*vision_tower\.embeddings"):
        check_export(tmp_path / "student", trained, gate_samples, tolerance=VLLM_TOLERANCE, vllm="require")
