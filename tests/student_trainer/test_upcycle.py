"""A sparse student starts as the dense one; a student is the sum of its parts."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import noise_png, save_tiny_qwen_vl
from torch import Tensor

from logitlake_shared.errors import ConfigError
from logitlake_student.model_inputs import ModelInputs, tokens_per_image
from logitlake_student.models.assemble import assemble_llava, save_assembled, save_student
from logitlake_student.models.hub import local_folder
from logitlake_student.models.parameters import PartReport, parameter_report
from logitlake_student.models.parts import decoder, routers
from logitlake_student.models.sparse_config import sparse_layers
from logitlake_student.models.upcycle import upcycle

# Four layers of float32 products; the experts' weighted sum is rounded where the dense layer's output was
# not. Logits are of order 10.
LOGITS_ATOL = 1e-4


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("layers", ["every_other", "all", "first_half", "second_half", [3], [1, 2]])
@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
def test_upcycled_equals_dense_at_start(
    layers: Any, num_experts_per_tok: int, tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]
) -> None:
    """Same logits with images, whichever layers become sparse and however many experts a token sees."""
    dense = tiny_llava()
    sparse = upcycle(dense, 4, num_experts_per_tok, layers, router_seed=3)
    expected = logits_of(dense, llava_batch)
    assert float(expected.std()) > 1.0  # or else any two models would agree
    torch.testing.assert_close(logits_of(sparse, llava_batch), expected, rtol=0, atol=LOGITS_ATOL)
    assert list(routers(sparse)) == sparse_layers(layers, 4)


def dense_student(kind: str, tiny_llava: Callable[..., Any], tmp_path: Path) -> tuple[Any, dict[str, Tensor]]:
    """A dense student with something to look at: a LLaVA of some language model, a Qwen3-VL, or a text-only one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole, _, text_type = kind.partition(" ")
    generator = torch.Generator().manual_seed(7)
    if whole == "llava":
        ids_BS = torch.randint(2, 50, (2, 24), generator=generator)
        ids_BS[:, 1:17] = 60
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "pixel_values": pixels}
        return tiny_llava(text_type), batch
    if whole == "text":
        model = AutoModelForCausalLM.from_config(tiny_llava(text_type).config.text_config).eval()
        ids_BS = torch.randint(2, 50, (2, 12), generator=generator)
        return model, {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    save_tiny_qwen_vl(tmp_path / "dense")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense").eval()
    inputs = ModelInputs.of_checkpoint(tmp_path / "dense", model.config)
    image = model.config.image_token_id
    ids_S, is_response_S = np.array([5, image, 7, 8, 9, 10]), np.zeros(6, np.bool_)
    sequences = [inputs.expand(ids_S, is_response_S, [noise_png(place)]) for place in range(2)]
    return model, inputs.batch(sequences, pad_id=0, model=model)


KINDS = ["llava qwen2", "llava qwen3", "llava llama", "qwen3_vl", "text qwen2", "text qwen3", "text llama"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_starts_as_the_dense_student(kind: str, tiny_llava: Callable[..., Any], tmp_path: Path) -> None:
    """Same logits, whatever the routers choose, and the same again from disk through stock classes."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    dense, batch = dense_student(kind, tiny_llava, tmp_path)
    expected = logits_of(dense, batch)
    assert float(expected.std()) > 0.5  # or else any two models would agree
    sparse = upcycle(dense, 4, 2, "all", router_seed=3)
    assert len(routers(sparse)) == len(decoder(sparse).layers)
    torch.testing.assert_close(logits_of(sparse, batch), expected, rtol=0, atol=LOGITS_ATOL)
    for router in routers(sparse).values():
        with torch.no_grad():
            router.weight.copy_(router.weight.flip(0) * 3)
    torch.testing.assert_close(logits_of(sparse, batch), expected, rtol=0, atol=LOGITS_ATOL)
    sparse.save_pretrained(tmp_path / "sparse")
    auto = AutoModelForCausalLM if kind.startswith("text") else AutoModelForImageTextToText
    loaded, info = auto.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded.eval(), batch), logits_of(sparse, batch), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llava qwen2", "qwen3_vl", "text qwen3"])
def test_dense_layers_stay_where_the_family_interleaves(
    kind: str, tiny_llava: Callable[..., Any], tmp_path: Path
) -> None:
    """Every other layer, beginning with the first."""
    dense, batch = dense_student(kind, tiny_llava, tmp_path)
    sparse = upcycle(dense, 4, 2, router_seed=3)
    assert list(routers(sparse)) == list(range(0, len(decoder(dense).layers), 2))
    torch.testing.assert_close(logits_of(sparse, batch), logits_of(dense, batch), rtol=0, atol=LOGITS_ATOL)


def test_a_shared_expert_is_the_dense_network_and_the_others_give_half(
    tiny_llava: Callable[..., Any], tmp_path: Path
) -> None:
    """sigmoid(0) = 1/2 of the shared expert and half of the others: the dense layer. Without the option, the expert
    that the architecture has all the same gives nothing."""
    dense, batch = dense_student("llava qwen2", tiny_llava, tmp_path)
    shared = upcycle(dense, 4, 2, "all", router_seed=3, shared_expert=True)
    torch.testing.assert_close(logits_of(shared, batch), logits_of(dense, batch), rtol=0, atol=LOGITS_ATOL)
    block, ffn = decoder(shared).layers[1].mlp, decoder(dense).layers[1].mlp
    assert torch.equal(block.shared_expert.down_proj.weight, ffn.down_proj.weight)
    assert torch.equal(block.experts.down_proj[2], ffn.down_proj.weight / 2)
    without = decoder(upcycle(dense, 4, 2, "all", router_seed=3)).layers[1].mlp
    assert not without.shared_expert.down_proj.weight.any()
    assert torch.equal(without.experts.down_proj[2], ffn.down_proj.weight)


def test_noise_tells_the_experts_apart(tiny_llava: Callable[..., Any]) -> None:
    """Each expert moves by its own draws, of the asked size; the same seed draws the same, and 0 is none."""
    dense = tiny_llava()
    moved, again = (upcycle(dense, 4, 2, "all", router_seed=3, expert_noise=0.01) for _ in range(2))
    ffn = decoder(dense).layers[0].mlp.down_proj.weight
    experts, same = decoder(moved).layers[0].mlp.experts.down_proj, decoder(again).layers[0].mlp.experts.down_proj
    assert torch.equal(experts, same)
    moves = (experts - ffn).detach()
    five_sigma = 5 / math.sqrt(2 * ffn.numel())  # of a standard deviation estimated from that many normals
    for expert in range(4):
        assert float(moves[expert].std() / ffn.detach().std()) == pytest.approx(0.01, rel=five_sigma)
    assert float(torch.corrcoef(moves.flatten(1)).fill_diagonal_(0).abs().max()) < 5 / math.sqrt(ffn.numel())


def test_upcycled_equals_dense_without_images(tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]) -> None:
    dense = tiny_llava()
    text = {
        "input_ids": llava_batch["input_ids"].clamp(max=50),
        "attention_mask": llava_batch["attention_mask"],
    }
    sparse = upcycle(dense, 4, 2, router_seed=3)
    torch.testing.assert_close(logits_of(sparse, text), logits_of(dense, text), rtol=0, atol=LOGITS_ATOL)


def test_upcycled_equals_dense_after_saving_and_loading(
    tmp_path: Path, tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]
) -> None:
    """What is on disk is a stock class: loaded without our code, all keys found, bit-equal logits."""
    from transformers import AutoModelForImageTextToText

    sparse = upcycle(tiny_llava(), 4, 2, router_seed=3)
    sparse.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.text_config.architectures == ["Qwen3MoeForCausalLM"]
    assert loaded.config.text_config.model_type == "qwen3_moe"
    assert torch.equal(logits_of(loaded.eval(), llava_batch), logits_of(sparse, llava_batch))


def test_experts_permuted_give_the_same_output(tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]) -> None:
    """Experts that differ, renamed together with their router rows, are the same model."""
    model = upcycle(tiny_llava(), 4, 2, router_seed=3)
    g = torch.Generator().manual_seed(0)
    order = torch.tensor([2, 0, 3, 1])
    layers = model.model.language_model.layers
    with torch.no_grad():
        for index in routers(model):
            for weight in layers[index].mlp.experts.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=g)
        before = logits_of(model, llava_batch)
        for index in routers(model):
            for weight in (*layers[index].mlp.experts.parameters(), layers[index].mlp.gate.weight):
                weight.copy_(weight[order].clone())
    torch.testing.assert_close(logits_of(model, llava_batch), before, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]) -> None:
    dense = tiny_llava(tie_word_embeddings=tied)
    sparse = upcycle(dense, 4, 2, router_seed=3)
    assert (sparse.lm_head.weight is sparse.get_input_embeddings().weight) is tied
    torch.testing.assert_close(logits_of(sparse, llava_batch), logits_of(dense, llava_batch), rtol=0, atol=LOGITS_ATOL)


def test_sparse_model_shares_no_memory_with_the_dense_one(tiny_llava: Callable[..., Any]) -> None:
    """Training the one leaves the other, and each expert leaves its siblings."""
    dense = tiny_llava()
    sparse = upcycle(dense, 4, 2, "all", router_seed=3)
    storages = {p.untyped_storage().data_ptr() for p in dense.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in sparse.parameters()}
    experts = sparse.model.language_model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[0].zero_()
    assert experts.down_proj[1].any()


def test_routers_follow_their_own_seed(tiny_llava: Callable[..., Any]) -> None:
    """Same seed, same routers, whatever the global generator did; std is the config's initializer_range."""
    dense = tiny_llava()
    one = upcycle(dense, 64, 2, "all", router_seed=3)
    torch.manual_seed(99)
    two = upcycle(dense, 64, 2, "all", router_seed=3)
    other = upcycle(dense, 64, 2, "all", router_seed=4)
    weights = [torch.cat([r.weight for r in routers(model).values()]).detach() for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0][:64], weights[0][64:128])
    num_weights = weights[0].numel()
    five_sigma = 5 / math.sqrt(2 * num_weights)  # of a standard deviation estimated from that many normals
    assert float(weights[0].std()) == pytest.approx(0.2, rel=five_sigma)


def test_bfloat16_stays_bfloat16(tiny_llava: Callable[..., Any]) -> None:
    sparse = upcycle(tiny_llava().bfloat16(), 4, 2, router_seed=3)
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}


def test_parameter_report_by_hand(tiny_llava: Callable[..., Any]) -> None:
    """Two sparse layers of 4 experts: 3 more copies of 3 * 64 * 96 weights each, and a 4 x 64 router; 2 are idle."""
    dense = tiny_llava()
    dense.requires_grad_(False)
    sparse = upcycle(dense, 4, 2, "every_other", router_seed=3)
    before, after = parameter_report(dense), parameter_report(sparse)
    ffn, router = 3 * 64 * 96, 4 * 64
    assert before.total == before.active == dense.num_parameters()
    assert before.trainable == 0
    assert after.total == before.total + 2 * (3 * ffn + router)
    assert after.active == before.total + 2 * (1 * ffn + router)
    assert after.trainable == after.total
    # Attention: q and o 64 x 64, k and v 32 x 64, norms of 32 for q and k; norms: two a layer and the last one.
    assert after.parts["attention"] == PartReport(*[4 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 32)] * 3)
    assert after.parts["norms"] == PartReport(*[(2 * 4 + 1) * 64] * 3)
    assert after.parts["embeddings"] == PartReport(*[64 * 64] * 3)
    assert after.parts["projector"] == PartReport(*[32 * 64 + 64 + 64 * 64 + 64] * 3)
    assert after.parts["dense FFN"] == PartReport(*[2 * ffn] * 3)
    assert after.parts["experts"] == PartReport(2 * 4 * ffn, 2 * 2 * ffn, 2 * 4 * ffn)
    assert after.parts["routers"] == PartReport(*[2 * router] * 3)
    assert "head" not in after.parts  # tied


def test_sparse_layers_of_an_odd_stack() -> None:
    assert sparse_layers("every_other", 5) == [0, 2, 4]
    assert sparse_layers("first_half", 5) == [0, 1]
    assert sparse_layers("second_half", 5) == [2, 3, 4]
    assert sparse_layers([4, 0], 5) == [0, 4]


@pytest.mark.parametrize("layers", ["some", [], [0, 0], [5], [-1]])
def test_impossible_layers_are_refused(layers: Any) -> None:
    with pytest.raises(ConfigError, match="sparse layers"):
        sparse_layers(layers, 5)


def test_impossible_upcycling_is_refused(tiny_llava: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="type 'gemma' has no sparse sibling"):
        upcycle(tiny_llava("gemma"), 4, 2, router_seed=0)
    with pytest.raises(ConfigError, match=r"every layer of mixtral is sparse, got dense layers \[1, 3\]"):
        upcycle(tiny_llava("llama"), 4, 2, router_seed=0)
    with pytest.raises(ConfigError, match="biases in its attention"):
        upcycle(tiny_llava("llama", attention_bias=True), 4, 2, "all", router_seed=0)
    with pytest.raises(ConfigError, match="qwen3_moe has no shared expert"):
        upcycle(tiny_llava(), 4, 2, router_seed=0, shared_expert=True)
    with pytest.raises(ConfigError, match="num_experts_per_tok=5"):
        upcycle(tiny_llava(), 4, 5, router_seed=0)
    with pytest.raises(ConfigError, match="at least 2 experts"):
        upcycle(tiny_llava(), 1, 1, router_seed=0)
    with pytest.raises(ConfigError, match="sliding-window"):
        upcycle(tiny_llava(use_sliding_window=True), 4, 2, router_seed=0)


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


def test_a_siglip_tower_shows_all_its_tokens(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    """It has no class token: sixteen patches are sixteen tokens, in model, processor and our count."""
    from PIL import Image
    from transformers import AutoProcessor, SiglipVisionConfig, SiglipVisionModel

    _, lm_dir = parts
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower_dir = tmp_path / "siglip"
    SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=4, **settings)).save_pretrained(tower_dir)
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
    whole = AutoProcessor.from_pretrained(tmp_path / "whole", backend="pil")
    inputs = whole(images=Image.new("RGB", (20, 16), "red"), text="w2 <image> w3", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, *[60] * 16, 3]]
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    tower = SiglipVisionModel.from_pretrained(tower_dir).state_dict()
    assert all(torch.equal(v, tower[k]) for k, v in model.model.vision_tower.state_dict().items())


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


def test_wrong_parts_are_refused(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    tower_dir, lm_dir = parts
    with pytest.raises(ConfigError, match="language model: expected a model of type"):
        assemble_llava(tower_dir, tower_dir, projector_seed=0, vision_feature_layer=-2)
    with pytest.raises(ConfigError, match="vision tower: no checkpoint at"):
        assemble_llava(tmp_path / "nothing", lm_dir, projector_seed=0, vision_feature_layer=-2)
    with pytest.raises(ConfigError, match="placeholder '<img>'"):
        assemble_llava(tower_dir, lm_dir, projector_seed=0, vision_feature_layer=-2, image_token="<img>")
