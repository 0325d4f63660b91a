"""How experts multiply: one function, whatever the implementation, and an idle expert harms none of them.

Axes: N tokens, E experts, H hidden, k experts a token.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from logitlake_student.config import TrainConfig
from logitlake_student.models.experts import ExpertsImplementation, register_experts, use_experts
from logitlake_student.models.parts import decoder
from logitlake_student.models.upcycle import upcycle

IMPLEMENTATIONS = get_args(ExpertsImplementation)
FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "qwen3_vl_moe_text")
N, TOP_K, NUM_EXPERTS = 11, 2, 4

# Sums of a hundred float32 products in another order.
RTOL = 1e-5
# One rounding of bfloat16 is 2^-9 of what is rounded; some ten follow each other, each of a part of the largest value.
BF16_ATOL = 2e-2


def experts_of(family: str) -> Any:
    """The experts of one layer, float32, of the class that a student of this family has."""
    from transformers import CONFIG_MAPPING
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    register_experts()
    classes = (Qwen2MoeExperts, Qwen3MoeExperts, MixtralExperts, Qwen3VLMoeTextExperts)
    width = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    options = {"hidden_size": 32, width: 48, "num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
    experts = dict(zip(FAMILIES, classes, strict=True))[family](CONFIG_MAPPING[family](**options))
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return experts


def run(experts: Any, implementation: str, idle: int | None = None, *, autocast: bool = False) -> list[Tensor]:
    """Output, and the gradients of tokens, weights and matrices. Expert `idle` gets no token."""
    experts.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(N, 32, generator=generator).requires_grad_()
    scores_NE = torch.randn(N, NUM_EXPERTS, generator=generator)
    if idle is not None:
        scores_NE[:, idle] = -9
    ids_Nk = scores_NE.topk(TOP_K).indices
    weights_Nk = torch.rand(N, TOP_K, generator=generator).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out_NH = experts(hidden_NH, ids_Nk, weights_Nk)
    leaves = [hidden_NH, weights_Nk, experts.gate_up_proj, experts.down_proj]
    wanted_NH = torch.randn(N, 32, generator=generator)
    return [out_NH.detach(), *torch.autograd.grad((out_NH * wanted_NH).sum(), leaves)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("idle", [None, 2])
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "eager"])
def test_equals_the_loop_over_experts(implementation: str, idle: int | None, family: str) -> None:
    """The twin is transformers' `eager`: same output and gradients. An expert without tokens has a gradient of zero,
    not of NaN (C9)."""
    experts = experts_of(family)
    found = run(experts, implementation, idle)
    for got, expected in zip(found, run(experts, "eager", idle), strict=True):
        torch.testing.assert_close(got, expected, rtol=RTOL, atol=RTOL)
    if idle is not None:
        for of_matrix in found[3:]:
            assert not of_matrix[idle].any()
            assert of_matrix[idle - 1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_follows_autocast(family: str) -> None:
    """Under autocast ours multiplies in bfloat16, and transformers' grouped product does not, which is why ours is
    there. Output and gradients keep the types of their leaves."""
    experts = experts_of(family)
    exact, ours = run(experts, "eager"), run(experts, "logitlake", autocast=True)
    for got, expected in zip(ours, exact, strict=True):
        assert got.dtype == torch.float32
        assert not torch.allclose(got, expected, rtol=RTOL, atol=RTOL)
        torch.testing.assert_close(got / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=BF16_ATOL)
    grouped = run(experts, "grouped_mm", autocast=True)
    torch.testing.assert_close(grouped[0], exact[0], rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_student_takes_any(
    implementation: ExpertsImplementation,
    tiny_llava: Callable[..., Any],
    llava_batch: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """The choice reaches the experts, changes no output, and is not saved."""
    sparse = upcycle(tiny_llava(), NUM_EXPERTS, TOP_K, router_seed=3)
    before = sparse(**llava_batch).logits
    use_experts(sparse, implementation)
    assert decoder(sparse).layers[0].mlp.experts.config._experts_implementation == implementation
    torch.testing.assert_close(sparse(**llava_batch).logits, before, rtol=RTOL, atol=RTOL)
    sparse.save_pretrained(tmp_path)
    assert "experts_implementation" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_dense_student_is_left_alone(tiny_llava: Callable[..., Any], llava_batch: dict[str, Tensor]) -> None:
    dense = tiny_llava()
    before = dense(**llava_batch).logits
    use_experts(dense, "logitlake")
    assert torch.equal(dense(**llava_batch).logits, before)


def test_the_configuration_knows_the_same() -> None:
    """The field cannot import the list: it would bring torch. Its default is what `benchmarks.moe` calls ours."""
    from benchmarks.moe import _OURS

    field = TrainConfig.model_fields["experts_implementation"]
    assert get_args(field.annotation) == IMPLEMENTATIONS
    assert field.default == _OURS


def test_training_multiplies_as_it_was_told(student_world: Any, metrics_of: Callable[[Path], Any]) -> None:
    """Two implementations, one loss curve up to rounding; and the choice is what `experts` were told."""
    stage = {"type": "d2s", "steps": 4, "log_every": 2, "save_every": 4}
    ours, eager = (
        metrics_of(
            student_world.train(
                student_world.train_config(stage, experts_implementation=name, output=str(student_world.folder / name))
            )
        )
        for name in ("logitlake", "eager")
    )
    assert len(ours) == 2
    for one, other in zip(ours, eager, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=RTOL)
