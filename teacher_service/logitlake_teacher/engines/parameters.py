"""How many parameters a token passes through, counted from the headers of the checkpoint's files."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from logitlake_shared.errors import EngineError

__all__ = ["active_parameters"]

# A safetensors file begins with the length of its JSON header.
_LENGTH = struct.Struct("<Q")
_LOOKUPS = ("embed_tokens.weight", "wte.weight")


def active_parameters(model_dir: Path) -> float:
    """Parameters that take part in a token's forward pass: of a layer's experts, those that a token is routed to.

    An embedding table is a look-up and costs nothing, unless it is the lm_head as well. Raises `EngineError` without
    safetensors files.
    """
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    num_experts = text.get("num_experts") or text.get("num_local_experts") or 0
    share = text.get("num_experts_per_tok", 1) / num_experts if num_experts else 1.0
    sizes = dict(_sizes(model_dir))
    has_head = any(name.endswith("lm_head.weight") for name in sizes)
    total = 0.0
    for name, size in sizes.items():
        if name.endswith(_LOOKUPS) and has_head:
            continue
        total += size * (share if ".experts." in name else 1.0)
    return total


def _sizes(model_dir: Path) -> Iterator[tuple[str, int]]:
    paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise EngineError(f"{model_dir}: holds no *.safetensors file; expected the folder of a teacher checkpoint")
    for path in paths:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header: dict[str, Any] = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, math.prod(tensor["shape"])
