"""Rows of the lake become batches: the order, the alignment, the padding, and what is refused before the first step."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from logitlake_shared.errors import FingerprintMismatchError, TrainingError
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.reader.order import Layout
from logitlake_shared.rendering import Renderer
from logitlake_shared.topk import split
from logitlake_student import model_inputs
from logitlake_student.data import (
    EpochOrder,
    PairCollator,
    SampleCollator,
    StudentInputs,
    check_student_fits,
)
from logitlake_student.losses import TeacherBatch, distillation_loss
from logitlake_student.model_inputs import ModelInputs, tokens_per_image
from logitlake_student.models.forward import hidden_response_rows
from logitlake_student.models.load import load_student

# Sums of some hundred nats in float32; other padding is another order of adding.
SUM_TOLERANCE = 1e-3


class CountingLoader:
    """Makes one pixel of each image and remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def model_inputs(self, image: Image.Image) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        self.asked.append(image.size)
        return {"pixel_values": np.full((1, 3, 1, 1), image.width, np.float32)}


def inputs_of(context_length: int | None = None, **changes: Any) -> StudentInputs:
    """Inputs with pad 0, placeholder 9, three tokens an image."""
    settings: dict[str, Any] = {"image_token_id": 9, "loader": CountingLoader(), "tokens_per_image": 3}
    return StudentInputs(ModelInputs(**(settings | changes)), pad_id=0, context_length=context_length)


def picture(width: int) -> bytes:
    """An encoded image of one row."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, 1)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def samples(student_lake: Path) -> LakeDataset:
    """The training samples of the session's lake."""
    return LakeDataset(student_lake, "main", split="train")


@pytest.fixture
def real_inputs(student_checkpoint: Path) -> StudentInputs:
    """What the session's student takes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(student_checkpoint)
    pad_id = Renderer(student_checkpoint).pad_id
    return StudentInputs(ModelInputs.of_checkpoint(student_checkpoint, config), pad_id=pad_id)


# ---- order ----


@pytest.mark.parametrize(("num_items", "num_drawn"), [(5, 13), (8, 8), (20, 3), (1, 4)])
def test_the_order_is_one_permutation_after_another(num_items: int, num_drawn: int) -> None:
    """Exactly `num_drawn` positions; each whole epoch holds every sample once, a part of one holds none twice."""
    order = EpochOrder(Layout.of_one_group(num_items), num_drawn, seed=3)
    drawn = list(order)
    assert len(drawn) == len(order) == num_drawn
    for start in range(0, num_drawn, num_items):
        epoch = drawn[start : start + num_items]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(num_items))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    """The same again, however much is drawn; another for another seed and in another epoch."""
    layout = Layout.of_one_group(10)
    long = list(EpochOrder(layout, 30, seed=1))
    assert list(EpochOrder(layout, 17, seed=1)) == long[:17]
    assert long[:10] != long[10:20]
    assert list(EpochOrder(layout, 10, seed=2)) != long[:10]


# ---- alignment ----


def test_a_batch_done_by_hand() -> None:
    """Placeholders become three tokens, labels are the tokens after their rows, the shorter sequence is padded."""
    sequences = inputs_of().sequences(
        [
            ([5, 9, 6], [3], [7, 1], [2], [picture(1)]),  # 5 <9 9 9> 6 | 7 1
            ([5, 6, 4], [2, 1], [8, 1, 3], [2, 1], []),  # 5 6 | 8 1 | 4 | 3
        ],
        ["one", "two"],
    )
    assert sequences.inputs["input_ids"].tolist() == [[5, 9, 9, 9, 6, 7, 1], [5, 6, 8, 1, 4, 3, 0]]
    assert sequences.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]
    assert sequences.label_ids_R.tolist() == [7, 1, 8, 1, 3]
    assert sequences.rows_R.tolist() == [4, 5, 7 + 1, 7 + 2, 7 + 4]
    assert sequences.sequence_R.tolist() == [0, 0, 1, 1, 1]


def test_labels_are_the_tokens_after_their_rows(samples: LakeDataset, real_inputs: StudentInputs) -> None:
    """On real rows of the lake: the token at row + 1 is the label, and the labels are the cached response."""
    chosen = [samples[position] for position in range(5)]
    batch = SampleCollator(real_inputs, samples.spec.codec)(chosen)
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["rows_R"] + 1], batch["label_ids_R"])
    assert batch["label_ids_R"].tolist() == [token for sample in chosen for token in sample.response_ids.tolist()]
    for place, sample in enumerate(chosen):
        num_placeholders = int((batch["input_ids"][place] == real_inputs._model_inputs._placeholder).sum())
        assert num_placeholders == 4 * len(sample.images)


def test_rows_of_different_k_share_a_batch(samples: LakeDataset, real_inputs: StudentInputs) -> None:
    """Shorter rows are padded with id 0 at -inf, and every row still sums to 1 with its tail."""
    from dataclasses import replace

    from logitlake_schemas import CodecPolicy
    from logitlake_shared.topk import TeacherRows, decode, encode

    sample = samples[0]
    ids_TK, logprobs_TK, log_tail_T = decode(sample.rows)
    rows = TeacherRows(ids_TK, logprobs_TK, sample.rows.label_logprob_T, sample.rows.label_rank_T, log_tail_T)
    few = replace(sample, rows=encode(rows, CodecPolicy(k_max=ids_TK.shape[1], k_min=2, p_min=0.2, grid="exact")))
    batch = SampleCollator(real_inputs, samples.spec.codec)([few, sample])
    num_rows = len(sample.response_ids)
    assert batch["topk_ids_RK"].shape == (2 * num_rows, ids_TK.shape[1])
    kept_R = torch.isfinite(batch["topk_logprobs_RK"]).sum(dim=1)
    assert kept_R[:num_rows].tolist() == few.rows.k_T.tolist()
    assert (batch["topk_ids_RK"][~torch.isfinite(batch["topk_logprobs_RK"])] == 0).all()
    total_R = batch["topk_logprobs_RK"].exp().sum(dim=1) + batch["log_tail_mass_R"].exp()
    torch.testing.assert_close(total_R, torch.ones(2 * num_rows))


def _loss_sum(model: Any, batch: dict[str, Tensor], vocab_size: int) -> float:
    teacher = TeacherBatch(
        batch["topk_ids_RK"], batch["topk_logprobs_RK"], batch["log_tail_mass_R"], batch["label_ids_R"]
    )
    hidden_RH = hidden_response_rows(model, batch)
    loss, _ = distillation_loss(
        hidden_RH, model.lm_head.weight[:vocab_size], teacher, divergence_weight=1.0, ce_weight=1.0, chunk_rows=7
    )
    return float(loss)


@torch.no_grad()
def test_padding_changes_nothing(samples: LakeDataset, real_inputs: StudentInputs, student_checkpoint: Path) -> None:
    """Samples of different lengths, with and without image, together or each alone: the same loss."""
    model = load_student(student_checkpoint, dtype=torch.float32).eval()
    vocab_size = Renderer(student_checkpoint).vocab_size
    collate = SampleCollator(real_inputs, samples.spec.codec)
    chosen = [samples[position] for position in range(6)]
    assert len({len(sample.prompt_ids) + len(sample.response_ids) for sample in chosen}) > 1
    assert {len(sample.images) for sample in chosen} == {0, 1}
    alone = sum(_loss_sum(model, collate([sample]), vocab_size) for sample in chosen)
    assert _loss_sum(model, collate(chosen), vocab_size) == pytest.approx(alone, abs=SUM_TOLERANCE)


def test_pairs_stand_chosen_first_on_the_same_images(student_lake: Path, real_inputs: StudentInputs) -> None:
    """Sequence p is the chosen response of pair p, P + p the rejected one; reference and length belong to it."""
    dataset = PairDataset(student_lake, "preference")
    pairs = [dataset[0], dataset[3]]
    batch = PairCollator(real_inputs)(pairs)
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    logprobs = [pair.chosen_logprobs for pair in pairs] + [pair.rejected_logprobs for pair in pairs]
    for sequence in range(4):
        rows = batch["sequence_R"] == sequence
        assert batch["label_ids_R"][rows].tolist() == responses[sequence].tolist()
        assert batch["length_B"][sequence] == len(responses[sequence])
        assert float(batch["reference_logp_B"][sequence]) == pytest.approx(float(logprobs[sequence].sum()), rel=1e-6)
    pixels = batch["pixel_values"]
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[1], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])


# ---- images ----


def pixels_of(inputs: StudentInputs, widths: Sequence[int]) -> list[float]:
    """The first pixel of each of several images, shown together."""
    ids = [9] * len(widths)
    sequences = inputs.sequences([(ids, [len(ids)], [7], [1], [picture(width) for width in widths])], ["one"])
    return sequences.inputs["pixel_values"][:, 0, 0, 0].tolist()


def test_an_image_is_decoded_once_while_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache never holds more bytes than its bound; what fell out is decoded again, and nothing is mixed up."""
    loader = CountingLoader()
    monkeypatch.setattr(model_inputs, "_CACHE_BYTES", 2 * 12)  # two images of three float32
    inputs = inputs_of(loader=loader)
    for width in (1, 2, 1, 2):
        assert pixels_of(inputs, [width]) == [width]
    assert loader.asked == [(1, 1), (2, 1)]
    assert pixels_of(inputs, [3, 4]) == [3, 4]
    assert len(inputs._model_inputs._cached) == 2
    assert pixels_of(inputs, [1]) == [1]
    assert loader.asked == [(1, 1), (2, 1), (3, 1), (4, 1), (1, 1)]


def test_an_image_larger_than_the_cache_is_still_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decoded each time and kept never."""
    monkeypatch.setattr(model_inputs, "_CACHE_BYTES", 1)
    inputs = inputs_of()
    assert pixels_of(inputs, [5]) == [5]
    assert not inputs._model_inputs._cached


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_tokens_per_image_are_the_features_of_the_tower(tiny_llava: Callable[..., Any], strategy: str) -> None:
    """As many placeholders as the model makes features, class token dropped or kept."""
    model = tiny_llava()
    model.config.vision_feature_select_strategy = strategy
    features = model.model.get_image_features(
        pixel_values=torch.zeros(1, 3, 16, 16), vision_feature_layer=-2, vision_feature_select_strategy=strategy
    ).pooler_output
    assert features[0].shape[0] == tokens_per_image(model.config)


# ---- what is refused ----


def test_an_image_for_a_student_without_a_tower_is_refused() -> None:
    """No silent loss of the picture."""
    with pytest.raises(TrainingError, match=r"one: .* without a vision tower"):
        pixels_of(inputs_of(loader=None), [1])


def test_a_sample_over_the_context_is_named(samples: LakeDataset, real_inputs: StudentInputs) -> None:
    """Its id, its length and the student's, instead of positions the student never saw."""
    sample = samples[0]
    length = len(sample.prompt_ids) + len(sample.response_ids) + 3
    short = StudentInputs(real_inputs._model_inputs, pad_id=0, context_length=length - 1)
    with pytest.raises(TrainingError, match=rf"sample {sample.sample_id}: {length} positions .* made for {length - 1}"):
        SampleCollator(short, samples.spec.codec)([sample])


def test_the_teachers_tokenizer_fits(samples: LakeDataset, student_checkpoint: Path) -> None:
    """The session's student belongs to the session's lake."""
    check_student_fits(samples.spec, samples, Renderer(student_checkpoint))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_map_sha256", "0" * 64),
        ("chat_template_sha256", "0" * 64),
        ("renderer", "another/9"),
        ("vocab_size", 7),
        ("eos_id", 3),
        ("image_token_id", None),
    ],
)
def test_each_field_of_the_tokenizer_is_compared(
    samples: LakeDataset, student_checkpoint: Path, field: str, value: Any
) -> None:
    """A lake that differs in one field is refused, and the message names it with both values."""
    tokenizer = samples.spec.tokenizer.model_copy(update={field: value})
    spec = samples.spec.model_copy(update={"tokenizer": tokenizer})
    with pytest.raises(FingerprintMismatchError, match=f"{field}: {value} in the lake, .* in the student"):
        check_student_fits(spec, samples, Renderer(student_checkpoint))


def test_an_answer_of_the_teachers_own_tokens_fits(samples: LakeDataset, student_checkpoint: Path) -> None:
    """A teacher writes tokens that its text is not cut into, and may end before EOS: prompt and text decide."""
    renderer = Renderer(student_checkpoint)
    given = samples[0]
    text = given.messages[-1]["content"]
    letters = np.concatenate([renderer.render_response(letter)[:-1] for letter in text])
    assert letters.tolist() != given.response_ids[:-1].tolist()
    written = replace(
        given,
        response_ids=letters,
        response_lengths=np.array([len(letters)], np.int32),
        finish_reason="length",
    )
    check_student_fits(samples.spec, cast(LakeDataset, [written]), renderer)
    with pytest.raises(FingerprintMismatchError, match="response_ids"):
        check_student_fits(samples.spec, cast(LakeDataset, [replace(written, finish_reason="given")]), renderer)
    for change, name in (
        ({"response_ids": letters[:-1]}, "response_ids"),
        ({"prompt_ids": given.prompt_ids[:-1]}, "prompt_ids"),
    ):
        with pytest.raises(FingerprintMismatchError, match=name):
            check_student_fits(samples.spec, cast(LakeDataset, [replace(written, **change)]), renderer)


def test_ids_without_their_text_are_believed(samples: LakeDataset, student_checkpoint: Path) -> None:
    """A lake of token ids may hold no conversation; the tokenizer's own fields are compared all the same."""
    alone = cast(LakeDataset, [replace(samples[0], messages=[])])
    check_student_fits(samples.spec, alone, Renderer(student_checkpoint))


def test_a_response_without_eos_is_learned_as_far_as_it_goes(samples: LakeDataset, real_inputs: StudentInputs) -> None:
    """B7: every token that the teacher wrote is a label, and none that it did not write."""
    given = samples[0]
    length = len(given.response_ids) - 1
    rows = split(given.rows, [length, 1])[0]
    cut = replace(
        given,
        response_ids=given.response_ids[:-1],
        response_lengths=np.array([length], np.int32),
        rows=rows,
        finish_reason="length",
    )
    batch = SampleCollator(real_inputs, samples.spec.codec)([cut])
    assert batch["label_ids_R"].tolist() == given.response_ids[:-1].tolist()
    assert len(batch["rows_R"]) == length
