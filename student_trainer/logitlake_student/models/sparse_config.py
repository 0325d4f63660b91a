"""What the sparse sibling of a dense student is, decided from configurations alone: nothing here touches a weight.

Which layers are sparse is written as `mlp_only_layers` (the dense ones), since `decoder_sparse_step` cannot say "layers
0, 2, 4, …".
"""

from collections.abc import Sequence
from typing import Any, Literal

from logitlake_shared.errors import ConfigError
from logitlake_student.models.families import Family, family_of
from logitlake_student.models.parts import language_config

__all__ = ["SMALLEST_SHARED", "LayerChoice", "sparse_config", "sparse_layers"]

LayerChoice = Literal["every_other", "all", "first_half", "second_half"]

SMALLEST_SHARED = 8
"""Units of a shared expert that nobody asked for: the fewest that matrix kernels like."""


def sparse_layers(layers: LayerChoice | Sequence[int], num_layers: int) -> list[int]:
    """Indices of the layers that become sparse, in order.

    `every_other` is LLaVA-MoD's choice and begins at 0. For an odd number of layers, the middle one belongs
    to the second half.

    Raises:
        ConfigError: an unknown choice, no layer, a repeated index or one that does not exist.
    """
    choices = {
        "every_other": range(0, num_layers, 2),
        "all": range(num_layers),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    if isinstance(layers, str):
        if layers not in choices:
            raise ConfigError(f"sparse layers: expected one of {sorted(choices)} or indices, got {layers!r}")
        layers = choices[layers]
    indices = sorted(layers)
    if not indices or len(set(indices)) != len(indices) or not all(0 <= i < num_layers for i in indices):
        raise ConfigError(
            f"sparse layers: expected distinct indices of a model of {num_layers} layers, got {list(layers)}"
        )
    return indices


def sparse_config(
    dense: Any,
    num_experts: int,
    num_experts_per_tok: int,
    layers: LayerChoice | Sequence[int],
    *,
    shared_expert: bool,
) -> Any:
    """The configuration of the student that `upcycle` makes with these arguments of one with the configuration `dense`.

    Raises:
        ConfigError: a language model without a sparse sibling here, or numbers that do not fit together.
    """
    dense_text = language_config(dense)
    family = family_of(dense_text)
    if not 1 <= num_experts_per_tok <= num_experts or num_experts < 2:
        raise ConfigError(
            "upcycling: expected at least 2 experts and 1 <= num_experts_per_tok <= num_experts, got "
            f"num_experts={num_experts}, num_experts_per_tok={num_experts_per_tok}"
        )
    if shared_expert and not family.shares:
        raise ConfigError(f"upcycling: {family.text_type} has no shared expert; set shared_expert=false")
    num_layers = dense_text.num_hidden_layers
    still_dense = sorted(set(range(num_layers)) - set(sparse_layers(layers, num_layers)))
    if still_dense and not family.interleaves:
        raise ConfigError(
            f"upcycling: every layer of {family.text_type} is sparse, got dense layers {still_dense}; set "
            'layers = "all"'
        )
    text = {key: value for key, value in dense_text.to_dict().items() if key not in family.dropped}
    text |= {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        family.ffn_size: dense_text.intermediate_size,
        "architectures": [family.architecture],
    }
    if family.interleaves:
        text |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": still_dense}
    if family.shares:
        text["shared_expert_intermediate_size"] = dense_text.intermediate_size if shared_expert else SMALLEST_SHARED
    return _with_language_model(dense, family, text)


def _with_language_model(dense: Any, family: Family, text: dict[str, Any]) -> Any:
    """The whole around the sparse language model; just that where there is nothing around the dense one."""
    from transformers import CONFIG_MAPPING

    sparse_text = CONFIG_MAPPING[family.text_type](**text)
    if language_config(dense) is dense:
        return sparse_text
    whole = dense.to_dict()
    for field in ("model_type", "transformers_version", "architectures"):
        whole.pop(field, None)
    whole["text_config"] = sparse_text
    vision = dense.vision_config.to_dict()
    if family.whole_type is None:
        whole["vision_config"] = type(dense.vision_config).from_dict(vision)
        return type(dense)(**whole)
    # The sibling of the whole names its tower after itself; it is the same tower.
    vision.pop("model_type", None)
    whole["vision_config"] = vision
    whole["text_config"] = sparse_text.to_dict()
    return CONFIG_MAPPING[family.whole_type](**whole)
