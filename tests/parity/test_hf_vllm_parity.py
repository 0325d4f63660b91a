"""transformers and vLLM are two programs that compute one teacher: every response row agrees, images included.

What could differ is everything around the weights: how an image is resized and expanded, which row belongs to which
token, where a response begins. A fault there is orders of magnitude above the tolerance.
"""

import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import HfEngineConfig, VllmEngineConfig
from logitlake_teacher.engines import EngineSetup, ScoredSample, ScoreRequest, build_engine

# Both run in float32; their kernels add in different orders. Seen: 5e-6.
PARITY_TOLERANCE = 1e-4
K = 16
# The other digit-scenes models are trained from this one; it is part of the repository.
DIGIT_SCENES_TEACHER = Path(__file__).parents[2] / "examples" / "digit_scenes" / "models" / "teacher"

CONVERSATIONS: tuple[tuple[tuple[int, int] | None, tuple[str, ...]], ...] = (
    ((32, 32), ("What is in the picture?", "A red seven at the top left and a blue two.")),
    ((32, 32), ("How many digits are there?", "three", "Is there a green four?", "no")),
    # Another size than the tower's: both sides must resample to the same pixels, and count the same tokens.
    ((50, 41), ("Which colour is the seven?", "red")),
    ((20, 75), ("Which colour is the two?", "blue")),
    ((32, 32), ("Read the digits.", "Unexpected words: ünïcödé, 1234567890!")),
    (None, ("Is there a seven?", "There is no picture to look at.")),
)


@pytest.fixture(params=["tiny_teacher", "tiny_qwen_vl", "digit_scenes"])
def teacher_dir(request: pytest.FixtureRequest) -> Path:
    """A random LLaVA, a random Qwen3-VL, and the trained teacher of the demo."""
    if request.param == "digit_scenes":
        return DIGIT_SCENES_TEACHER
    folder: Path = request.getfixturevalue(request.param)
    return folder


def conversation(renderer: Renderer, number: int) -> ScoreRequest:
    """The request for one of `CONVERSATIONS`, its picture drawn from the number."""
    size, turns = CONVERSATIONS[number]
    messages = []
    for place, text in enumerate(turns):
        if place % 2:
            messages.append({"role": "assistant", "content": text})
            continue
        image = [{"type": "image"}] if place == 0 and size is not None else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
    rendered = renderer.render(messages)
    images: tuple[DecodedImage, ...] = ()
    if size is not None:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels, "RGB").save(buffer, "PNG")
        images = (DecodedImage.of(buffer.getvalue()),)
    return ScoreRequest(
        str(number),
        rendered.prompt_ids,
        rendered.prompt_lengths,
        rendered.response_ids,
        rendered.response_lengths,
        images,
    )


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # vLLM and torch's compiler warn about themselves while they load
def test_every_response_row_agrees(teacher_dir: Path) -> None:
    """Label logprobs, label ranks, the K best and the tail of every response token, within PARITY_TOLERANCE."""
    if importlib.util.find_spec("vllm") is None:
        if os.environ.get("LOGITLAKE_REQUIRE_VLLM") == "1":
            pytest.fail("LOGITLAKE_REQUIRE_VLLM=1, but vLLM is not installed")
        pytest.skip("vLLM is not installed (logitlake[teacher-cpu])")
    renderer = Renderer(teacher_dir)
    setup = EngineSetup(teacher_dir, renderer.vocab_size, renderer.eos_id, renderer.image_token_id, k=K, num_threads=1)
    requests = [conversation(renderer, number) for number in range(len(CONVERSATIONS))]
    hf, vllm = build_engine(HfEngineConfig(), setup), build_engine(VllmEngineConfig(), setup)
    try:
        for one, other in zip(hf.score(requests), vllm.score(requests), strict=True):
            assert isinstance(one, ScoredSample), one
            assert isinstance(other, ScoredSample), other
            assert one.expanded_length == other.expanded_length
            # The span hook's tail is exact, as transformers' is.
            for name in ("label_logprob_T", "topk_logprobs_TK", "log_tail_mass_T"):
                np.testing.assert_allclose(
                    getattr(one.rows, name), getattr(other.rows, name), atol=PARITY_TOLERANCE, rtol=0, err_msg=name
                )
            # Two logprobs closer than the tolerance may change places; a label never moves further than that.
            moved_T = one.rows.label_rank_T != other.rows.label_rank_T
            assert moved_T.mean() <= 0.1, (one.rows.label_rank_T, other.rows.label_rank_T)
    finally:
        hf.close()
        vllm.close()
