"""A sparse student starts as the dense one, whatever family it is of."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import noise_png, save_tiny_qwen_vl
from torch import Tensor

from logitlake_shared.errors import ConfigError
from logitlake_student.model_inputs import ModelInputs
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


@pytest.mark.parametrize("kind", ["llava qwen2", "llava qwen3", "qwen3_vl", "text qwen3"])
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
    """Each matrix of each expert moves by its own draws, of the asked share of its own spread; the same seed draws the
    same."""
    dense = tiny_llava()
    ffn = decoder(dense).layers[0].mlp
    with torch.no_grad():
        ffn.up_proj.weight *= 5  # so that one spread cannot pass for the other
    moved, again = (upcycle(dense, 4, 2, "all", router_seed=3, expert_noise=0.01) for _ in range(2))
    for one, same in zip(moved.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)
    experts = decoder(moved).layers[0].mlp.experts
    gate_EFH, up_EFH = experts.gate_up_proj.chunk(2, dim=1)
    for copies_EOI, linear in ((gate_EFH, ffn.gate_proj), (up_EFH, ffn.up_proj), (experts.down_proj, ffn.down_proj)):
        weight_OI = linear.weight.detach()
        moves_EOI = copies_EOI.detach() - weight_OI
        five_sigma = 5 / math.sqrt(2 * weight_OI.numel())  # of a standard deviation estimated from that many normals
        for move_OI in moves_EOI:
            assert float(move_OI.std() / weight_OI.std()) == pytest.approx(0.01, rel=five_sigma)
        correlations = torch.corrcoef(moves_EOI.flatten(1)).fill_diagonal_(0)
        assert float(correlations.abs().max()) < 5 / math.sqrt(weight_OI.numel())


def test_no_noise_is_exact_copies_and_noise_moves_nothing_else(tiny_llava: Callable[..., Any]) -> None:
    """Bit for bit: a run with noise differs from one without in its experts alone, not in its routers."""
    dense = tiny_llava()
    exact, none, moved = (
        upcycle(dense, 4, 2, "all", router_seed=3, **options)
        for options in ({}, {"expert_noise": 0.0}, {"expert_noise": 0.1})
    )
    ffn, experts = decoder(dense).layers[1].mlp, decoder(exact).layers[1].mlp.experts
    for expert in range(4):
        assert torch.equal(experts.gate_up_proj[expert], torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]))
        assert torch.equal(experts.down_proj[expert], ffn.down_proj.weight)
    for name, weight in exact.state_dict().items():
        assert torch.equal(weight, none.state_dict()[name])
        assert torch.equal(weight, moved.state_dict()[name]) is (".mlp.experts." not in name)


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


@pytest.mark.parametrize("kind", KINDS)
def test_experts_permuted_give_the_same_output(kind: str, tiny_llava: Callable[..., Any], tmp_path: Path) -> None:
    """Experts that differ, renamed together with their router rows, are the same model; without these it is another."""
    dense, batch = dense_student(kind, tiny_llava, tmp_path)
    model = upcycle(dense, 4, 2, "all", router_seed=3, expert_noise=0.5)
    order = torch.tensor([2, 0, 3, 1])
    before = logits_of(model, batch)
    with torch.no_grad():
        for layer in decoder(model).layers:
            for weight in layer.mlp.experts.parameters():
                weight.copy_(weight[order].clone())
        assert not torch.allclose(logits_of(model, batch), before, rtol=0, atol=100 * LOGITS_ATOL)
        for router in routers(model).values():
            router.weight.copy_(router.weight[order].clone())
    torch.testing.assert_close(logits_of(model, batch), before, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llava qwen3", "qwen3_vl", "text llama"])
def test_a_tied_head_stays_tied(kind: str, tied: bool, tiny_llava: Callable[..., Any], tmp_path: Path) -> None:
    """Also where the whole says so, and not its language model."""
    from transformers import AutoModelForImageTextToText

    dense, batch = dense_student(kind, partial(tiny_llava, tie_word_embeddings=tied), tmp_path)
    if kind == "qwen3_vl":
        dense.config.tie_word_embeddings = tied
        dense = AutoModelForImageTextToText.from_config(dense.config).eval()
    sparse = upcycle(dense, 4, 2, "all", router_seed=3)
    assert (sparse.lm_head.weight is sparse.get_input_embeddings().weight) is tied
    torch.testing.assert_close(logits_of(sparse, batch), logits_of(dense, batch), rtol=0, atol=LOGITS_ATOL)


ROPE = {"rope_theta": 1e6, "original_max_position_embeddings": 16, "factor": 4.0}
# What a language model may be beside the usual, by what its sibling might forget.
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "wide heads": ("qwen3", {"head_dim": 48}),
    "biases": ("qwen3", {"attention_bias": True}),
    "norm": ("qwen2", {"rms_norm_eps": 0.1}),
    "activation": ("qwen2", {"hidden_act": "gelu"}),
    "yarn": ("qwen2", {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
    "llama3": (
        "llama",
        {
            "head_dim": 48,
            "rope_parameters": ROPE | {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4},
        },
    ),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_about_a_language_model_is_kept(
    case: str, tiny_llava: Callable[..., Any], tmp_path: Path
) -> None:
    """And it matters: with usual settings the same weights say something else, where they fit at all."""
    family, options = UNUSUAL[case]
    dense, batch = dense_student(f"text {family}", partial(tiny_llava, **options), tmp_path)
    sparse = upcycle(dense, 4, 2, "all", router_seed=3)
    expected = logits_of(dense, batch)
    torch.testing.assert_close(logits_of(sparse, batch), expected, rtol=0, atol=LOGITS_ATOL)
    usual, _ = dense_student(f"text {family}", tiny_llava, tmp_path)
    if {name: weight.shape for name, weight in usual.state_dict().items()} == {
        name: weight.shape for name, weight in dense.state_dict().items()
    }:
        usual.load_state_dict(dense.state_dict())
        assert not torch.allclose(logits_of(usual, batch), expected, rtol=0, atol=100 * LOGITS_ATOL)


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
