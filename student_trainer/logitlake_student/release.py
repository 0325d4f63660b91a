"""Exports a trained stage of a run: lineage from what the run wrote down, the gate on samples of its own lake."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitlake_schemas import fingerprint
from logitlake_shared.alignment import interleave
from logitlake_shared.errors import ExportError
from logitlake_shared.reader import LakeDataset
from logitlake_student.config import ExportConfig

if TYPE_CHECKING:
    from logitlake_student.export import ExportResult
    from logitlake_student.export_gate import GateSample

__all__ = ["is_released", "release"]

_TRAINING = "training fingerprint"


def is_released(config: ExportConfig) -> bool:
    """Whether `config.output` is the export of just this stage. Raises `ExportError` when it is something else."""
    if not config.output.exists():
        return False
    card = config.output / "README.md"
    wanted = fingerprint(_identity(config))
    if not card.is_file() or wanted not in card.read_text(encoding="utf-8"):
        raise ExportError(
            f"{config.output}: holds something else than the export of {config.run / config.stage} as it is now "
            f"(expected a model card with training fingerprint {wanted}); remove it or choose another `output`"
        )
    return True


def release(config: ExportConfig) -> "ExportResult":
    """Writes `config.output`, or raises `ExportError` and leaves nothing."""
    import torch

    from logitlake_student.export import export_checkpoint
    from logitlake_student.export_gate import check_export
    from logitlake_student.models.load import load_student

    stage_dir = config.run / config.stage
    identity = _identity(config)
    data = json.loads((stage_dir / "provenance.json").read_text(encoding="utf-8"))["config"]["data"]
    dataset = LakeDataset(data["lake"], data["samples"], split=data["split"], snapshot=identity["lake"]["snapshot"])
    samples = _gate_samples(dataset, config.num_samples)
    trained = load_student(stage_dir / "model", dtype=torch.float32)
    lineage = {
        "teacher": dataset.spec.engine.model,
        "teacher weights sha256": dataset.spec.engine.weights_sha256,
        "lake fingerprint": dataset.fingerprint,
        "lake snapshot": str(dataset.snapshot),
        "stage": config.stage,
        _TRAINING: fingerprint(identity),
    }

    def gate(folder: Path) -> dict[str, Any]:
        return check_export(folder, trained, samples, tolerance=config.tolerance, vllm=config.vllm)

    config.output.parent.mkdir(parents=True, exist_ok=True)
    return export_checkpoint(stage_dir / "model", config.output, lineage=lineage, gate=gate)


def _identity(config: ExportConfig) -> dict[str, Any]:
    """What the finished stage was trained on."""
    stage_dir = config.run / config.stage
    done = stage_dir / "done.json"
    if not done.is_file():
        raise ExportError(f"{stage_dir}: the stage is not finished; run `logitlake-student train` first (it resumes)")
    identity: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))["identity"]
    return identity


def _gate_samples(dataset: LakeDataset, num_samples: int) -> "list[GateSample]":
    """Samples spread evenly over the dataset."""
    from logitlake_student.export_gate import GateSample

    positions = [number * len(dataset) // num_samples for number in range(min(num_samples, len(dataset)))]
    samples = []
    for position in positions:
        sample = dataset[position]
        ids_S, is_response_S = interleave(
            sample.prompt_ids, sample.prompt_lengths, sample.response_ids, sample.response_lengths
        )
        samples.append(GateSample(ids_S, is_response_S, sample.images))
    return samples
