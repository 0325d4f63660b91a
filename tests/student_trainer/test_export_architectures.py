"""Every kind of student, exported: transformers and real vLLM answer as the student that was trained, or there is none.

Random students of a few hundred thousand parameters, their experts apart from each other, each asked about a
conversation with an image and one without.
"""

import gc
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.tiny_models import save_tiny_qwen_vl, save_tiny_text

from logitlake_shared.errors import ExportError
from logitlake_shared.rendering import Renderer
from logitlake_student.export.card import CardFacts
from logitlake_student.export.checkpoint import export_checkpoint
from logitlake_student.export.comparison import GateSample
from logitlake_student.export.gate import check_export
from logitlake_student.export.layout import Target, ambiguous_experts
from logitlake_student.models.assemble import save_student
from logitlake_student.models.load import load_student
from logitlake_student.models.upcycle import upcycle

# Other kernels for the same float32 sums: 5e-6 was measured on models of this size.
VLLM_TOLERANCE = 1e-4
# Reloading changes no bit of a float32 model.
RELOAD_TOLERANCE = 0.0

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
# By name: tower, language model, its settings. Dense and sparse siblings, tied and untied heads, interleaved layers.
LLAVAS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip-qwen2": ("clip", "qwen2", {}),
    "siglip-qwen3": ("siglip", "qwen3", {"tie_word_embeddings": False}),
    "clip-llama": ("clip", "llama", {"tie_word_embeddings": False}),
    "siglip-qwen2_moe": ("siglip", "qwen2_moe", MOE | {"shared_expert_intermediate_size": 80}),
    "clip-qwen3_moe": ("clip", "qwen3_moe", MOE | {"mlp_only_layers": [1]}),
    "clip-mixtral": ("clip", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
QWEN_VLS = ("qwen3_vl", "qwen3_vl_moe")
TEXT = "text-qwen3_moe"
# Dense student and options of `upcycle`: experts pushed apart, every layer sparse.
UPCYCLED: dict[str, tuple[str, dict[str, Any]]] = {
    "upcycled-qwen2": ("clip-qwen2", {}),
    "upcycled-qwen2-shared": ("clip-qwen2", {"shared_expert": True}),
    "upcycled-llama": ("clip-llama", {}),
    "upcycled-qwen3_vl": ("qwen3_vl", {}),
}
ARCHITECTURES = (*LLAVAS, *QWEN_VLS, TEXT, *UPCYCLED)


@dataclass(frozen=True)
class Student:
    """A trained student in memory, its checkpoint, and what it is asked about."""

    model: Any
    folder: Path
    samples: list[GateSample]

    def export(self, out_dir: Path, target: Target = "hf", **gate: Any) -> dict[str, Any]:
        """Through the gate; the gate's report."""
        settings = {"tolerance": VLLM_TOLERANCE, "vllm": "skip"} | gate
        result = export_checkpoint(
            self.folder,
            out_dir,
            facts=CardFacts({}),
            target=target,
            gate=lambda path: check_export(path, self.model, self.samples, **settings),
        )
        assert result.gate is not None
        return result.gate


MakeStudent = Callable[..., Student]


@pytest.fixture
def make_student(
    tmp_path: Path, tiny_llava: Callable[..., Any], processor_files: Callable[[Path], None]
) -> MakeStudent:
    """`make_student("clip-qwen2")`, saved as training saves it in `tmp_path / "student"`."""

    def make(name: str, **text: Any) -> Student:
        folder = tmp_path / "student"
        if name in UPCYCLED:
            dense_name, options = UPCYCLED[name]
            dense = make(dense_name, **text)
            sparse = upcycle(dense.model, 4, 2, "all", router_seed=0, expert_noise=0.3, **options)
            save_student(sparse, tmp_path / "sparse", files_from=folder)
            return Student(sparse.eval(), tmp_path / "sparse", dense.samples)
        if name in QWEN_VLS:
            save_tiny_qwen_vl(folder, name, **text)
            model = load_student(folder, dtype=torch.float32)
            image_id = Renderer(folder).image_token_id
        elif name == TEXT:
            save_tiny_text(folder, "qwen3_moe", **(MOE | text))
            model, image_id = load_student(folder, dtype=torch.float32), None
        else:
            tower, model_type, settings = LLAVAS[name]
            model = tiny_llava(model_type, initializer_range=0.05, **(settings | text))
            processor_files(tmp_path / "files")
            if tower == "siglip":
                model = with_siglip_tower(model, tmp_path / "files")
            write_processor_config(tmp_path / "files", class_token=tower == "clip")
            save_student(model, folder, files_from=tmp_path / "files")
            image_id = model.config.image_token_id
        return Student(model.eval(), folder, samples_with(image_id))

    return make


def samples_with(image_id: int | None) -> list[GateSample]:
    """A conversation of two turns about an image, and one without; for a student without eyes only this."""
    without = [5, 11, 12, 13, 1], [0, 0, 1, 1, 1]
    if image_id is None:
        return [GateSample(np.array(without[0]), np.array(without[1], dtype=bool))]
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(buffer, "PNG")
    with_image = [5, image_id, 6, 7, 1, 8, 9, 10, 1], [0, 0, 0, 1, 1, 0, 0, 1, 1]
    return [
        GateSample(np.array(ids), np.array(is_response, dtype=bool), images)
        for (ids, is_response), images in ((with_image, (buffer.getvalue(),)), (without, ()))
    ]


def with_siglip_tower(llava: Any, files: Path) -> Any:
    """The same language model behind a SigLIP tower, which has no class token, so that all its patches are shown."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    document = llava.config.to_dict() | {"vision_feature_select_strategy": "full"}
    for field in ("model_type", "transformers_version", "vision_config", "text_config"):
        document.pop(field)
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=llava.config.text_config, **document)
    )
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (files / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def write_processor_config(files: Path, *, class_token: bool) -> None:
    """What LLaVA's processor is told of the tower."""
    content = {
        "processor_class": "LlavaProcessor",
        "image_processor": json.loads((files / "preprocessor_config.json").read_text()),
        "image_token": "<image>",
        "num_additional_image_tokens": int(class_token),
        "patch_size": 4,
        "vision_feature_select_strategy": "default" if class_token else "full",
    }
    (files / "processor_config.json").write_text(json.dumps(content))


@pytest.fixture
def real_vllm() -> None:
    """Skips where vLLM is not installed, except in the suite that promises to run it."""
    if not os.environ.get("LOGITLAKE_REQUIRE_VLLM"):
        pytest.importorskip("vllm", reason="vLLM is not installed", exc_type=ImportError)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_reloads_the_same_bits(name: str, tmp_path: Path, make_student: MakeStudent) -> None:
    """Not a bit of a logprob differs from the student in memory, whatever its names and layouts became."""
    report = make_student(name).export(tmp_path / "release", tolerance=RELOAD_TOLERANCE)
    assert report == {"transformers": {"max_abs_diff": 0.0}, "vllm": "skipped"}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("real_vllm")
@pytest.mark.filterwarnings("default")  # vLLM and its dependencies warn at will
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vllm_and_transformers_answer_as_the_student(name: str, tmp_path: Path, make_student: MakeStudent) -> None:
    """One folder, two engines, with an image: the logprobs are those of the student that was trained."""
    report = make_student(name).export(tmp_path / "release", target="vllm", vllm="require")
    assert report["transformers"]["max_abs_diff"] == 0.0
    assert 0.0 < report["vllm"]["max_abs_diff"] <= VLLM_TOLERANCE
    gc.collect()


# ---- damage ----


def rename_norm(folder: Path) -> None:
    """The last norm under another name."""
    rename(folder, "norm.weight", "final_norm.weight")


def rename(folder: Path, ending: str, other: str) -> None:
    """Gives the last tensor of the decoder whose name ends so another ending."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(f"model.{ending}") and "layers" not in name)
    weights[name.removesuffix(ending) + other] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def swap_two_layers(folder: Path) -> None:
    """The attention outputs of two layers change places: names, shapes and numbers are all there."""
    weights = load_file(folder / "model.safetensors")
    first, second = sorted(name for name in weights if name.endswith("self_attn.o_proj.weight"))[:2]
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def transpose_experts(folder: Path) -> None:
    """Every expert of the first sparse layer turned over, where it is square."""
    weights = load_file(folder / "model.safetensors")
    turned = {
        name: tensor.transpose(-1, -2).contiguous()
        for name, tensor in weights.items()
        if ".experts." in name and tensor.shape[-1] == tensor.shape[-2]
    }
    assert turned
    save_file(weights | turned, folder / "model.safetensors", metadata={"format": "pt"})


def set_text(folder: Path, **fields: Any) -> None:
    """Other fields of the language model's configuration."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= fields
    path.write_text(json.dumps(config))


def one_expert_fewer(folder: Path) -> None:
    set_text(folder, num_experts_per_tok=1)


def other_norm(folder: Path) -> None:
    set_text(folder, rms_norm_eps=0.1)


def other_image_layer(folder: Path) -> None:
    """The tower's last layer instead of the one before it."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_feature_layer": -1}))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "renamed-llava": ("clip-mixtral", rename_norm, r"1 missing_keys: .*norm.*; 1 unexpected_keys"),
    "renamed-qwen-vl": ("qwen3_vl", rename_norm, r"1 missing_keys: .*norm.*; 1 unexpected_keys"),
    "swapped": ("siglip-qwen3", swap_two_layers, "transformers gives other logprobs"),
    "experts-per-token": ("siglip-qwen2_moe", one_expert_fewer, "transformers gives other logprobs"),
    "norm": ("clip-llama", other_norm, "transformers gives other logprobs"),
    "image-layer": ("clip-qwen2", other_image_layer, "transformers gives other logprobs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_is_refused(damage: str, tmp_path: Path, make_student: MakeStudent) -> None:
    """Complete to the eye: the gate says what is wrong, and nothing gets the destination's name."""
    name, break_it, said = DAMAGES[damage]
    student = make_student(name)

    def gate(folder: Path) -> dict[str, Any]:
        check_export(folder, student.model, student.samples, tolerance=RELOAD_TOLERANCE, vllm="skip")
        break_it(folder)
        return check_export(folder, student.model, student.samples, tolerance=VLLM_TOLERANCE, vllm="skip")

    with pytest.raises(ExportError, match=said):
        export_checkpoint(student.folder, tmp_path / "release", facts=CardFacts({}), gate=gate)
    assert not (tmp_path / "release").exists()


# By name: the width of an expert that makes a matrix of a model 64 wide square.
SQUARES = {"gate_up_proj": 32, "down_proj": 64}


@pytest.mark.parametrize("matrix", SQUARES)
def test_square_experts_are_known_and_no_released_layout_passes(
    matrix: str, tmp_path: Path, make_student: MakeStudent
) -> None:
    """transformers reads a transposed square matrix wrong without a word; for it the export leaves such a matrix as it
    is, and one that was turned over is refused."""
    student = make_student("qwen3_vl_moe", moe_intermediate_size=SQUARES[matrix])
    assert ambiguous_experts(json.loads((student.folder / "config.json").read_text())) == [matrix]
    student.export(tmp_path / "release", tolerance=RELOAD_TOLERANCE)
    transpose_experts(tmp_path / "release")
    with pytest.raises(ExportError, match="transformers gives other logprobs"):
        check_export(tmp_path / "release", student.model, student.samples, tolerance=VLLM_TOLERANCE, vllm="skip")
    with pytest.raises(ExportError, match="transformers gives other logprobs"):
        student.export(tmp_path / "for-vllm", target="vllm")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("real_vllm")
@pytest.mark.filterwarnings("default")
def test_square_experts_are_for_one_engine_only(tmp_path: Path, make_student: MakeStudent) -> None:
    """vLLM takes transformers' square experts for released ones: refused. Laid out for vLLM they pass, and the card
    says for whom they are."""
    student = make_student("qwen3_vl_moe", moe_intermediate_size=SQUARES["gate_up_proj"])
    with pytest.raises(ExportError, match=r"vLLM gives other logprobs .*square.*to=vllm"):
        student.export(tmp_path / "release", vllm="require")
    assert not (tmp_path / "release").exists()
    report = student.export(tmp_path / "release", target="vllm", vllm="require", transformers_reads=False)
    assert report["vllm"]["max_abs_diff"] <= VLLM_TOLERANCE
    card = (tmp_path / "release" / "README.md").read_text()
    assert "**For vLLM only.**" in card
    assert "from_pretrained" not in card
