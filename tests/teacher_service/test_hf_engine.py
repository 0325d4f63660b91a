"""The transformers engine against the plain model: one dense forward pass, one sample, nothing clever."""

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.tiny_models import save_tiny_qwen_vl, save_tiny_text

from logitlake_shared.alignment import interleave, predicting_rows
from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage
from logitlake_shared.pixels import load_image_processor
from logitlake_shared.rendering import Renderer
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.config import HfEngineConfig
from logitlake_teacher.engines import EngineSetup, SampleProblem, Sampling, ScoredSample, ScoreRequest, build_engine

# The same float32 weights, packed or padded and alone: sums in another order. Seen: 1e-5.
TWIN_TOLERANCE = 5e-5
# The tail's logsumexp runs over other entries at every temperature, down to e-20 of the mass at T=1.
TAIL_TOLERANCE = 1e-4
TEMPERATURES = (2.0, 4.0, 0.25)


def picture(seed: int, width: int, height: int) -> DecodedImage:
    """Noise of a size of its own."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels, "RGB").save(buffer, "PNG")
    return DecodedImage.of(buffer.getvalue())


@dataclass(frozen=True)
class Teacher:
    """A checkpoint, what an engine is told about it, and samples for it."""

    setup: EngineSetup
    requests: list[ScoreRequest]

    def scored(self, config: HfEngineConfig, **told: Any) -> list[TeacherRows]:
        """The rows of every sample."""
        engine = build_engine(config, replace(self.setup, **told))
        answers = engine.score(self.requests)
        engine.close()
        rows = []
        for answer in answers:
            assert isinstance(answer, ScoredSample), answer
            assert isinstance(answer.rows, TeacherRows)
            rows.append(answer.rows)
        return rows


def conversation(renderer: Renderer, sample_id: str, turns: Sequence[str], *images: DecodedImage) -> ScoreRequest:
    """A sample that shows its images in the first turn."""
    messages: list[dict[str, Any]] = []
    for place, text in enumerate(turns):
        shown = [{"type": "image"} for _ in images] if place == 0 else []
        content: Any = [*shown, {"type": "text", "text": text}] if place % 2 == 0 else text
        messages.append({"role": "assistant" if place % 2 else "user", "content": content})
    return ScoreRequest(sample_id, **vars(renderer.render(messages)), images=images)


@pytest.fixture(params=["llava", "qwen3_vl", "text"])
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Teacher:
    """One teacher of each kind, with samples of different lengths, turns and, where it can see, pictures."""
    if request.param == "text":
        folder = tmp_path / "text"
        save_tiny_text(folder)
    else:
        folder = request.getfixturevalue({"llava": "tiny_teacher", "qwen3_vl": "tiny_qwen_vl"}[request.param])
    return teacher_of(folder, sees_images=request.param != "text")


def teacher_of(folder: Path, *, sees_images: bool) -> Teacher:
    """The teacher in `folder`."""
    renderer = Renderer(folder)
    setup = EngineSetup(folder, renderer.vocab_size, renderer.eos_id, renderer.image_token_id, k=8, num_threads=1)
    square, wide, small = picture(1, 32, 32), picture(2, 90, 20), picture(3, 9, 14)
    shown: list[tuple[DecodedImage, ...]] = [(square,), (wide,), (), (small, wide), (square,), (wide, small)]
    if not sees_images:
        shown = [()] * len(shown)
    turns = (
        ("what is in the picture?", "a red seven"),
        ("how many digits are there?", "three", "is there a blue two?", "yes"),
        ("is there a seven?", "there is no picture"),
        ("what?", "no"),
        ("what is in the picture?", "a red two"),
        ("what are these?", ""),
    )
    pairs = zip(turns, shown, strict=True)
    return Teacher(setup, [conversation(renderer, str(n), said, *images) for n, (said, images) in enumerate(pairs)])


def dense_logits(setup: EngineSetup, request: ScoreRequest) -> np.ndarray:
    """The slow twin: `logits_TV` float64 of the response tokens from the stock model's full logits, one sample alone.

    Placeholders are repeated by hand: as often as the image processor's own grid says, 16 times for the tiny LLaVA.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if setup.image_token_id is not None else AutoModelForCausalLM
    model = auto.from_pretrained(setup.model_dir, dtype=torch.float32).eval()
    inputs: dict[str, Any] = {}
    counts = iter(())
    if request.images:
        processor = load_image_processor(setup.model_dir)
        inputs = dict(processor([image.as_pil() for image in request.images], return_tensors="pt"))
        grids = inputs.get("image_grid_thw")
        counts = iter([16] * len(request.images) if grids is None else (grids.prod(-1) // 4).tolist())
    plain_S, response_S = interleave(
        request.prompt_ids, request.prompt_lengths, request.response_ids, request.response_lengths
    )
    repeats_S = [next(counts) if token == setup.image_token_id else 1 for token in plain_S.tolist()]
    ids_1S = torch.from_numpy(np.repeat(plain_S, repeats_S))[None]
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids_1S == setup.image_token_id).int()
    with torch.inference_mode():
        logits_SV = model(input_ids=ids_1S, **inputs).logits[0].double()[:, : setup.vocab_size]
    return logits_SV[predicting_rows(np.repeat(response_S, repeats_S))].numpy()


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """In float64."""
    return logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("batching", "batch_tokens"), [("packed", 4096), ("packed", 128), ("packed", 1), ("padded", 128)]
)
def test_rows_equal_the_dense_model(teacher: Teacher, batching: Any, batch_tokens: int) -> None:
    """Top-k, label logprob, rank and exact tail equal those of each sample alone, however samples are put together."""
    answers = teacher.scored(HfEngineConfig(batching=batching, batch_tokens=batch_tokens))
    for request, rows in zip(teacher.requests, answers, strict=True):
        logprobs_TV = log_softmax(dense_logits(teacher.setup, request))
        sorted_TV = np.sort(logprobs_TV, axis=1)[:, ::-1]
        labels_T = logprobs_TV[np.arange(len(logprobs_TV)), request.response_ids]
        np.testing.assert_allclose(rows.topk_logprobs_TK, sorted_TV[:, :8], atol=TWIN_TOLERANCE, rtol=0)
        np.testing.assert_allclose(rows.label_logprob_T, labels_T, atol=TWIN_TOLERANCE, rtol=0)
        np.testing.assert_array_equal(rows.label_rank_T, (logprobs_TV > labels_T[:, None]).sum(1) + 1)
        tail_T = np.logaddexp.reduce(sorted_TV[:, 8:], axis=1)
        np.testing.assert_allclose(rows.log_tail_mass_T, tail_T, atol=TWIN_TOLERANCE, rtol=0)
        assert rows.log_tail_mass_TX is None


def test_tails_at_other_temperatures_equal_the_dense_model(teacher: Teacher) -> None:
    """The mass outside the top-k of softmax(logits / T), for a T above and below 1; nothing else changes by a bit."""
    plain = teacher.scored(HfEngineConfig())
    tempered = teacher.scored(HfEngineConfig(), temperatures=TEMPERATURES)
    for request, one, other in zip(teacher.requests, plain, tempered, strict=True):
        logits_TV = dense_logits(teacher.setup, request)
        order_TV = np.argsort(-logits_TV, axis=1)
        assert other.log_tail_mass_TX is not None
        assert other.log_tail_mass_TX.shape == (len(request.response_ids), len(TEMPERATURES))
        for x, temperature in enumerate(TEMPERATURES):
            outside_TV = np.take_along_axis(log_softmax(logits_TV / temperature), order_TV[:, 8:], axis=1)
            expected_T = np.logaddexp.reduce(outside_TV, axis=1)
            np.testing.assert_allclose(other.log_tail_mass_TX[:, x], expected_T, atol=TAIL_TOLERANCE, rtol=1e-5)
        for name in ("topk_ids_TK", "topk_logprobs_TK", "label_logprob_T", "label_rank_T", "log_tail_mass_T"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


def test_the_whole_vocabulary_leaves_no_tail_at_any_temperature(teacher: Teacher) -> None:
    """k = vocabulary: the tails are -inf and not NaN."""
    for rows in teacher.scored(HfEngineConfig(), k=teacher.setup.vocab_size, temperatures=TEMPERATURES):
        assert rows.log_tail_mass_TX is not None
        assert np.isneginf(rows.log_tail_mass_T).all()
        assert np.isneginf(rows.log_tail_mass_TX).all()


def test_slots_of_a_padded_head_are_no_tokens(teacher: Teacher) -> None:
    """Told of fewer tokens than the head has rows, the engine normalises over the tokens alone and draws none else."""
    small = replace(teacher.setup, vocab_size=teacher.setup.vocab_size - 20, temperatures=(2.0,))
    request = replace(teacher.requests[0], response_ids=teacher.requests[0].response_ids % small.vocab_size)
    engine = build_engine(HfEngineConfig(), replace(small, k=small.vocab_size))
    answer = engine.score([request])[0]
    assert isinstance(answer, ScoredSample)
    assert isinstance(answer.rows, TeacherRows)
    assert int(answer.rows.topk_ids_TK.max()) < small.vocab_size
    expected_TV = np.sort(log_softmax(dense_logits(small, request)), axis=1)[:, ::-1]
    np.testing.assert_allclose(answer.rows.topk_logprobs_TK, expected_TV, atol=TWIN_TOLERANCE, rtol=0)
    prompt = replace(request, response_ids=np.zeros(0, np.int32), response_lengths=np.array([0], np.int32))
    (candidates,) = engine.generate([prompt], Sampling(max_new_tokens=16, n=4, temperature=50.0))
    assert not isinstance(candidates, SampleProblem)
    assert max(int(candidate.response_ids.max()) for candidate in candidates) < small.vocab_size


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_every_qwen_vl_family_equals_its_dense_model(family: str, tmp_path: Path) -> None:
    """Their towers, positions and experts differ; what is captured is each stock model's own distribution."""
    save_tiny_qwen_vl(tmp_path, family)
    teacher = teacher_of(tmp_path, sees_images=True)
    for request, rows in zip(teacher.requests, teacher.scored(HfEngineConfig()), strict=True):
        expected_TV = np.sort(log_softmax(dense_logits(teacher.setup, request)), axis=1)[:, ::-1]
        np.testing.assert_allclose(rows.topk_logprobs_TK, expected_TV[:, :8], atol=TWIN_TOLERANCE, rtol=0)


def test_a_window_of_attention_is_kept_when_samples_are_packed(tmp_path: Path) -> None:
    """A model whose layers see the last tokens only: packed rows are those of the dense model."""
    save_tiny_text(tmp_path / "windowed", use_sliding_window=True, sliding_window=6, max_window_layers=1)
    teacher = teacher_of(tmp_path / "windowed", sees_images=False)
    for request, rows in zip(teacher.requests, teacher.scored(HfEngineConfig()), strict=True):
        expected_TV = np.sort(log_softmax(dense_logits(teacher.setup, request)), axis=1)[:, ::-1]
        np.testing.assert_allclose(rows.topk_logprobs_TK, expected_TV[:, :8], atol=TWIN_TOLERANCE, rtol=0)


def test_a_model_that_cannot_share_a_row_is_refused_unless_padded(tmp_path: Path) -> None:
    """Mamba carries a state along the row and knows nothing of sequences: refused by name, and right when padded."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=40, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=1,
        initializer_range=0.3, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    setup = EngineSetup(tmp_path, 40, 1, None, k=8, num_threads=1)
    with pytest.raises(EngineError, match=r"engine\.batching=padded"):
        build_engine(HfEngineConfig(), setup)
    requests = [
        ScoreRequest(str(n), np.arange(n, dtype=np.int32), np.array([n], np.int32), np.array([7, 9, 1], np.int32),
                     np.array([3], np.int32))
        for n in (2, 5, 9)
    ]  # fmt: skip
    answers = build_engine(HfEngineConfig(batching="padded"), setup).score(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, ScoredSample)
        assert isinstance(answer.rows, TeacherRows)
        expected_TV = np.sort(log_softmax(dense_logits(setup, request)), axis=1)[:, ::-1]
        np.testing.assert_allclose(answer.rows.topk_logprobs_TK, expected_TV[:, :8], atol=TWIN_TOLERANCE, rtol=0)


def test_an_image_is_encoded_once_a_batch(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that show the same picture share its features: the tower sees each of the three pictures once."""
    if teacher.setup.image_token_id is None:
        pytest.skip("a teacher without a tower")
    engine: Any = build_engine(HfEngineConfig(), teacher.setup)
    base = engine._model._base
    seen: list[int] = []
    encode = base.get_image_features

    def counting(**inputs: Any) -> Any:
        seen.append(len(inputs["image_grid_thw"]) if "image_grid_thw" in inputs else len(inputs["pixel_values"]))
        return encode(**inputs)

    monkeypatch.setattr(base, "get_image_features", counting)
    engine.score(teacher.requests)
    assert seen == [3]


def test_a_checkpoint_with_missing_weights_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers; we name them and stop."""
    from safetensors.torch import load_file, save_file

    setup = teacher_of(tiny_teacher, sees_images=True).setup
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "multi_modal_projector.linear_1.weight" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"multi_modal_projector\.linear_1\.weight"):
        build_engine(HfEngineConfig(), replace(setup, model_dir=folder))


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    """Cohere multiplies its logits after the lm_head: captured by hand they would be wrong, so the start fails."""
    import torch
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        logit_scale=0.5,
        initializer_range=0.2,
    )
    CohereForCausalLM(config).save_pretrained(tmp_path / "cohere")
    with pytest.raises(EngineError, match="scaled logits"):
        build_engine(HfEngineConfig(), EngineSetup(tmp_path / "cohere", 300, 1, None, 8, 1))


def test_an_unknown_multimodal_family_is_refused_by_name(tiny_teacher: Path, tmp_path: Path) -> None:
    """How many tokens its images become is not known here; guessing would misplace every row."""
    setup = teacher_of(tiny_teacher, sees_images=True).setup
    folder = tmp_path / "other"
    shutil.copytree(tiny_teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "pixtral"}))
    with pytest.raises(EngineError, match="'pixtral'"):
        build_engine(HfEngineConfig(), replace(setup, model_dir=folder))


def test_a_folder_without_weights_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    """The message says what was expected."""
    setup = teacher_of(tiny_teacher, sees_images=True).setup
    folder = tmp_path / "empty"
    shutil.copytree(tiny_teacher, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineError, match=r"transformers cannot load the teacher"):
        build_engine(HfEngineConfig(), replace(setup, model_dir=folder))
