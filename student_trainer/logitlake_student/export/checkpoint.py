"""The folder of a stock checkpoint: weights under canonical names, tokenizer, processor, model card.

Tensors are copied bit for bit, one weight file in memory at a time; where a released layout differs from the one that
transformers saves they are transposed (`layout`). An export appears whole or not at all: it is built in a hidden
folder beside its destination, checked there by the gate, and renamed.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitlake_shared.durable import publish_folder
from logitlake_shared.errors import ExportError
from logitlake_student.export.card import (
    CardFacts,
    ParameterCount,
    count_parameters,
    loading_checkpoint,
    model_card,
)
from logitlake_student.export.layout import Target, ambiguous_experts, canonical_layout, canonical_name
from logitlake_student.export.source import INDEX, read_config, weight_files
from logitlake_student.models.assemble import copy_processor_files

__all__ = ["ExportResult", "building", "export_checkpoint"]

# Qwen-VL processors bring a video processor, without which vLLM does not load their images either.
_MORE_FILES = ("generation_config.json", "video_preprocessor_config.json")

Gate = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class ExportResult:
    """What was exported."""

    out_dir: Path
    num_tensors: int
    parameters: ParameterCount
    gate: dict[str, Any] | None
    """What the gate found; None where there was no gate."""

    def checks(self) -> list[str]:
        """What the gate found, a line each, for people."""
        return [_told(engine, found) for engine, found in (self.gate or {}).items()]


def _told(engine: str, found: Any) -> str:
    if isinstance(found, dict):
        version = f" {found['version']}" if "version" in found else ""
        difference = found["max_abs_diff"]
        closeness = f"within {difference:.1e} nats" if difference else "bit for bit"
        return f"{engine}{version}: the trained student's logprobs, {closeness}"
    return f"{engine}: {found} equal bit for bit" if isinstance(found, int) else f"{engine}: {found}"


def export_checkpoint(
    model_dir: Path, out_dir: Path, *, facts: CardFacts, target: Target = "hf", gate: Gate | None = None
) -> ExportResult:
    """Writes a release of a trained checkpoint.

    Args:
        model_dir: folder with `config.json`, safetensors weights, tokenizer and processor files.
        out_dir: destination; must not exist, its parent must.
        facts: where the student comes from and how well it does, for the model card.
        target: `vllm` differs from `hf` only where one file cannot suit both (`layout.ambiguous_experts`).
        gate: looks at the finished folder before it gets its name; what it returns goes into the result. It
            raises `ExportError` to stop the export.

    Raises:
        ExportError: the source is not a checkpoint, the destination exists, or the gate said no. Nothing is
            left behind in any of these cases.
    """
    config = read_config(model_dir)
    with building(out_dir) as folder:
        sizes = _copy_weights(model_dir, folder, config, target)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_processor_files([model_dir], folder)
        for name in _MORE_FILES:
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, folder / name)
        parameters = count_parameters(config, sizes)
        transformers_reads = target == "hf" or not ambiguous_experts(config)
        loading = loading_checkpoint(out_dir.name, config, transformers_reads=transformers_reads)
        card = model_card(out_dir.name, config, parameters, facts, loading=loading)
        (folder / "README.md").write_text(card, encoding="utf-8")
        report = gate(folder) if gate is not None else None
    return ExportResult(out_dir, len(sizes), parameters, report)


@contextmanager
def building(out_dir: Path) -> Iterator[Path]:
    """A hidden folder that becomes `out_dir` if the block ends well, and is gone otherwise. Raises `ExportError`."""
    if out_dir.exists():
        raise ExportError(f"export: {out_dir} exists already; remove it or choose another destination")
    if not out_dir.parent.is_dir():
        raise ExportError(f"export: the folder {out_dir.parent} of the destination does not exist; create it")
    folder = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    folder.mkdir()
    try:
        yield folder
        publish_folder(folder, out_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_weights(model_dir: Path, out_dir: Path, config: dict[str, Any], target: Target) -> dict[str, int]:
    """Copies every weight file, canonical. Returns the number of elements of each tensor."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    files, index = weight_files(model_dir)
    lay_out = canonical_layout(config, target)
    sizes: dict[str, int] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            tensors = {canonical_name(name): lay_out(name, weights.get_tensor(name)) for name in names}
        save_file(tensors, out_dir / file.name, metadata={"format": "pt"})
        sizes |= {name: tensor.numel() for name, tensor in tensors.items()}
    if index:
        index["weight_map"] = {canonical_name(name): file for name, file in index["weight_map"].items()}
        (out_dir / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return sizes
