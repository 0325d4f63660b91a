"""Router logits are overheard whole, with gradient, and computed in float32."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from logitlake_shared.errors import TrainingError
from logitlake_student.losses.balance import load_balancing_loss
from logitlake_student.models.parts import decoder, routers
from logitlake_student.models.routing import RouterRecorder, compute_routers_in_float32
from logitlake_student.models.upcycle import upcycle

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


def test_float32_routers_change_nothing_in_a_float32_model(
    tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor], tmp_path: Any
) -> None:
    """The replaced forward gives the stock router's numbers bit for bit."""
    sparse = upcycle(tiny_llava(), NUM_EXPERTS, TOP_K, router_seed=3)
    sparse.save_pretrained(tmp_path)
    stock = type(sparse).from_pretrained(tmp_path).eval()
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


def test_a_student_trains_with_the_grouped_product(sparse: Any) -> None:
    """What `benchmarks.moe` calls ours is what an upcycled student multiplies with."""
    from benchmarks.moe import _OURS

    assert decoder(sparse).config._experts_implementation == _OURS
