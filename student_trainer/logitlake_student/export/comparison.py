"""What every gate of an export compares on, whoever loads it, and says in the end.

Axes: S positions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitlake_shared.errors import ExportError

__all__ = ["GateSample", "export_name", "require_within"]


@dataclass(frozen=True)
class GateSample:
    """A sample to compare on: ids with one placeholder an image, as `alignment.interleave` gives them."""

    ids_S: npt.NDArray[np.int64]
    is_response_S: npt.NDArray[np.bool_]
    images: tuple[bytes, ...] = ()
    """Encoded, in the order of their placeholders."""


def export_name(path: Path) -> str:
    """What the user calls an export that is still being built (`checkpoint.building`)."""
    return path.name.removeprefix(".").removesuffix(".partial")


def require_within(difference: float, tolerance: float, engine: str, export: Path, hint: str = "") -> None:
    """Raises `ExportError` for a difference beyond the tolerance, in nats, or one that is not a number."""
    if not difference <= tolerance:  # a NaN is a failure too
        raise ExportError(
            f"export gate: {engine} gives other logprobs for {export_name(export)} than the trained student: largest "
            f"difference {difference:.3g} nats, expected at most {tolerance:.3g}{hint}; the export was not published"
        )
