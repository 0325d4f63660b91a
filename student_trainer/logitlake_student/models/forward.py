"""The forward pass that a loss wants: final hidden states at the rows that predict response tokens."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["hidden_response_rows"]


def hidden_response_rows(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """`hidden_RH`: the decoder's final hidden states (after the last norm) at the rows `rows_R` of the batch."""
    inputs = {"input_ids": batch["input_ids_BS"], "attention_mask": batch["attention_mask_BS"], "use_cache": False}
    if "pixel_values" in batch:
        inputs["pixel_values"] = batch["pixel_values"]
    hidden_BSH = model.model(**inputs).last_hidden_state
    hidden_RH: Tensor = hidden_BSH.flatten(0, 1)[batch["rows_R"]]
    return hidden_RH
