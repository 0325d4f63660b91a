"""TRL's losses and ours are the same numbers where they are the same formula.

Axes: R rows, V vocabulary, P pairs.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import save_tiny_text
from torch import Tensor

from logitlake_student.losses import divergences
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.losses.preference import KtoBaseline, PreferenceKind, preference_loss, sequence_logprobs

R, V = 9, 31

# Sums of a few dozen float32 terms of order 1.
RTOL, ATOL = 3e-5, 5e-6
# Through two layers of a model, summed in another order.
GRADIENT_RTOL, GRADIENT_ATOL = 1e-3, 1e-5


@pytest.fixture(autouse=True)
def _experimental_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL warns on import of what it calls experimental; its GKD is."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def random_logits(seed: int) -> Tensor:
    return 1.5 * torch.randn(R, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_generalised_jsd(beta: float, temperature: float) -> None:
    """With all ids cached it is what TRL's GKD trains with, value and gradient; the factor T^2 is ours."""
    from trl.experimental.gkd import GKDTrainer

    student_RV, teacher_RV = random_logits(6).requires_grad_(), random_logits(7)
    theirs = GKDTrainer.generalized_jsd_loss(
        student_RV[None], teacher_RV[None], beta=beta, temperature=temperature, reduction="sum"
    )
    logp_RV, ids_RV = torch.log_softmax(teacher_RV / temperature, dim=-1).sort(dim=-1, descending=True)
    ours, _ = distillation_loss(
        student_RV,
        torch.eye(V),
        TeacherBatch(ids_RV, logp_RV, torch.full((R,), -torch.inf), torch.zeros(R, dtype=torch.long)),
        divergence=partial(divergences.jsd, beta=beta),
        divergence_weight=1.0,
        ce_weight=0.0,
        temperature=temperature,
        chunk_rows=4,
    )
    torch.testing.assert_close(ours, temperature**2 * theirs, rtol=RTOL, atol=ATOL)
    our_gradient_RV, their_gradient_RV = (torch.autograd.grad(loss, student_RV)[0] for loss in (ours, theirs))
    torch.testing.assert_close(our_gradient_RV, temperature**2 * their_gradient_RV, rtol=RTOL, atol=ATOL)


PAIRS = [
    {"prompt": "what is in the picture?", "chosen": " a red seven", "rejected": " a blue two and a blue two"},
    {"prompt": "how many digits are there?", "chosen": " three", "rejected": " none"},
    {"prompt": "is there a two?", "chosen": " yes", "rejected": " no"},
]
BETA = 0.3


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A tiny language model, another one as its reference, and their tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for folder, width in zip(folders, (96, 64), strict=True):
        save_tiny_text(folder, intermediate_size=width)
    student, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    return student.eval(), reference.eval(), AutoTokenizer.from_pretrained(folders[0])


def their_settings(tmp_path: Path) -> dict[str, Any]:
    """What both of TRL's configurations are told: one batch of all pairs, on the CPU, in float32."""
    return {
        "output_dir": str(tmp_path),
        "beta": BETA,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_dropout": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": len(PAIRS),
    }


def logprobs_N(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Ours: sums of the completion's logprobs, one a sequence of TRL's batch."""
    decoded_BSH = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    predicts_BS = batch["completion_mask"][:, 1:].bool()
    sequence_R, place_R = predicts_BS.nonzero(as_tuple=True)
    return sequence_logprobs(
        decoded_BSH[sequence_R, place_R],
        model.lm_head.weight,
        batch["input_ids"][sequence_R, place_R + 1],
        sequence_R,
        len(predicts_BS),
        chunk_rows=16,
    )


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("theirs", "ours"), [("sigmoid", "dpo"), ("hinge", "hinge"), ("ipo", "ipo")])
def test_dpo(theirs: str, ours: PreferenceKind, two_models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """One step of TRL's DPOTrainer is our loss on the same tokens, value and gradient; its IPO takes token means."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    student, reference, tokenizer = two_models
    trainer = DPOTrainer(
        model=copy.deepcopy(student),
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(loss_type=[theirs], **their_settings(tmp_path)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    their_loss = trainer.compute_loss(trainer.model, dict(batch))
    policy_B, reference_B = logprobs_N(student, batch), logprobs_N(reference, batch).detach()
    if ours == "ipo":
        length_B = batch["completion_mask"].sum(dim=1)
        policy_B, reference_B = policy_B / length_B, reference_B / length_B
    result = preference_loss(*policy_B.chunk(2), *reference_B.chunk(2), kind=ours, beta=BETA)
    our_loss = result.losses_P.mean()
    torch.testing.assert_close(our_loss, their_loss, rtol=RTOL, atol=ATOL)
    for a, b in zip(gradients(our_loss, student), gradients(their_loss, trainer.model), strict=True):
        torch.testing.assert_close(a, b, rtol=GRADIENT_RTOL, atol=GRADIENT_ATOL)


def test_kto(two_models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """TRL's KTO is our `kto_pair` given the baseline that it takes from mismatched pairs, value and gradient."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    student, reference, tokenizer = two_models
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for pair in PAIRS
    ]
    trainer = KTOTrainer(
        model=copy.deepcopy(student),
        ref_model=copy.deepcopy(reference),
        args=KTOConfig(**their_settings(tmp_path) | {"per_device_train_batch_size": len(rows)}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    their_loss = trainer.compute_loss(trainer.model, dict(batch))
    kl = torch.tensor(trainer._metrics["eval"]["kl"][-1])
    is_chosen_B = torch.as_tensor(batch["label"], dtype=torch.bool)
    policy_B, reference_B = logprobs_N(student, batch), logprobs_N(reference, batch).detach()
    result = preference_loss(
        policy_B[is_chosen_B],
        policy_B[~is_chosen_B],
        reference_B[is_chosen_B],
        reference_B[~is_chosen_B],
        kind="kto_pair",
        beta=BETA,
        baseline=KtoBaseline(kl, kl),
    )
    our_loss = result.losses_P.mean()
    torch.testing.assert_close(our_loss, their_loss, rtol=RTOL, atol=ATOL)
    for a, b in zip(gradients(our_loss, student), gradients(their_loss, trainer.model), strict=True):
        torch.testing.assert_close(a, b, rtol=GRADIENT_RTOL, atol=GRADIENT_ATOL)
