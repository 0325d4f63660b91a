"""A Qwen3-VL student: images of many shapes, mergers for a projector, Qwen3-VL-MoE when sparse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import save_tiny_qwen_vl

from logitlake_shared.errors import ConfigError
from logitlake_shared.reader import LakeDataset
from logitlake_student.answers import kl_to_teacher, load_examinee
from logitlake_student.config import TrainConfig
from logitlake_student.models.load import load_student
from logitlake_student.sizes import planned_parameters

# Float32 means over a few dozen tokens, padded on another side.
MEAN_TOLERANCE = 1e-5
# A teacher compared with the rows that it wrote itself, rounded to the grid.
OWN_ROWS_KL = 1e-3


@pytest.fixture(scope="module")
def qwen_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Qwen3-VL."""
    folder = tmp_path_factory.mktemp("qwen-teacher") / "model"
    save_tiny_qwen_vl(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_lake(
    qwen_teacher: Path, capture_samples: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The session's records, captured from it."""
    folder = tmp_path_factory.mktemp("qwen-lake") / "lake"
    capture_samples(folder, "main", teacher={"model_dir": qwen_teacher})
    return folder


@pytest.fixture(scope="module")
def qwen_student(qwen_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another Qwen3-VL, of half the inner width."""
    folder = tmp_path_factory.mktemp("qwen-student") / "model"
    save_tiny_qwen_vl(folder, intermediate_size=48)
    return folder


def test_the_teacher_knows_its_own_rows(qwen_teacher: Path, qwen_lake: Path) -> None:
    """Image tokens of every shape, masks and positions are those of the capture: the KL is the grid's rounding."""
    dataset = LakeDataset(qwen_lake, "main", split="train")
    kl = kl_to_teacher(load_examinee(qwen_teacher, "cpu"), dataset, batch_size=3, advance=lambda _: None)
    assert 0 <= kl < OWN_ROWS_KL


def test_batches_change_no_kl(qwen_student: Path, qwen_lake: Path) -> None:
    """Samples together and alone, padded or not, with and without pictures: the same mean."""
    dataset = LakeDataset(qwen_lake, "main", split="train")
    examinee = load_examinee(qwen_student, "cpu")
    kls = [kl_to_teacher(examinee, dataset, batch_size=size, advance=lambda _: None) for size in (1, 5)]
    assert kls[0] == pytest.approx(kls[1], abs=MEAN_TOLERANCE)
    assert kls[0] > 100 * OWN_ROWS_KL


def test_it_goes_through_the_stages(
    student_world: Any, qwen_student: Path, qwen_lake: Path, metrics_of: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """init trains the mergers, d2d the language model, too, d2s a stock Qwen3-VL-MoE that starts at d2d's loss."""
    stages = [{"type": "init", "divergence_weight": 1.0, "ce_weight": 0.0}, {"type": "d2d"}, {"type": "d2s"}]
    document = student_world.document(*({"steps": 12, "batch_size": 13} | stage for stage in stages))
    document |= {
        "student": {"checkpoint": str(qwen_student)},
        "data": {"lake": str(qwen_lake), "samples": "main"},
    }
    config = TrainConfig.model_validate(document)
    student_world.train(config)
    init, d2d, d2s = (student_world.output / name for name in ("init", "d2d", "d2s"))
    before, after = load_file(qwen_student / "model.safetensors"), load_file(init / "model" / "model.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert all(name.startswith(("model.visual.merger.", "model.visual.deepstack_merger_list.")) for name in moved)
    kls = {name: [line["forward_kl"] for line in metrics_of(folder)] for name, folder in (("d2d", d2d), ("d2s", d2s))}
    assert kls["d2d"][-1] < kls["d2d"][0]
    assert kls["d2s"][0] == pytest.approx(kls["d2d"][-1], rel=0.2)  # one step later, and nothing fell apart
    assert kls["d2s"][-1] < kls["d2s"][0]
    sparse = load_student(d2s / "model", dtype=torch.float32)
    assert sparse.config.model_type == "qwen3_vl_moe"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_older_ones_train_dense(
    family: str, student_world: Any, qwen_lake: Path, metrics_of: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Their mergers learn in init, their language model in d2d; they have no sparse sibling, which is said first."""
    folder = student_world.folder / "student"
    save_tiny_qwen_vl(folder, family)
    stages = [{"type": "init", "steps": 2}, {"type": "d2d", "steps": 12, "batch_size": 13}]
    document = student_world.document(*stages)
    document |= {"student": {"checkpoint": str(folder)}, "data": {"lake": str(qwen_lake), "samples": "main"}}
    kls = [line["forward_kl"] for line in metrics_of(student_world.train(TrainConfig.model_validate(document)))]
    assert kls[-1] < kls[0]
    begun, trained = load_file(folder / "model.safetensors"), student_world.output / "init" / "model"
    moved = {name for name, after in load_file(trained / "model.safetensors").items() if not after.equal(begun[name])}
    assert moved
    assert all(name.startswith("model.visual.merger.") or name.startswith("visual.merger.") for name in moved)
    document["stages"].append(document["stages"][1] | {"type": "d2s"})
    with pytest.raises(ConfigError, match="has no sparse sibling"):
        planned_parameters(TrainConfig.model_validate(document))
