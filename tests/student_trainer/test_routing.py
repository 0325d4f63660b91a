"""Router logits are overheard whole, with gradient, and computed in float32."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logitlake_shared.errors import TrainingError
from logitlake_student.losses.balance import load_balancing_loss
from logitlake_student.models.parts import decoder, routers
from logitlake_student.models.routing import RouterRecorder, compute_routers_in_float32, float32_router_forward
from logitlake_student.models.upcycle import upcycle

FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "qwen3_vl_moe_text")
NUM_EXPERTS, TOP_K = 4, 2

# Same float32 products, recomputed by checkpointing or stacked another way.
ATOL = 1e-6


@pytest.fixture
def sparse(tiny_llava: Callable[..., Any]) -> Any:
    return upcycle(tiny_llava(), NUM_EXPERTS, TOP_K, "every_other", router_seed=3)


def test_recorded_logits_are_transformers_own(sparse: Any, llava_batch: dict[str, Tensor]) -> None:
    """What the hooks hear is what the language model itself reports when asked for router logits."""
    reported = {}
    hook = decoder(sparse).register_forward_hook(
        lambda _module, _inputs, output: reported.update(logits=output.router_logits)
    )
    with RouterRecorder(sparse) as recorder:
        sparse(**llava_batch, output_router_logits=True)
    hook.remove()
    ours = recorder.logits()
    assert len(ours) == 2
    assert all(logits.shape == (llava_batch["input_ids"].numel(), NUM_EXPERTS) for logits in ours)
    for a, b in zip(ours, reported["logits"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_balance_loss_reaches_the_routers(checkpointing: bool, sparse: Any, llava_batch: dict[str, Tensor]) -> None:
    """Gradients of the balance loss, with and without gradient checkpointing, are the same and not zero."""
    reference = copy.deepcopy(sparse)
    grads = []
    for model, checkpointed in ((reference, False), (sparse, checkpointing)):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with RouterRecorder(model) as recorder:
            model(**llava_batch, use_cache=False)
        loss = load_balancing_loss(recorder.logits(), llava_batch["attention_mask"].flatten().bool(), TOP_K)
        loss.backward()
        grads.append([router.weight.grad for router in routers(model).values()])
    for expected, got in zip(*grads, strict=True):
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)


def test_a_second_run_changes_nothing_until_cleared(sparse: Any, llava_batch: dict[str, Tensor]) -> None:
    """Backward of a checkpointed layer runs its router again: the recorder keeps what the loss was made of."""
    other = {"input_ids": llava_batch["input_ids"].clamp(max=50)}
    with RouterRecorder(sparse) as recorder:
        sparse(**llava_batch)
        first = recorder.logits()
        sparse(**other)
        assert all(a is b for a, b in zip(first, recorder.logits(), strict=True))
        recorder.clear()
        sparse(**other)
        assert not torch.equal(first[0], recorder.logits()[0])
    sparse(**llava_batch)
    assert not torch.equal(first[0], recorder.logits()[0])  # outside the context nothing is heard


def test_a_dense_model_has_nothing_to_record(tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]) -> None:
    with RouterRecorder(tiny_llava()) as recorder:
        pass
    assert recorder.logits() == []


def test_logits_without_a_forward_are_refused(sparse: Any) -> None:
    with RouterRecorder(sparse) as recorder, pytest.raises(TrainingError, match=r"layers \[0, 2\]"):
        recorder.logits()


def router_of(family: str, *, normalised: bool = True) -> Any:
    """One router, float32, of the class that a student of this family has."""
    from transformers import CONFIG_MAPPING
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

    classes = (Qwen2MoeTopKRouter, Qwen3MoeTopKRouter, MixtralTopKRouter, Qwen3VLMoeTextTopKRouter)
    options = {"hidden_size": 32, "num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
    if family in ("qwen2_moe", "qwen3_moe"):
        options["norm_topk_prob"] = normalised
    router = dict(zip(FAMILIES, classes, strict=True))[family](CONFIG_MAPPING[family](**options))
    router.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return router


@pytest.mark.parametrize(
    ("family", "normalised"), [*((family, True) for family in FAMILIES), ("qwen2_moe", False), ("qwen3_moe", False)]
)
def test_a_float32_router_gives_what_its_class_gives(family: str, normalised: bool) -> None:
    """Logits, weights and ids bit for bit, and the same gradients. Two of the classes may leave weights as they are."""
    stock = router_of(family, normalised=normalised)
    hidden_NH = torch.randn(13, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for forward in (stock.forward, partial(float32_router_forward, stock)):
        logits_NE, weights_Nk, ids_Nk = forward(hidden_NH)
        loss = (weights_Nk * torch.tensor([1.0, 3.0])).sum() + logits_NE.square().sum()
        found.append([logits_NE, weights_Nk, ids_Nk, *torch.autograd.grad(loss, [hidden_NH, stock.weight])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.allclose(found[0][1].sum(dim=1), torch.ones(13)) == normalised


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_router_decides_in_float32(family: str) -> None:
    """Logits that bfloat16 would round to one are told apart, in the class of every family."""
    router = router_of(family).bfloat16()
    hidden_1H = torch.ones(1, 32, dtype=torch.bfloat16)
    # Sums of 32 weights: 16, 16 + 1/32 and 0. Near 16 bfloat16 has steps of 1/8.
    router.weight.data.zero_()
    router.weight.data[1:3] = 0.5
    router.weight.data[2, 0] = 0.53125
    _, _, ids_1k = float32_router_forward(router, hidden_1H)
    assert ids_1k.tolist() == [[2, 1]]
    logits_1E, _, _ = router(hidden_1H)
    assert logits_1E[0, 1] == logits_1E[0, 2]


@pytest.mark.parametrize(("dense", "layers"), [("qwen2", "every_other"), ("qwen3", "every_other"), ("llama", "all")])
def test_float32_routers_change_nothing_in_a_float32_model(
    dense: str, layers: Any, tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """The replaced forward gives the stock model's numbers bit for bit."""
    sparse = upcycle(tiny_llava(dense), NUM_EXPERTS, TOP_K, layers, router_seed=3)
    sparse.save_pretrained(tmp_path)
    stock = type(sparse).from_pretrained(tmp_path).eval()
    assert routers(stock).keys() == routers(sparse).keys()
    with torch.no_grad():
        assert torch.equal(sparse(**llava_batch).logits, stock(**llava_batch).logits)


@pytest.mark.parametrize("autocast", [False, True])
def test_routers_are_float32_in_a_bfloat16_model(autocast: bool, sparse: Any, llava_batch: dict[str, Tensor]) -> None:
    """Under bf16 weights or autocast, logits are what a float32 product of the router's input gives."""
    model = sparse if autocast else sparse.bfloat16()
    router = routers(model)[0]
    inputs = []
    hook = router.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with RouterRecorder(model) as recorder, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(**llava_batch | {"pixel_values": llava_batch["pixel_values"].to(model.dtype)})
    hook.remove()
    (hidden,) = inputs
    assert hidden.dtype == torch.bfloat16 or autocast
    expected = hidden.reshape(-1, hidden.shape[-1]).float() @ router.weight.float().t()
    got = recorder.logits()[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)
    assert not torch.equal(got, got.bfloat16().float())  # it was not rounded on the way


def test_replacing_routers_again_is_harmless(sparse: Any, llava_batch: dict[str, Tensor]) -> None:
    before = sparse(**llava_batch).logits
    compute_routers_in_float32(sparse)
    assert torch.equal(sparse(**llava_batch).logits, before)
