"""What trains in each stage, by name: the paper's list, spelled out."""

from collections.abc import Callable
from typing import Any

import pytest
from tests.golden.make_trained_parameters import GOLDEN, trained_parameters

from logitlake_shared.errors import ConfigError
from logitlake_student.models.upcycle import upcycle
from logitlake_student.stages import STAGES, freeze_for_stage, trainable_parameters

PROJECTOR = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
LM = "model.language_model."
ATTENTION = {f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
DENSE_FFN = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
SPARSE_FFN = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"}


def test_every_parameter_of_every_family_is_where_the_golden_list_says() -> None:
    """`tests/golden/trained_parameters.txt`, a line a parameter and a mark a stage: the table of LLaVA-MoD's code, for
    all architectures, tower and norms included. What it says for one of them is spelled out below once more."""
    assert trained_parameters() == GOLDEN.read_text(encoding="utf-8")


def layers(names: set[str], indices: range | tuple[int, ...]) -> set[str]:
    return {f"{LM}layers.{i}.{name}" for i in indices for name in names}


def test_init_trains_the_projector_only(tiny_llava: Callable[..., Any]) -> None:
    assert set(freeze_for_stage(tiny_llava(), "init")) == PROJECTOR


def test_d2d_trains_the_language_model_and_the_projector(tiny_llava: Callable[..., Any]) -> None:
    """The head is tied to the embedding here, and therefore trains under the embedding's name."""
    everything = layers(ATTENTION | NORMS | DENSE_FFN, range(4))
    everything |= PROJECTOR | {f"{LM}embed_tokens.weight", f"{LM}norm.weight"}
    assert set(freeze_for_stage(tiny_llava(), "d2d")) == everything
    untied = freeze_for_stage(tiny_llava(tie_word_embeddings=False), "d2d")
    assert set(untied) == everything | {"lm_head.weight"}


@pytest.mark.parametrize("stage", ["d2s", "preference"])
def test_d2s_and_preference_train_ffns_experts_routers_and_projector(
    stage: Any, tiny_llava: Callable[..., Any]
) -> None:
    """Dense layers' FFNs too; attention, norms, embedding and head stay."""
    model = upcycle(tiny_llava(tie_word_embeddings=False), 4, 2, "every_other", router_seed=0)
    expected = layers(SPARSE_FFN, (0, 2)) | layers(DENSE_FFN, (1, 3)) | PROJECTOR
    assert set(freeze_for_stage(model, stage)) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_freezing_sets_exactly_these_and_forgets_the_stage_before(stage: Any, tiny_llava: Callable[..., Any]) -> None:
    """requires_grad says what the list says, after any other stage; the vision tower never trains."""
    model = tiny_llava()
    for before in STAGES:
        freeze_for_stage(model, before)
        names = freeze_for_stage(model, stage)
        assert names == [name for name, p in model.named_parameters() if p.requires_grad]
        assert names == [name for name, _ in trainable_parameters(model, stage)]
        assert not any("vision_tower" in name for name in names)


def test_listing_changes_nothing(tiny_llava: Callable[..., Any]) -> None:
    model = tiny_llava()
    trainable_parameters(model, "init")
    assert all(p.requires_grad for p in model.parameters())


def test_a_text_model_trains_without_a_projector(tiny_llava: Callable[..., Any]) -> None:
    """A plain causal language model: all of it in d2d, nothing in init."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM(tiny_llava().config.text_config)
    assert len(freeze_for_stage(model, "d2d")) == len(list(model.parameters()))
    with pytest.raises(ConfigError, match="stage init: a model of type 'qwen3' has nothing"):
        freeze_for_stage(model, "init")


def test_an_unknown_stage_is_refused(tiny_llava: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="got 'sft'"):
        freeze_for_stage(tiny_llava(), "sft")  # type: ignore[arg-type]  # that is the point
