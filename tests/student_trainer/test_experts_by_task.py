"""Which experts serve which task: counted on held-out rows, shown in the report."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from logitlake_shared.reader import LakeDataset
from logitlake_student.answers import _counts_by_task, held_out, load_examinee
from logitlake_student.data import SampleCollator, StudentInputs
from logitlake_student.models.parts import decoder

# Shares of a few hundred counts.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def sparse(student_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse student, both layers, whose routers tell tokens apart."""
    from logitlake_student.models.assemble import save_student
    from logitlake_student.models.load import load_student
    from logitlake_student.models.upcycle import upcycle

    dense = load_student(student_checkpoint, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("sparse") / "model"
    save_student(upcycle(dense, 4, 2, "all", router_seed=5), folder, files_from=student_checkpoint)
    return folder


def test_counts_by_hand() -> None:
    """Three samples of three positions, four experts, two a token; a dot is padding.

    sample 0, caption: 0 and 1 | 0 and 1 | 0 and 2      caption: expert 0 three times + sample 2's one = 4, 1 twice,
    sample 1, reading: 2 and 3 | 1 and 3 | .                     2 once + once = 2, 3 never
    sample 2, caption: 0 and 2 | .       | .            reading: 0 never, 1 once, 2 once, 3 twice
    """
    chosen = [[(0, 1), (0, 1), (0, 2)], [(2, 3), (1, 3), (0, 1)], [(0, 2), (3, 1), (3, 1)]]
    mask_BS = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    logits_NE = torch.zeros(9, 4)
    for position, experts in enumerate(pair for sample in chosen for pair in sample):
        logits_NE[position, list(experts)] = 1.0
    counts = _counts_by_task([logits_NE], mask_BS, ["caption", "reading", "caption"], 2)
    assert counts["caption"].assigned_LE.tolist() == [[4, 2, 2, 0]]
    assert counts["reading"].assigned_LE.tolist() == [[0, 1, 1, 2]]
    assert {task: int(counted.num_tokens) for task, counted in counts.items()} == {"caption": 4, "reading": 2}


@torch.no_grad()
def test_shares_by_task_are_those_of_its_samples_alone(sparse: Path, student_lake: Path) -> None:
    """The twin: every sample on its own, without padding, its routers' choices counted token by token."""
    dataset = LakeDataset(student_lake, "main", split="train")
    examinee = load_examinee(sparse, "cpu")
    counts: dict[str, list[Counter[int]]] = {}
    chosen: list[list[int]] = []
    for layer in decoder(examinee.model).layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2].flatten().tolist()))
    inputs = StudentInputs(examinee.model_inputs, pad_id=examinee.renderer.pad_id)
    for place in range(len(dataset)):
        sample = dataset[place]
        batch = SampleCollator(inputs, dataset.spec.codec)([sample])
        chosen.clear()
        arguments = ("input_ids", "attention_mask", "pixel_values")
        examinee.model(**{name: batch[name] for name in arguments if name in batch}, use_cache=False)
        for counter, experts in zip(counts.setdefault(sample.task, [Counter(), Counter()]), chosen, strict=True):
            counter.update(experts)
    found = held_out(examinee, dataset, batch_size=5, advance=lambda _: None).experts_by_task
    assert list(found) == sorted(counts) == ["caption", "reading"]
    for task, layers in counts.items():
        for counter, shares in zip(layers, found[task], strict=True):
            expected = [counter[expert] / counter.total() for expert in range(4)]
            assert shares == pytest.approx(expected, abs=TOLERANCE)
    assert found["caption"] != found["reading"]


def test_a_dense_student_has_no_experts(student_checkpoint: Path, student_lake: Path) -> None:
    """Nothing to count is said as nothing, not as zeros."""
    dataset: Any = LakeDataset(student_lake, "main", split="test")
    examinee = load_examinee(student_checkpoint, "cpu")
    assert held_out(examinee, dataset, batch_size=4, advance=lambda _: None).experts_by_task == {}
