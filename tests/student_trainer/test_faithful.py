"""The preset `faithful` minimises what the paper's formulas say, worked out here from full distributions.

    L_KD  = -1/T sum_t sum_v p_T(v) log p_S(v)                  arXiv 2408.15881, eq. 2: soft cross-entropy
    L_d2s = L_KD + L_CE + 0.01 L_aux                            with L_aux = E sum_e f_e P_e of each sparse layer
    L_pd  = mean of {1 - s(b (r_w - z_l)), 1 - s(b (z_w - r_l))}   kto_pair, r = log p_S - log p_T of a response

Ours differs by the teacher's entropy, a constant: KL = L_KD - H. Balance is the mean over sparse layers; the student
here has one. Axes: R response rows, V vocabulary, N tokens, E experts.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.rendering import Renderer
from logitlake_student.data import PairCollator, SampleCollator, StudentInputs
from logitlake_student.model_inputs import ModelInputs
from logitlake_student.models.forward import hidden_response_rows
from logitlake_student.models.load import load_student
from logitlake_student.models.routing import RouterRecorder
from logitlake_student.models.upcycle import upcycle

Metrics = Callable[[Path], list[dict[str, Any]]]

# Means over a few dozen tokens of a float32 forward pass, against float64 on what it gave.
TOLERANCE = 1e-5
# Sums of twenty logprobs each.
LOGPROB_TOLERANCE = 1e-4

# All samples (13) and all pairs (6) in the first step, whose learning rate is 0. No expert is ever full.
D2S = {"type": "d2s", "steps": 1, "batch_size": 13, "log_every": 1, "save_every": 1, "capacity_factor": 4.0}
PREFERENCE = {"type": "preference", "steps": 1, "batch_size": 6, "log_every": 1, "save_every": 1}


def inputs_of(checkpoint: Path, model: Any) -> StudentInputs:
    pad_id = Renderer(checkpoint).pad_id
    return StudentInputs(ModelInputs.of_checkpoint(checkpoint, model.config), pad_id=pad_id)


def test_dense_to_sparse_is_the_papers_sum(student_world: Any, metrics_of: Metrics) -> None:
    """The lake holds the whole vocabulary of every token here, so the soft cross-entropy is exact."""
    line = metrics_of(student_world.train(student_world.train_config(D2S, preset="faithful")))[0]
    model = upcycle(load_student(student_world.checkpoint, dtype=torch.float32), 4, 2, router_seed=0)
    dataset = LakeDataset(student_world.lake, "main", split="train")
    collate = SampleCollator(inputs_of(student_world.checkpoint, model), dataset.spec.codec)
    batch = collate([dataset[place] for place in range(len(dataset))])
    with RouterRecorder(model) as recorder:
        hidden_RH = hidden_response_rows(model.requires_grad_(False), batch)
    vocab_size = Renderer(student_world.checkpoint).vocab_size
    log_q_RV = torch.log_softmax((hidden_RH.double() @ model.lm_head.weight[:vocab_size].double().t()), dim=-1)
    p_RV = torch.zeros_like(log_q_RV).scatter_(1, batch["topk_ids_RK"], batch["topk_logprobs_RK"].double().exp())
    soft_cross_entropy = -(p_RV * log_q_RV).sum(dim=1).mean()
    entropy = -torch.special.xlogy(p_RV, p_RV).sum(dim=1).mean()
    cross_entropy = -log_q_RV.gather(1, batch["label_ids_R"][:, None]).mean()
    logits_NE, mask_N = recorder.logits()[0].double(), batch["attention_mask"].flatten().bool()
    probs_NE = torch.softmax(logits_NE[mask_N], dim=-1)
    chosen_NE = torch.zeros_like(probs_NE).scatter_(1, probs_NE.topk(2, dim=-1).indices, 1.0)
    balance = 4 * (chosen_NE.mean(dim=0) * probs_NE.mean(dim=0)).sum()
    expected = {
        "forward_kl": soft_cross_entropy - entropy,
        "ce": cross_entropy,
        "balance": balance,
        "loss": soft_cross_entropy - entropy + cross_entropy + 0.01 * balance,
    }
    assert {name: line[name] for name in expected} == {
        name: pytest.approx(float(value), abs=TOLERANCE) for name, value in expected.items()
    }


def test_preference_is_the_papers_kto_pair(student_world: Any, metrics_of: Metrics) -> None:
    """Against the teacher's cached logprobs, beta 0.1, no likelihood term, the baseline over all pairs."""
    line = metrics_of(student_world.train(student_world.train_config(PREFERENCE, preset="faithful")))[0]
    model = load_student(student_world.checkpoint, dtype=torch.float32)
    dataset = PairDataset(student_world.lake, "preference")
    batch = PairCollator(inputs_of(student_world.checkpoint, model))([dataset[place] for place in range(len(dataset))])
    vocab_size = Renderer(student_world.checkpoint).vocab_size
    hidden_RH = hidden_response_rows(model.requires_grad_(False), batch)
    log_q_RV = torch.log_softmax(hidden_RH.double() @ model.lm_head.weight[:vocab_size].double().t(), dim=-1)
    of_label_R = log_q_RV.gather(1, batch["label_ids_R"][:, None]).squeeze(1)
    sums_B = torch.zeros(2 * len(dataset), dtype=torch.float64).index_add(0, batch["sequence_R"], of_label_R)
    teacher_B = [
        float(logprobs.sum(dtype="float64"))
        for side in ("chosen_logprobs", "rejected_logprobs")
        for logprobs in (getattr(dataset[place], side) for place in range(len(dataset)))
    ]
    ratios = [float(s) - t for s, t in zip(sums_B, teacher_B, strict=True)]
    won, lost = ratios[: len(dataset)], ratios[len(dataset) :]
    z_won, z_lost = (max(0.0, sum(side) / len(side)) for side in (won, lost))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    losses = [
        ((1 - sigmoid(0.1 * (w - z_lost))) + (1 - sigmoid(0.1 * (z_won - r)))) / 2
        for w, r in zip(won, lost, strict=True)
    ]
    assert line["preference"] == pytest.approx(sum(losses) / len(losses), abs=LOGPROB_TOLERANCE)
    assert line["loss"] == pytest.approx(line["preference"], abs=LOGPROB_TOLERANCE)
    assert "balance" not in line  # a dense student has no routers
