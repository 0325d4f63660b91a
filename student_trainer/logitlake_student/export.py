"""A trained student as others load it: canonical tensor names, tokenizer, processor, model card.

What transformers saves is not quite what vLLM loads: it writes a CLIP tower as `vision_tower.embeddings…`,
and vLLM wants the released models' `vision_tower.vision_model.embeddings…` (transformers reads both). Expert
weights are stored one expert a tensor, which both read. Tensors are copied, never converted.

An export appears whole or not at all: it is built in a hidden folder beside its destination, checked there by
the gate (`export_gate.check_export`), and renamed.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitlake_shared.errors import ExportError
from logitlake_student.models.assemble import copy_processor_files

__all__ = ["ExportResult", "canonical_name", "export_checkpoint"]

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ExportResult:
    """What was exported."""

    out_dir: Path
    num_tensors: int
    params_total: int
    gate: dict[str, Any] | None
    """What the gate found; None where there was no gate."""


def canonical_name(name: str) -> str:
    """The name under which released LLaVA checkpoints, and vLLM, know a tensor that transformers saved."""
    tower = "vision_tower."
    if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
        return f"{tower}vision_model.{name.removeprefix(tower)}"
    return name


def export_checkpoint(
    model_dir: Path,
    out_dir: Path,
    *,
    lineage: Mapping[str, str],
    gate: Callable[[Path], dict[str, Any]] | None = None,
) -> ExportResult:
    """Writes a release of a trained checkpoint.

    Args:
        model_dir: folder with `config.json`, safetensors weights, tokenizer and processor files.
        out_dir: destination; must not exist, its parent must.
        lineage: where the student comes from (teacher, cache, fingerprint, stages, seed, …), in the order in
            which the model card shall list it.
        gate: looks at the finished folder before it gets its name; what it returns goes into the result. It
            raises `ExportError` to stop the export.

    Raises:
        ExportError: the source is not a checkpoint, the destination exists, or the gate said no. Nothing is
            left behind in any of these cases.
    """
    if not (model_dir / "config.json").is_file():
        raise ExportError(f"export: {model_dir} is not a checkpoint (expected config.json there)")
    if out_dir.exists():
        raise ExportError(f"export: {out_dir} exists already; remove it or choose another destination")
    if not out_dir.parent.is_dir():
        raise ExportError(f"export: the folder {out_dir.parent} of the destination does not exist; create it")
    building = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(building, ignore_errors=True)  # of an export that was killed
    building.mkdir()
    try:
        num_tensors, params_total = _copy_weights(model_dir, building)
        config = _copy_config(model_dir, building)
        copy_processor_files([model_dir], building)
        if (model_dir / "generation_config.json").is_file():
            shutil.copyfile(model_dir / "generation_config.json", building / "generation_config.json")
        card = _model_card(out_dir.name, config, params_total, lineage)
        (building / "README.md").write_text(card, encoding="utf-8")
        report = gate(building) if gate is not None else None
        building.rename(out_dir)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return ExportResult(out_dir, num_tensors, params_total, report)


def _copy_weights(model_dir: Path, out_dir: Path) -> tuple[int, int]:
    """Copies every weight file under canonical names. Returns the numbers of tensors and of parameters."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    index_path = model_dir / _INDEX
    index = json.loads(index_path.read_text()) if index_path.is_file() else None
    files = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    num_tensors = params_total = 0
    for file in files:
        if not (model_dir / file).is_file():
            raise ExportError(f"export: {model_dir} holds no weights (expected {file} there)")
        with safe_open(model_dir / file, framework="pt") as weights:
            tensors = {canonical_name(name): weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        save_file(tensors, out_dir / file, metadata={"format": "pt"})
        num_tensors += len(tensors)
        params_total += sum(tensor.numel() for tensor in tensors.values())
    if index:
        index["weight_map"] = {canonical_name(name): file for name, file in index["weight_map"].items()}
        (out_dir / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return num_tensors, params_total


def _copy_config(model_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Copies the config, naming the language model's class where it is not named: converters look there."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    text = config.get("text_config")
    if text is not None and not text.get("architectures"):
        text["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]]
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config


def _model_card(name: str, config: dict[str, Any], params_total: int, lineage: Mapping[str, str]) -> str:
    text = config.get("text_config", config)
    multimodal = "text_config" in config
    num_experts = text.get("num_local_experts") or text.get("num_experts")
    tags = ["logitlake", "distillation", *(["mixture-of-experts"] if num_experts else [])]
    auto_class = "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if multimodal else 'text-generation'}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {name}",
        "",
        "A student distilled by LogitLake from a teacher's cached logprobs; stock transformers, no remote code:",
        "",
        "```python",
        f"from transformers import {'AutoProcessor, ' if multimodal else ''}{auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("{name}")',
        *([f'processor = AutoProcessor.from_pretrained("{name}")'] if multimodal else []),
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {config['architectures'][0]} ({text['model_type']}) |",
        f"| parameters | {params_total:,} |",
    ]
    if num_experts:
        lines.append(f"| experts | {num_experts}, {text['num_experts_per_tok']} per token |")
    lines.extend(f"| {field} | {value.replace('|', chr(92) + '|')} |" for field, value in lineage.items())
    return "\n".join(lines) + "\n"
