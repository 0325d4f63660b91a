"""What the preset `faithful` sets otherwise: the one table of differences."""

from typing import Any

__all__ = ["FAITHFUL"]

FAITHFUL: dict[str, dict[str, Any]] = {
    "init": {"adam_beta2": 0.98},
    "d2d": {"adam_beta2": 0.98},
    # The reference adds the cross-entropy at weight 1, and its experts take one and a half even shares.
    "d2s": {"adam_beta2": 0.98, "ce_weight": 1.0, "capacity_factor": 1.5},
    "preference": {"adam_beta2": 0.98, "loss": "kto_pair", "nll_weight": 0.0, "capacity_factor": 1.5},
}
"""What the reference's recipe sets otherwise, by type of stage. Its stochastic second expert, padding in the balance
loss and in the experts' capacity, micro-batch means and shifted mask are errors of its code, not of its recipe, and are
not kept."""
