"""The forward pass that a loss wants: final hidden states at the rows that predict response tokens."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["hidden_response_rows"]

# What a batch may hold for the model, under the names of its arguments.
_ARGUMENTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


def hidden_response_rows(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """`hidden_RH`: the decoder's final hidden states (after the last norm) at the rows `rows_R` of the batch."""
    inputs = {name: batch[name] for name in _ARGUMENTS if name in batch}
    hidden_BSH = model.model(**inputs, use_cache=False).last_hidden_state
    hidden_RH: Tensor = hidden_BSH.flatten(0, 1)[batch["rows_R"]]
    return hidden_RH
