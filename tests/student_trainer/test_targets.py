"""What a stage is told to compare by is what it minimises, from the lake's rows to the weights."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitlake_shared.errors import ConfigError
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.rendering import Renderer, without_images
from logitlake_student.config import TrainConfig
from logitlake_student.config.targets import EntropyWeights, VisualAdvantage
from logitlake_student.data import SampleCollator, StudentInputs, token_weights
from logitlake_student.losses.distillation import TeacherBatch
from logitlake_student.losses.reference import distillation_loss_reference
from logitlake_student.model_inputs import ModelInputs
from logitlake_student.models.forward import hidden_response_rows
from logitlake_student.models.load import load_student

Metrics = Callable[[Path], list[dict[str, Any]]]

NUM_CACHED = 12
# A mean over a few dozen tokens in float32, against float64; T^2 = 16 times that at T = 4.
MEAN_TOLERANCE = 1e-5
# The same sums in another order.
SUM_TOLERANCE = 1e-5

D2D = {"type": "d2d", "steps": 2, "batch_size": 13, "log_every": 1, "save_every": 1}
DIVERGENCES = [
    {"type": "forward_kl", "tail": "bucket"},
    {"type": "forward_kl", "tail": "bounded"},
    {"type": "reverse_kl"},
    {"type": "jsd", "beta": 0.3},
    {"type": "skew_kl", "alpha": 0.2},
    {"type": "skew_reverse_kl", "alpha": 0.2},
    {"type": "tvd"},
    {"type": "truncated_kl"},
    {"type": "renormalised_kl"},
]


@pytest.fixture(scope="session")
def rich_lake(capture_samples: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache `main`: twelve entries a token, tails at 2 and 4, and every label without its image, too. Cache `drawn`:
    draws from the teacher."""
    folder = tmp_path_factory.mktemp("rich") / "lake"
    codec = {"k_max": NUM_CACHED, "p_min": 0.0, "temperatures": [2, 4]}
    capture_samples(folder, "main", codec=codec, no_image_pass=True)
    capture_samples(folder, "drawn", codec={"type": "sampled", "draws": 50})
    return folder


def config_of(student_world: Any, lake: Path, stage: dict[str, Any], samples: str = "main", **sections: Any) -> Any:
    document = student_world.document(D2D | stage, **sections)
    return TrainConfig.model_validate(document | {"data": {"lake": str(lake), "samples": samples}})


def first_step(student_world: Any, lake: Path, metrics_of: Metrics, stage: dict[str, Any], **sections: Any) -> Any:
    return metrics_of(student_world.train(config_of(student_world, lake, stage, **sections)))[0]


def all_rows(checkpoint: Path, lake: Path, temperature: Any, weights: Any) -> tuple[Any, Any, TeacherBatch, Any]:
    """The student's hidden rows and its head, and the teacher's rows, of all training samples at once."""
    model, renderer = load_student(checkpoint, dtype=torch.float32), Renderer(checkpoint)
    dataset = LakeDataset(lake, "main", split="train")
    inputs = StudentInputs(ModelInputs.of_checkpoint(checkpoint, model.config), pad_id=renderer.pad_id)
    collate = SampleCollator(inputs, dataset.spec.codec, temperature, weights)
    batch = collate([dataset[place] for place in range(len(dataset))])
    with torch.no_grad():
        hidden_RH = hidden_response_rows(model, batch)
    weight_R = batch["weight_R"]
    teacher = TeacherBatch(
        batch["topk_ids_RK"],
        batch["topk_logprobs_RK"],
        batch["log_tail_mass_R"],
        batch["label_ids_R"],
        batch["log_bound_R"],
        weight_R / weight_R.mean(),
    )
    return hidden_RH, model.lm_head.weight[: renderer.vocab_size], teacher, batch


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: "-".join(map(str, d.values())))
def test_the_first_step_minimises_what_was_asked_for(
    student_world: Any, rich_lake: Path, metrics_of: Metrics, divergence: dict[str, Any], temperature: int
) -> None:
    """A batch of all samples: the logged divergence is the twin's mean over all response tokens of the lake."""
    stage = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.5, "steps": 1}
    line = first_step(student_world, rich_lake, metrics_of, stage)
    hidden_RH, weight_VH, teacher, _ = all_rows(student_world.checkpoint, rich_lake, temperature, None)
    if divergence.get("tail") != "bounded":
        teacher = TeacherBatch(
            teacher.topk_ids_RK, teacher.topk_logprobs_RK, teacher.log_tail_mass_R, teacher.label_ids_R
        )
    _, sums = distillation_loss_reference(
        hidden_RH,
        weight_VH,
        teacher,
        divergence=divergence["type"],
        parameter=divergence.get("beta", divergence.get("alpha", 0.5)),
        divergence_weight=1.0,
        ce_weight=0.5,
        temperature=temperature,
    )
    expected, ce = float(sums.divergence_sum / sums.num_tokens), float(sums.ce_sum / sums.num_tokens)
    assert line[divergence["type"]] == pytest.approx(expected, abs=MEAN_TOLERANCE * temperature**2)
    assert line["ce"] == pytest.approx(ce, abs=MEAN_TOLERANCE)
    assert line["loss"] == pytest.approx(expected + 0.5 * ce, abs=MEAN_TOLERANCE * temperature**2)


@pytest.mark.parametrize("weights", [{"type": "visual_advantage", "strength": 2.0}, {"type": "entropy"}])
def test_weighted_tokens_are_a_mean_over_weights(
    student_world: Any, rich_lake: Path, metrics_of: Metrics, weights: dict[str, Any]
) -> None:
    """The divergence is sum(w D) / sum(w) over the global batch; cross-entropy does not know of weights."""
    stage = {"token_weights": weights, "divergence": {"type": "forward_kl", "tail": "bucket"}, "steps": 1}
    line = first_step(student_world, rich_lake, metrics_of, stage)
    kind = VisualAdvantage if weights["type"] == "visual_advantage" else EntropyWeights
    hidden_RH, weight_VH, teacher, batch = all_rows(
        student_world.checkpoint, rich_lake, 1, kind.model_validate(weights)
    )
    per_token_R = []
    for row in range(len(hidden_RH)):
        alone = TeacherBatch(
            *(t[row : row + 1] for t in (teacher.topk_ids_RK, teacher.topk_logprobs_RK, teacher.log_tail_mass_R)),
            teacher.label_ids_R[row : row + 1],
        )
        _, sums = distillation_loss_reference(
            hidden_RH[row : row + 1], weight_VH, alone, divergence_weight=1.0, ce_weight=0.0
        )
        per_token_R.append(float(sums.divergence_sum))
    weight_R = batch["weight_R"].numpy()
    assert weight_R.min() >= 1
    assert weight_R.max() > 1.1  # it weighs something
    assert line["forward_kl"] == pytest.approx(np.average(per_token_R, weights=weight_R), abs=MEAN_TOLERANCE)
    assert abs(line["forward_kl"] - np.mean(per_token_R)) > 10 * MEAN_TOLERANCE


def test_micro_batches_do_not_change_a_weighted_step(student_world: Any, rich_lake: Path, metrics_of: Metrics) -> None:
    """Parts whose tokens weigh differently are still the same step."""
    stage = {"token_weights": {"type": "entropy", "strength": 5.0}, "batch_size": 12}
    whole = first_step(student_world, rich_lake, metrics_of, stage, output=str(student_world.folder / "whole"))
    parts = first_step(
        student_world,
        rich_lake,
        metrics_of,
        stage | {"micro_batch_size": 3},
        output=str(student_world.folder / "parts"),
    )
    assert parts == pytest.approx(whole, abs=SUM_TOLERANCE)


def test_visual_advantage_by_hand(rich_lake: Path) -> None:
    """1 + 2 x what the label's logprob loses without the image, held between 0 and 0.5 nats; 1 without an image."""
    dataset = LakeDataset(rich_lake, "main", split="train")
    weights = VisualAdvantage(type="visual_advantage", strength=2.0, max_advantage=0.5)
    for place in range(len(dataset)):
        sample = dataset[place]
        weight_T = token_weights(sample, weights)
        for t, weight in enumerate(weight_T.tolist()):
            expected = 1.0
            if sample.image_sha256:
                assert sample.label_logprob_no_image_T is not None
                lost = float(sample.rows.label_logprob_T[t]) - float(sample.label_logprob_no_image_T[t])
                expected = 1 + 2 * min(max(lost, 0.0), 0.5)
            assert weight == pytest.approx(expected, abs=MEAN_TOLERANCE)


def test_a_lake_of_draws_teaches_by_the_forward_kl(student_world: Any, rich_lake: Path, metrics_of: Metrics) -> None:
    """RS-KD: cross-entropy against the drawn shares, less their entropy; anything but linear in them is refused."""
    lines = metrics_of(student_world.train(config_of(student_world, rich_lake, {"steps": 6}, "drawn")))
    assert lines[-1]["forward_kl"] < lines[0]["forward_kl"]
    for stage in ({"divergence": {"type": "jsd"}}, {"temperature": 2}):
        refused = config_of(student_world, rich_lake, stage, "drawn", output=str(student_world.folder / "refused"))
        with pytest.raises(ConfigError, match="draws"):
            student_world.train(refused)


def test_the_image_pair_is_measured_against_what_the_teacher_said_blind(
    student_world: Any,
    rich_lake: Path,
    metrics_of: Metrics,
    tmp_path_factory: pytest.TempPathFactory,
    capture_pairs: Callable[..., None],
) -> None:
    """The first step's `image` is the loss of the student's own logprobs with and without the images, against the
    teacher's cached ones of both; a pair cache without them is refused."""
    lake = tmp_path_factory.mktemp("blind") / "lake"
    capture_pairs(lake, "seen")
    capture_pairs(lake, "both", pairs={"type": "given", "no_image_pass": True})
    shutil.copytree(rich_lake / "caches" / "main", lake / "caches" / "main")
    stage = {"type": "preference", "steps": 1, "batch_size": 6, "log_every": 1, "save_every": 1, "image_weight": 0.5}

    def config(pairs: str, output: str) -> Any:
        document = student_world.document(stage | {"nll_weight": 0.0}, output=str(student_world.folder / output))
        return TrainConfig.model_validate(document | {"data": {"lake": str(lake), "samples": "main", "pairs": pairs}})

    line = metrics_of(student_world.train(config("both", "both")))[0]
    model, renderer = load_student(student_world.checkpoint, dtype=torch.float32), Renderer(student_world.checkpoint)
    inputs = ModelInputs.of_checkpoint(student_world.checkpoint, model.config)
    dataset, losses = PairDataset(lake, "both"), []
    for place in range(len(dataset)):
        pair = dataset[place]
        ratios = []
        for prompt, images, teacher in (
            (pair.prompt_ids, pair.images, pair.chosen_logprobs),
            (renderer.render_prompt(without_images(pair.messages)), (), pair.chosen_logprobs_no_image),
        ):
            ids_S = np.concatenate([prompt, pair.chosen_ids])
            is_response_S = np.arange(len(ids_S)) >= len(prompt)
            sequence = inputs.expand(ids_S, is_response_S, images)
            arguments = inputs.batch([sequence], pad_id=0, model=model)
            with torch.no_grad():
                logits_SV = model(**arguments).logits[0, :, : renderer.vocab_size].double()
            log_q_SV = torch.log_softmax(logits_SV, dim=-1)
            rows = np.flatnonzero(sequence.is_response_S)
            student = sum(float(log_q_SV[row - 1, sequence.ids_S[row]]) for row in rows)
            ratios.append(student - float(teacher.sum(dtype=np.float64)))
        losses.append(math.log1p(math.exp(-0.1 * (ratios[0] - ratios[1]))))
    assert line["image"] == pytest.approx(sum(losses) / len(losses), abs=10 * MEAN_TOLERANCE)
    assert line["loss"] == pytest.approx(line["preference"] + 0.5 * line["image"], abs=MEAN_TOLERANCE)
    with pytest.raises(ConfigError, match=r"image_weight: .*pairs.no_image_pass=true"):
        student_world.train(config("seen", "seen"))


def test_what_the_lake_does_not_hold_is_refused_before_the_first_step(student_world: Any) -> None:
    """A temperature without a tail there, an advantage without the pass that measures it: said, and nothing written."""
    with pytest.raises(ConfigError, match=r"temperature.*\[1\].*codec.temperatures=\[2\]"):
        student_world.train(student_world.train_config(D2D | {"temperature": 2}))
    with pytest.raises(ConfigError, match="no_image_pass"):
        student_world.train(student_world.train_config(D2D | {"token_weights": {"type": "visual_advantage"}}))
    assert not (student_world.output / "d2d" / "metrics.jsonl").exists()
