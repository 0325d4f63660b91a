"""The forward pass that a loss wants: final hidden states at the rows that predict response tokens."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from logitlake_student.models.parts import projector_parameters

__all__ = ["hidden_response_rows"]

# What a batch may hold for the model, under the names of its arguments.
_ARGUMENTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


def hidden_response_rows(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """`hidden_RH`: the decoder's final hidden states (after the last norm) at the rows `rows_R` of the batch."""
    inputs = {name: batch[name] for name in _ARGUMENTS if name in batch}
    with contextlib.nullcontext() if "pixel_values" in batch else _projector_takes_part(model):
        hidden_BSH = model.model(**inputs, use_cache=False).last_hidden_state
    hidden_RH: Tensor = hidden_BSH.flatten(0, 1)[batch["rows_R"]]
    return hidden_RH


@contextlib.contextmanager
def _projector_takes_part(model: Any) -> Iterator[None]:
    """Gives a projector that trains a gradient of zero where no image passes through it.

    Ranks exchange gradients layer by layer as backward reaches them. One whose samples show no image must reach the
    same layers in the same order, down to the embeddings, as one whose samples do.
    """
    trained = [parameter for parameter in projector_parameters(model) if parameter.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        yield
        return

    def add_nothing(_module: Any, _inputs: Any, embedded_BSH: Tensor) -> Tensor:
        return embedded_BSH + 0 * torch.stack([parameter.sum() for parameter in trained]).sum()

    hook = model.get_input_embeddings().register_forward_hook(add_nothing)
    try:
        yield
    finally:
        hook.remove()
