"""The transformers engine against the plain model: one dense forward pass, one sample, nothing clever."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage
from logitlake_shared.pixels import load_pixels
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import HfEngineConfig
from logitlake_teacher.engines import EngineSetup, ScoredSample, ScoreRequest, build_engine

# The same float32 weights, padded and alone: sums in another order. Seen: 3e-6.
TWIN_TOLERANCE = 5e-5


@pytest.fixture
def setup(tiny_teacher: Path) -> EngineSetup:
    """The tiny teacher, 8 entries a token."""
    renderer = Renderer(tiny_teacher)
    return EngineSetup(tiny_teacher, renderer.vocab_size, renderer.eos_id, renderer.image_token_id, 8, 1)


@pytest.fixture
def requests(tiny_teacher: Path, png: Callable[[int], bytes]) -> list[ScoreRequest]:
    """Five samples of different lengths with one picture each."""
    renderer = Renderer(tiny_teacher)
    made = []
    for number in range(5):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?" * (number + 1)}]}
        rendered = renderer.render([question, {"role": "assistant", "content": f"a red {number}"}])
        made.append(ScoreRequest(str(number), **vars(rendered), images=(DecodedImage.of(png(number)),)))
    return made


def dense_logprobs(setup: EngineSetup, request: ScoreRequest) -> np.ndarray:
    """The slow twin: `logprobs_TV` of the response tokens from the stock model's full logits, placeholders by hand."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(setup.model_dir, dtype=torch.float32).eval()
    expanded: list[int] = []
    for token in request.prompt_ids.tolist():
        expanded += [token] * (16 if token == setup.image_token_id else 1)
    ids = torch.tensor([[*expanded, *request.response_ids.tolist()]])
    pixels = torch.from_numpy(load_pixels(setup.model_dir).model_inputs(request.images[0].as_pil())["pixel_values"])
    with torch.inference_mode():
        logits_SV = model(input_ids=ids, pixel_values=pixels).logits[0].double()[:, : setup.vocab_size]
    # The last prompt position predicts the first response token, and so on.
    first = len(expanded) - 1
    return torch.log_softmax(logits_SV[first : first + len(request.response_ids)], dim=-1).numpy()


def test_rows_equal_the_dense_model(setup: EngineSetup, requests: list[ScoreRequest]) -> None:
    """Top-k, label logprob, rank and exact tail of padded batches equal those of the full softmax of each sample."""
    engine = build_engine(HfEngineConfig(batch_tokens=128), setup)
    for request, answer in zip(requests, engine.score(requests), strict=True):
        assert isinstance(answer, ScoredSample)
        logprobs_TV = dense_logprobs(setup, request)
        sorted_TV = np.sort(logprobs_TV, axis=1)[:, ::-1]
        labels_T = logprobs_TV[np.arange(len(logprobs_TV)), request.response_ids]
        rows = answer.rows
        np.testing.assert_allclose(rows.topk_logprobs_TK, sorted_TV[:, :8], atol=TWIN_TOLERANCE, rtol=0)
        np.testing.assert_allclose(rows.label_logprob_T, labels_T, atol=TWIN_TOLERANCE, rtol=0)
        np.testing.assert_array_equal(rows.label_rank_T, (logprobs_TV > labels_T[:, None]).sum(1) + 1)
        tail_T = np.logaddexp.reduce(sorted_TV[:, 8:], axis=1)
        np.testing.assert_allclose(rows.log_tail_mass_T, tail_T, atol=TWIN_TOLERANCE, rtol=0)


def test_slots_of_a_padded_head_are_no_tokens(setup: EngineSetup, requests: list[ScoreRequest]) -> None:
    """Told of fewer tokens than the head has rows, the engine normalises over the tokens alone."""
    small = replace(setup, vocab_size=setup.vocab_size - 20)
    request = replace(requests[0], response_ids=requests[0].response_ids % small.vocab_size)
    answer = build_engine(HfEngineConfig(), replace(small, k=small.vocab_size)).score([request])[0]
    assert isinstance(answer, ScoredSample)
    assert int(answer.rows.topk_ids_TK.max()) < small.vocab_size
    expected = np.sort(dense_logprobs(small, request), axis=1)[:, ::-1]
    np.testing.assert_allclose(answer.rows.topk_logprobs_TK, expected, atol=TWIN_TOLERANCE, rtol=0)


def test_the_batch_budget_changes_no_number(setup: EngineSetup, requests: list[ScoreRequest]) -> None:
    """All in one pass, or each alone: the same rows within the rounding of float32."""
    together = build_engine(HfEngineConfig(batch_tokens=4096), setup).score(requests)
    alone = build_engine(HfEngineConfig(batch_tokens=1), setup).score(requests)
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, ScoredSample)
        assert isinstance(other, ScoredSample)
        np.testing.assert_allclose(one.rows.topk_logprobs_TK, other.rows.topk_logprobs_TK, atol=TWIN_TOLERANCE, rtol=0)


def test_a_text_only_teacher_is_scored_too(tmp_path: Path) -> None:
    """A causal language model, tied embeddings and all: the rows are those of its full softmax."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.2,
        max_position_embeddings=64,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "text")
    prompt, response = np.arange(5, dtype=np.int32), np.array([7, 8, 9, 1], np.int32)
    request = ScoreRequest("text", prompt, np.array([5], np.int32), response, np.array([4], np.int32))
    answer = build_engine(HfEngineConfig(), EngineSetup(tmp_path / "text", 50, 1, None, 8, 1)).score([request])[0]
    assert isinstance(answer, ScoredSample)
    with torch.inference_mode():
        logits_SV = model(input_ids=torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]).logits[
            0
        ]
    expected_TV = torch.log_softmax(logits_SV[4:8].double(), -1).numpy()
    np.testing.assert_allclose(
        answer.rows.label_logprob_T, expected_TV[np.arange(4), response], atol=TWIN_TOLERANCE, rtol=0
    )
    np.testing.assert_allclose(
        answer.rows.topk_logprobs_TK, np.sort(expected_TV, 1)[:, ::-1][:, :8], atol=TWIN_TOLERANCE, rtol=0
    )


def test_a_checkpoint_with_missing_weights_is_refused(setup: EngineSetup, tmp_path: Path) -> None:
    """transformers would fill them with random numbers; we name them and stop."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "teacher"
    shutil.copytree(setup.model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "multi_modal_projector.linear_1.weight" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"multi_modal_projector\.linear_1\.weight"):
        build_engine(HfEngineConfig(), replace(setup, model_dir=folder))


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
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


def test_an_unknown_multimodal_family_is_refused_by_name(setup: EngineSetup, tmp_path: Path) -> None:
    """How many tokens its images become is not known here; guessing would misplace every row."""
    folder = tmp_path / "other"
    shutil.copytree(setup.model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "pixtral"}))
    with pytest.raises(EngineError, match="'pixtral'"):
        build_engine(HfEngineConfig(), replace(setup, model_dir=folder))


def test_a_folder_without_weights_is_refused(setup: EngineSetup, tmp_path: Path) -> None:
    """The message says what was expected."""
    folder = tmp_path / "empty"
    shutil.copytree(setup.model_dir, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineError, match=r"transformers cannot load the teacher"):
        build_engine(HfEngineConfig(), replace(setup, model_dir=folder))
