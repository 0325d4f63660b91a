"""Exports a trained stage of a run: lineage from what the run wrote down, the gate on samples of its own lake."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitlake_schemas import fingerprint
from logitlake_shared.alignment import interleave
from logitlake_shared.config import StrictModel
from logitlake_shared.errors import ExportError
from logitlake_shared.reader import LakeDataset
from logitlake_student.config import D2DStage, D2SStage, ExportConfig, InitStage, PreferenceStage
from logitlake_student.export.card import CardFacts
from logitlake_student.export.gguf_limits import refuse_unless_covered
from logitlake_student.export.source import read_config

if TYPE_CHECKING:
    from logitlake_student.export.checkpoint import ExportResult
    from logitlake_student.export.comparison import GateSample

__all__ = ["is_released", "release"]

_FINGERPRINT = "export fingerprint"
# Settings of a stage that its row on the card always has; others are there where they are not the default.
_KEY_SETTINGS = ("steps", "batch_size", "learning_rate", "seed")
_STAGES: dict[str, type[StrictModel]] = {
    "init": InitStage,
    "d2d": D2DStage,
    "d2s": D2SStage,
    "preference": PreferenceStage,
}


def is_released(config: ExportConfig) -> bool:
    """Whether `config.output` is the export of just this stage. Raises `ExportError` when it is something else."""
    if not config.output.exists():
        return False
    card = config.output / "README.md"
    wanted = _fingerprint(config)
    if not card.is_file() or wanted not in card.read_text(encoding="utf-8"):
        raise ExportError(
            f"{config.output}: holds something else than the export of {config.run / config.stage} to {config.to} as "
            f"it is now (expected a model card with {_FINGERPRINT} {wanted}); remove it or choose another `output`"
        )
    return True


def release(config: ExportConfig, tell: Callable[[str], None]) -> "ExportResult":
    """Writes `config.output`, or raises `ExportError` and leaves nothing; `tell` is told what is being done."""
    identity = _identity(config)
    # All that can be told without torch, before the seconds that it takes.
    evaluation = _evaluation(config)

    model_dir = config.run / config.stage / "model"
    if config.to == "gguf":
        refuse_unless_covered(model_dir, read_config(model_dir))
    tell(f"loading {model_dir}")

    import torch

    from logitlake_student.export.checkpoint import export_checkpoint
    from logitlake_student.export.gate import check_export
    from logitlake_student.export.layout import ambiguous_experts
    from logitlake_student.models.load import load_student

    settings = json.loads((model_dir.parent / "provenance.json").read_text(encoding="utf-8"))["config"]
    data = settings["data"]
    dataset = LakeDataset(data["lake"], data["samples"], split=data["split"], snapshot=identity["lake"]["snapshot"])
    trained = load_student(model_dir, dtype=torch.float32)
    samples = _gate_samples(dataset, config.num_samples, with_images=hasattr(trained.config, "vision_config"))
    facts = CardFacts(_lineage(config, dataset, settings), _stage_rows(config, settings), evaluation)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    if config.to == "gguf":
        from logitlake_student.export.gguf_file import export_gguf
        from logitlake_student.export.gguf_gate import check_gguf

        def gguf_gate(file: Path) -> dict[str, Any]:
            return check_gguf(
                file,
                model_dir,
                trained,
                samples,
                tolerance=config.tolerance,
                llama_cpp=config.llama_cpp,
                tell=tell,
            )

        return export_gguf(model_dir, config.output, facts=facts, weight_type=config.gguf_type, gate=gguf_gate)

    to = config.to
    transformers_reads = to == "hf" or not ambiguous_experts(read_config(model_dir))

    def gate(folder: Path) -> dict[str, Any]:
        return check_export(
            folder,
            trained,
            samples,
            tolerance=config.tolerance,
            vllm="require" if to == "vllm" else config.vllm,
            transformers_reads=transformers_reads,
            tell=tell,
        )

    return export_checkpoint(model_dir, config.output, facts=facts, target=to, gate=gate)


def _identity(config: ExportConfig) -> dict[str, Any]:
    """What the finished stage was trained on."""
    stage_dir = config.run / config.stage
    done = stage_dir / "done.json"
    if not done.is_file():
        finished = [stage for stage in _STAGES if (config.run / stage / "done.json").is_file()]
        instead = f"; of this run, {', '.join(finished)} can be exported: stage={finished[-1]}" if finished else ""
        raise ExportError(
            f"{stage_dir}: the stage is not finished; run `logitlake-student train` first (it resumes){instead}"
        )
    identity: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))["identity"]
    return identity


def _fingerprint(config: ExportConfig) -> str:
    """Of all that decides what the export holds, as far as it can be told without reading the weights."""
    document: dict[str, Any] = {
        "training": _identity(config),
        "to": config.to,
        "figures": config.evaluation is not None,
    }
    return fingerprint(document | ({"gguf_type": config.gguf_type} if config.to == "gguf" else {}))


def _lineage(config: ExportConfig, dataset: LakeDataset, settings: dict[str, Any]) -> dict[str, str]:
    student = settings["student"]
    parts = {
        key.replace("_", " "): Path(student[key]).name
        for key in ("checkpoint", "vision_tower", "language_model")
        if student.get(key)
    }
    return {
        "teacher": dataset.spec.engine.model,
        "teacher weights sha256": dataset.spec.engine.weights_sha256,
        **{f"student's {part}": name for part, name in parts.items()},
        "lake fingerprint": dataset.fingerprint,
        "lake snapshot": str(dataset.snapshot),
        "recipe": str(settings.get("preset", "")),
        "stage": config.stage,
        _FINGERPRINT: _fingerprint(config),
    }


def _stage_rows(config: ExportConfig, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """The stages up to the exported one, each with its key settings."""
    rows = []
    for stage in settings["stages"]:
        fields = _STAGES[stage["type"]].model_fields
        told = {
            key: value
            for key, value in stage.items()
            if key != "type" and (key in _KEY_SETTINGS or key not in fields or value != fields[key].default)
        }
        rows.append((str(stage["type"]), ", ".join(f"{key} {_text(value)}" for key, value in told.items())))
        if stage["type"] == config.stage:
            break
    return rows


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _evaluation(config: ExportConfig) -> dict[str, str]:
    """The figures of just this checkpoint, as the card shows them. Raises `ExportError` where they are not."""
    if config.evaluation is None:
        return {}
    from logitlake_student.evaluate import checkpoint_sha256

    model_dir = config.run / config.stage / "model"
    wanted = checkpoint_sha256(model_dir)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(config.evaluation.glob("*.json"))]
    for result in results:
        if isinstance(result, dict) and result.get("identity", {}).get("model") == wanted:
            return _figures(result)
    names = [str(result["name"]) for result in results if isinstance(result, dict) and "name" in result]
    raise ExportError(
        f"{config.evaluation}: holds no result of {model_dir} as it is now (results there: "
        f"{', '.join(names) or 'none'}); run `logitlake-student eval` on it, or leave `evaluation` out"
    )


def _figures(result: dict[str, Any]) -> dict[str, str]:
    told = {key: value for key, value in result.items() if isinstance(value, float) and key != "seconds"}
    told |= {f"accuracy: {task}": value for task, value in result.get("tasks", {}).items()}
    figures = {key.replace("_", " "): "unknown" if value is None else f"{value:.4g}" for key, value in told.items()}
    test_data = result.get("identity", {}).get("settings", {}).get("test_data")
    figures |= {"records": str(result["num_records"])} if "num_records" in result else {}
    return figures | ({"test data": Path(test_data).name} if test_data else {})


def _gate_samples(dataset: LakeDataset, num_samples: int, *, with_images: bool) -> "list[GateSample]":
    """Samples spread evenly over the dataset; for a student without eyes the first ones without images."""
    from logitlake_student.export.comparison import GateSample

    positions: Iterable[int] = range(len(dataset))
    if with_images:
        positions = [number * len(dataset) // num_samples for number in range(min(num_samples, len(dataset)))]
    samples: list[GateSample] = []
    for position in positions:
        sample = dataset[position]
        if sample.images and not with_images:
            continue
        if len(samples) == num_samples:
            break
        ids_S, is_response_S = interleave(
            sample.prompt_ids, sample.prompt_lengths, sample.response_ids, sample.response_lengths
        )
        samples.append(GateSample(ids_S, is_response_S, sample.images))
    return samples
