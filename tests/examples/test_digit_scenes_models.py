"""The committed models of the demo world are what stock libraries expect, and they see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from examples.digit_scenes import networks  # noqa: E402  (needs torch)
from examples.digit_scenes.evaluate import evaluate_model, figures_of  # noqa: E402
from examples.digit_scenes.make import Settings  # noqa: E402
from examples.digit_scenes.packing import draw_turns, encode_turn, pack  # noqa: E402
from examples.digit_scenes.questions import FaultRates  # noqa: E402
from examples.digit_scenes.tokenizer import MAX_VOCABULARY, TOKENS_PER_IMAGE, train_tokenizer  # noqa: E402
from examples.digit_scenes.world import draw_scene  # noqa: E402

MODELS = Path(__file__).parents[2] / "examples" / "digit_scenes" / "models"
MEBIBYTE = 1 << 20
LOGIT_TOLERANCE = 1e-4
"""Two fp32 roads through attention of different lengths; the logits are of order ten."""
READS_AT_LEAST = 0.9
"""The measured share is in figures.json; 40 scenes leave about 60 readings, so a few may fail by chance."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS / "teacher")


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    """The alphabet is the 256 bytes: decode(encode(text)) is text, whatever the script."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_vocabulary_is_bytes_and_whole_words(tokenizer: Any) -> None:
    """At most 512 entries, 256 of them bytes, and a caption costs one token a word."""
    assert 256 < len(tokenizer) <= MAX_VOCABULARY
    caption = "a red seven at the top left and a blue two at the bottom right"
    assert len(tokenizer(caption)["input_ids"]) == len(caption.split())


def test_tokenizer_training_is_reproducible() -> None:
    """The same texts give the same entries and merges."""
    texts = ["a red seven at the top left", "Is there a red seven?", "yes", "no"] * 3
    first, second = (train_tokenizer(texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_models_share_one_tokenizer_and_template() -> None:
    """Distilling from stored tokens needs the teacher's and the student's ids to mean the same."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(MODELS / folder / name).read_bytes() for folder in ("teacher", "student_lm", "vision_tower")}) == 1


def test_committed_models_are_small() -> None:
    """Everything together stays under 15 MiB."""
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 15 * MEBIBYTE


@pytest.mark.parametrize(
    ("folder", "auto_class"),
    [
        ("teacher", "AutoModelForImageTextToText"),
        ("student_lm", "AutoModelForCausalLM"),
        ("vision_tower", "CLIPVisionModel"),
    ],
)
def test_stock_transformers_load_every_key(folder: str, auto_class: str) -> None:
    """No missing, unexpected or resized tensor."""
    import transformers

    _, loading = getattr(transformers, auto_class).from_pretrained(MODELS / folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading


def test_teacher_is_written_as_vllm_reads_it() -> None:
    """The published key names, the inner architecture, a head width vLLM has kernels for, one vocabulary."""
    from safetensors import safe_open

    with safe_open(MODELS / "teacher" / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    prefixes = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.")
    assert all(name.startswith(prefixes) for name in names)
    config = json.loads((MODELS / "teacher" / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["Qwen3ForCausalLM"]
    assert config["text_config"]["head_dim"] in (32, 64)


def test_teacher_and_student_look_through_the_same_tower() -> None:
    """The teacher's tower is the committed tower, to the bit: it was frozen."""
    from safetensors.torch import load_file

    tower = load_file(MODELS / "vision_tower" / "model.safetensors")
    teacher = load_file(MODELS / "teacher" / "model.safetensors")
    assert tower
    assert all(torch.equal(teacher[f"vision_tower.{name}"], tensor) for name, tensor in tower.items())


def test_processor_gives_what_training_saw(tokenizer: Any) -> None:
    """The stock processor's pixels equal training's, and each image becomes sixteen image tokens."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(MODELS / "teacher")
    scene = draw_scene("test", np.random.default_rng(0))
    picture = Image.fromarray(scene.pixels_HWC)
    inputs = processor(images=picture, text="<user><image>Hm?<assistant>", return_tensors="pt")
    expected = networks.normalise(torch.from_numpy(scene.pixels_HWC)[None])
    torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-6, rtol=0)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_id).sum() == TOKENS_PER_IMAGE


@torch.inference_mode()
def test_packed_questions_equal_separate_conversations(tokenizer: Any) -> None:
    """A packed row's predictions equal those of one full forward of the model for each question."""
    from transformers import AutoModelForImageTextToText

    teacher = AutoModelForImageTextToText.from_pretrained(MODELS / "teacher").eval()
    rng = np.random.default_rng(3)
    scenes = [draw_scene("train", rng) for _ in range(2)]
    asked = [draw_turns(scene.objects, FaultRates(), rng) for scene in scenes]
    rows = [[encode_turn(tokenizer, *turn) for turn in turns] for turns in asked]
    pixels_BCHW = networks.normalise(torch.from_numpy(np.stack([scene.pixels_HWC for scene in scenes])))

    packed = pack(rows, tokenizer)
    embeds_BSH = teacher.model.language_model.embed_tokens(packed.ids_BS)
    embeds_BSH[:, 1 : 1 + TOKENS_PER_IMAGE] = torch.stack(
        list(teacher.model.get_image_features(pixels_BCHW).pooler_output)
    )
    hidden_BSH = teacher.model.language_model(
        inputs_embeds=embeds_BSH, attention_mask=packed.may_attend_B1SS, position_ids=packed.positions_BS
    ).last_hidden_state
    logits_NV = teacher.lm_head(hidden_BSH.flatten(0, 1)[packed.predicting_N])

    prefix = packed.ids_BS[0, : 1 + TOKENS_PER_IMAGE].tolist()
    separate, targets = [], []
    for row, pixels_CHW in zip(rows, pixels_BCHW, strict=True):
        for turn in row:
            ids_1S = torch.tensor([[*prefix, *turn.ids]])
            logits_SV = teacher(input_ids=ids_1S, pixel_values=pixels_CHW[None]).logits[0]
            separate.append(logits_SV[-turn.num_answer_tokens - 1 : -1])
            targets.extend(turn.ids[-turn.num_answer_tokens :])
    torch.testing.assert_close(logits_NV, torch.cat(separate), atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE)
    assert packed.targets_N.tolist() == targets


def test_figures_by_hand() -> None:
    """Six answers: one existence miss, one false claim, one caption with an object that is not there."""

    def record(task: str, truth: str) -> dict[str, Any]:
        return {"task": task, "objects": ["red seven"], "conversations": [{}, {"from": "gpt", "value": truth}]}

    captions = [record("caption", "a red seven at the top left")] * 2
    questions = [record("existence", truth) for truth in ("yes", "yes", "no", "no")]
    answers = ["a red seven at the top left", "a red seven at the top left and a red nine at the top right"]
    figures = figures_of([*captions, *questions], [*answers, "yes", "no", "yes", "no"])
    assert figures["existence"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    assert figures["exact"] == {
        "caption": 0.5,
        "existence": 0.5,
        "reading": None,
        "counting": None,
        "colour": None,
        "position": None,
    }
    assert figures["caption_hallucination_rate"] == 0.5


def test_teacher_reads_and_beats_guessing() -> None:
    """On unseen handwriting the committed teacher reads, and its yes and no are far from the coin that guessing is."""
    figures = evaluate_model(MODELS / "teacher", settings=Settings(test_scenes=40))
    assert figures["exact"]["reading"] >= READS_AT_LEAST
    assert figures["exact"]["existence"] >= 0.7
