"""A student is the sum of its parts, and is found by its folder or by its name; one that is not whole is refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import save_tiny_text
from torch import Tensor

from logitlake_shared.errors import ConfigError
from logitlake_student.model_inputs import tokens_per_image
from logitlake_student.models.assemble import assemble_llava, copy_processor_files, save_assembled, save_student
from logitlake_student.models.hub import local_folder, pin, pinned
from logitlake_student.models.load import load_student


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.fixture
def parts(tmp_path: Path, tiny_llava: Callable[..., Any], processor_files: Callable[[Path], None]) -> tuple[Path, Path]:
    """A CLIP vision checkpoint and a Qwen3 checkpoint with tokenizer, on disk."""
    from transformers import CLIPVisionModel, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = tiny_llava().config
    tower_dir, lm_dir = tmp_path / "tower", tmp_path / "lm"
    CLIPVisionModel(config.vision_config).save_pretrained(tower_dir)
    Qwen3ForCausalLM(config.text_config).save_pretrained(lm_dir)
    processor_files(lm_dir)
    (lm_dir / "preprocessor_config.json").rename(tower_dir / "preprocessor_config.json")
    return tower_dir, lm_dir


def test_assembled_student_is_its_parts(parts: tuple[Path, Path], llava_batch: dict[str, Tensor]) -> None:
    """The language model answers text as before; the tower is the given one; only the projector is new."""
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    tower_dir, lm_dir = parts
    model = assemble_llava(tower_dir, lm_dir, projector_seed=7, vision_feature_layer=-2)
    ids = llava_batch["input_ids"].clamp(max=50)
    alone = AutoModelForCausalLM.from_pretrained(lm_dir).eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, alone(input_ids=ids).logits)
    tower = CLIPVisionModel.from_pretrained(tower_dir).state_dict()
    assert all(torch.equal(v, tower[k]) for k, v in model.model.vision_tower.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.image_token_id == 60
    again = assemble_llava(tower_dir, lm_dir, projector_seed=7, vision_feature_layer=-2)
    other = assemble_llava(tower_dir, lm_dir, projector_seed=8, vision_feature_layer=-2)
    same, new = (m.model.multi_modal_projector.linear_1.weight for m in (again, other))
    weight = model.model.multi_modal_projector.linear_1.weight.detach()
    assert torch.equal(weight, same)
    assert not torch.equal(weight, new)
    assert float(weight.abs().max()) <= 32**-0.5


def test_assembled_student_saves_with_its_processor(
    tmp_path: Path, parts: tuple[Path, Path], llava_batch: dict[str, Tensor]
) -> None:
    """Stock AutoProcessor reads what was saved; tokenizer files are the same bytes, also one stage later."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tower_dir, lm_dir = parts
    model = assemble_llava(tower_dir, lm_dir, projector_seed=7, vision_feature_layer=-2).eval()
    first, second = tmp_path / "first", tmp_path / "second"
    save_assembled(model, first, vision_tower_dir=tower_dir, language_model_dir=lm_dir)
    save_student(model, second, files_from=first)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (second / name).read_bytes() == (lm_dir / name).read_bytes()
    processor = AutoProcessor.from_pretrained(second, backend="pil")
    inputs = processor(images=Image.new("RGB", (20, 16), "red"), text="w2 <image> w3", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, *[60] * 16, 3]]
    loaded = AutoModelForImageTextToText.from_pretrained(second).eval()
    assert torch.equal(logits_of(loaded, llava_batch), logits_of(model, llava_batch))


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize("whole", [False, True])
def test_a_siglip_tower_shows_all_its_tokens(whole: bool, tmp_path: Path, parts: tuple[Path, Path]) -> None:
    """It has no class token: sixteen patches are sixteen tokens, in model, processor and our count. A whole SigLIP
    gives its vision half."""
    from PIL import Image
    from transformers import AutoProcessor, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

    _, lm_dir = parts
    vision = SiglipVisionConfig(image_size=16, patch_size=4, **SMALL)
    config = SiglipConfig(vision_config=vision.to_dict(), text_config={"vocab_size": 50, **SMALL})
    tower_dir = tmp_path / "siglip"
    (SiglipModel(config) if whole else SiglipVisionModel(vision)).save_pretrained(tower_dir)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (tower_dir / "preprocessor_config.json").write_text(json.dumps(processor))
    model = assemble_llava(tower_dir, lm_dir, projector_seed=7, vision_feature_layer=-2).eval()
    save_assembled(model, tmp_path / "whole", vision_tower_dir=tower_dir, language_model_dir=lm_dir)
    assert tokens_per_image(model.config) == 16
    assembled = AutoProcessor.from_pretrained(tmp_path / "whole", backend="pil")
    inputs = assembled(images=Image.new("RGB", (20, 16), "red"), text="w2 <image> w3", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, *[60] * 16, 3]]
    loaded = load_student(tmp_path / "whole", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    given = load_file(tower_dir / "model.safetensors")
    given = {name.removeprefix("vision_model."): tensor for name, tensor in given.items()}
    for name, tensor in loaded.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, given[name.removeprefix("vision_model.")])


def test_a_siglip_and_a_llama_learn_from_the_lake(
    student_world: Any, tiny_teacher: Path, metrics_of: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Assembled, trained through the dense stages and sparse as a LLaVA around a Mixtral, which stock classes load."""
    from transformers import (
        AutoModelForImageTextToText,
        LlamaConfig,
        LlamaForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    tower_dir, lm_dir = student_world.folder / "tower", student_world.folder / "lm"
    SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=16, **SMALL)).save_pretrained(tower_dir)
    processor = json.loads((tiny_teacher / "preprocessor_config.json").read_text())
    processor |= {"image_processor_type": "SiglipImageProcessor", "do_center_crop": None, "crop_size": None}
    (tower_dir / "preprocessor_config.json").write_text(json.dumps(processor))
    vocab_size = json.loads((tiny_teacher / "config.json").read_text())["text_config"]["vocab_size"]
    torch.manual_seed(3)
    text = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=128, **SMALL)
    LlamaForCausalLM(text).save_pretrained(lm_dir)
    copy_processor_files([tiny_teacher], lm_dir)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (lm_dir / name).unlink()
    stages = [{"type": "init", "steps": 2}, {"type": "d2d", "steps": 12}, {"type": "d2s", "layers": "all"}]
    folder = student_world.train(
        student_world.train_config(*stages, student={"vision_tower": str(tower_dir), "language_model": str(lm_dir)})
    )
    kls = [line["forward_kl"] for line in metrics_of(student_world.output / "d2d")]
    assert kls[-1] < kls[0]
    model, loading = AutoModelForImageTextToText.from_pretrained(folder / "model", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert (model.config.vision_config.model_type, model.config.text_config.model_type) == (
        "siglip_vision_model",
        "mixtral",
    )


def test_a_sparse_language_model_can_be_a_part(
    tmp_path: Path, parts: tuple[Path, Path], tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]
) -> None:
    """Its experts, norms and embeddings answer text as before."""
    from transformers import AutoModelForCausalLM

    tower_dir, lm_dir = parts
    config = tiny_llava("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48).config
    alone = AutoModelForCausalLM.from_config(config.text_config).eval()
    alone.save_pretrained(lm_dir)
    model = assemble_llava(tower_dir, lm_dir, projector_seed=7, vision_feature_layer=-2).eval()
    ids = llava_batch["input_ids"].clamp(max=50)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_a_name_on_the_hub_is_its_cached_snapshot(
    tmp_path: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was downloaded once is found without a network; a folder of that name comes first; neither is an error."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert local_folder(Path("some/model")) == snapshot
    assert local_folder(parts[0]) == parts[0]
    assert local_folder(Path("no/such/folder")) == Path("no/such/folder")  # not a name; whoever opens it will say so
    with pytest.raises(ConfigError, match="other/model: no such folder, and no repository of that name"):
        local_folder(Path("other/model"))
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert local_folder(Path("some/model")) == Path("some/model")


def test_a_run_stays_with_the_revision_that_it_began_with(tmp_path: Path) -> None:
    """A name is pinned to the commit whose folder it was found in; a folder is not pinned, nor a name twice."""
    pins = tmp_path / "run" / "hub.json"
    name, commit, other = Path("some/model@main"), "a" * 40, "b" * 40
    pin(tmp_path, tmp_path, pins)
    assert not pins.exists()
    assert pinned(name, pins) == name
    pin(name, tmp_path / commit, pins)
    pin(name, tmp_path / other, pins)
    assert pinned(name, pins) == Path(f"some/model@{commit}")
    assert pinned(Path("some/other"), pins) == Path("some/other")


def test_wrong_parts_are_refused(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    """Another kind, nothing at all, no placeholder, no such layer."""
    tower_dir, lm_dir = parts
    assemble = partial(assemble_llava, projector_seed=0)
    with pytest.raises(ConfigError, match="language model: expected a model of type"):
        assemble(tower_dir, tower_dir, vision_feature_layer=-2)
    with pytest.raises(ConfigError, match="vision tower: no checkpoint at"):
        assemble(tmp_path / "nothing", lm_dir, vision_feature_layer=-2)
    with pytest.raises(ConfigError, match="placeholder '<img>'"):
        assemble(tower_dir, lm_dir, vision_feature_layer=-2, image_token="<img>")
    for layer in (-5, 4):
        with pytest.raises(
            ConfigError, match=rf"vision_feature_layer: .* has 3 layers .* expected -4 to 3; got {layer}"
        ):
            assemble(tower_dir, lm_dir, vision_feature_layer=layer)


def lose(folder: Path, ending: str) -> None:
    """Takes the first tensor with this ending out of a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in sorted(weights) if name.endswith(ending))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_part_with_a_hole_is_refused(parts: tuple[Path, Path]) -> None:
    """transformers fills it with random numbers and goes on."""
    tower_dir, lm_dir = parts
    whole = (lm_dir / "model.safetensors").read_bytes()
    lose(lm_dir, "q_proj.weight")
    with pytest.raises(ConfigError, match=r"weights and classes do not agree: missing .*layers.0.self_attn.q_proj"):
        assemble_llava(tower_dir, lm_dir, projector_seed=0, vision_feature_layer=-2)
    (lm_dir / "model.safetensors").write_bytes(whole)
    lose(tower_dir, "fc1.weight")
    with pytest.raises(ConfigError, match=r"vision tower: .* lacks the weights .*layers.0.mlp.fc1.weight"):
        assemble_llava(tower_dir, lm_dir, projector_seed=0, vision_feature_layer=-2)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def capped_logits(folder: Path) -> None:
    change_config(folder, model_type="gemma2")


def own_code(folder: Path) -> None:
    """A checkpoint that brings its classes; they would tell if they were imported."""
    (folder / "own.py").write_text(f"open({str(folder / 'was-run')!r}, 'w').close()")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (without_weights, "no weights that can be read"),
    "cut weights": (cut_short, "no weights that can be read"),
    "no configuration": (no_json, "config.json is not that of a stock class"),
    "another kind": (capped_logits, "expected a model of type llama, .*; got 'gemma2'"),
    "code": (own_code, "code of a checkpoint is never run"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_checkpoint_that_cannot_be_a_student_is_refused(how: str, tmp_path: Path) -> None:
    """With one message, no question on the terminal, and nothing of it run."""
    break_it, said = BROKEN[how]
    folder = tmp_path / "model"
    save_tiny_text(folder)
    break_it(folder)
    with pytest.raises(ConfigError, match=said):
        load_student(folder, dtype=torch.float32)
    assert not (folder / "was-run").exists()


def test_a_llava_of_unknown_parts_is_refused(tmp_path: Path, tiny_llava: Callable[..., Any]) -> None:
    """By the part that is unknown."""
    tiny_llava("gemma").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a LLaVA with a language model of type llama, .*; got 'gemma'"):
        load_student(tmp_path, dtype=torch.float32)
