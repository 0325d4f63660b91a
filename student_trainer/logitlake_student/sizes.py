"""How large the students of a run are, stage by stage, before any weight is read.

Each is built of its configuration alone, on torch's meta device. So whatever cannot be trained or upcycled is refused
before the first step of the first stage, not when its own stage begins.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitlake_student.config import D2SStage, TrainConfig
from logitlake_student.models.hub import local_folder, pinned
from logitlake_student.run import HUB

if TYPE_CHECKING:
    from logitlake_student.models.parameters import ParameterReport

__all__ = ["foreseen_sizes", "planned_parameters", "size_table"]


def planned_parameters(config: TrainConfig, *, download: bool = True) -> dict[str, "ParameterReport"]:
    """By stage, the parameters of its student, with what the stage trains. `download`: whether the hub may be asked.

    Raises:
        ConfigError: a student that is not there or of an unknown kind, a stage that has nothing to train on it, an
            upcycling that cannot be.
    """
    import torch

    from logitlake_student.models.load import empty_model, quiet_transformers
    from logitlake_student.models.parameters import ParameterReport, parameter_report
    from logitlake_student.models.sparse_config import sparse_config
    from logitlake_student.stages import freeze_for_stage

    quiet_transformers()
    student = _student_config(config, [local_folder(place, download=download) for place in _given(config)])
    reports: dict[str, ParameterReport] = {}
    for stage in config.stages:
        if isinstance(stage, D2SStage):
            student = sparse_config(
                student,
                stage.num_experts,
                stage.num_experts_per_tok,
                stage.layers,
                shared_expert=stage.shared_expert,
            )
        with torch.device("meta"):
            model = empty_model(student)
        freeze_for_stage(model, stage.type)
        reports[stage.type] = parameter_report(model)
    return reports


def _student_config(config: TrainConfig, folders: list[Path]) -> Any:
    """What the first stage begins with."""
    from logitlake_student.models.assemble import assembled_config
    from logitlake_student.models.load import read_config

    if config.student.checkpoint is not None:
        return read_config(*folders)
    return assembled_config(*folders, vision_feature_layer=config.student.vision_feature_layer)


def _given(config: TrainConfig) -> list[Path]:
    """The checkpoint, or tower and language model."""
    student = config.student
    places = (student.checkpoint, student.vision_tower, student.language_model)
    return [pinned(place, config.output / HUB) for place in places if place is not None]


def size_table(reports: Mapping[str, "ParameterReport"]) -> str:
    """A row a part; a column for each student that differs from the one before it, and one for what a stage trains."""
    from logitlake_student.models.parts import PARTS

    columns: list[tuple[str, dict[str, int]]] = []
    before = None
    for stage, report in reports.items():
        shape = {name: (part.total, part.active) for name, part in report.parts.items()}
        if shape != before:
            is_sparse = "routers" in shape
            columns.append(("sparse" if is_sparse else "dense", {name: total for name, (total, _) in shape.items()}))
            if is_sparse:
                columns.append(("a token", {name: active for name, (_, active) in shape.items()}))
        columns.append((f"{stage} trains", {name: part.trainable for name, part in report.parts.items()}))
        before = shape
    rows = [["parameters", *(title for title, _ in columns)]]
    rows += [
        [part, *(_shown(counts.get(part, 0)) for _, counts in columns)]
        for part in PARTS
        if any(part in counts for _, counts in columns)
    ]
    rows.append(["all", *(_shown(sum(counts.values())) for _, counts in columns)])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    )


def _shown(count: int) -> str:
    """Three digits or more, and a unit; nothing is a dash."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.{2 if count < 10 * size else 1}f} {unit}"
    return str(count or "-")


def foreseen_sizes(config: TrainConfig) -> str:
    """For a dry run: the table, or why there is none yet. Nothing is downloaded, and errors are those of the run."""
    for place in _given(config):
        if not local_folder(place, download=False).is_dir():
            return f"parameters: not counted, {place} is not here yet"
    return size_table(planned_parameters(config, download=False))
