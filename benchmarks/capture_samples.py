"""Models and samples that the parts of `python -m benchmarks.capture` share."""

from pathlib import Path

import numpy as np
from examples.smollm2.checkpoints import find_gguf, save_teacher

from benchmarks.logprobs import FOLDER
from logitlake_schemas import sha256_hex
from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer
from logitlake_teacher.engines import EngineSetup, ScoreRequest

__all__ = [
    "RESPONSE_SHARE",
    "setup_of",
    "smollm2",
    "text_requests",
    "vlm",
    "vlm_requests",
]

RESPONSE_SHARE = 0.3
"""of a sample's tokens: what the figures are promised for"""

_VLM = Path(__file__).parents[1] / "examples" / "digit_scenes" / "models" / "teacher"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a float32 checkpoint, made from the installed package at the first use."""
    folder = FOLDER / "smollm2"
    if not (folder / "model.safetensors").is_file():
        save_teacher(find_gguf(), folder)
    return folder


def vlm() -> Path:
    """The digit scenes' teacher: a LLaVA of 2.3 M parameters, sixteen tokens an image."""
    return _VLM


def setup_of(model_dir: Path, k: int, num_threads: int) -> EngineSetup:
    """What an engine is told."""
    renderer = Renderer(model_dir)
    return EngineSetup(
        model_dir, renderer.vocab_size, renderer.eos_id, renderer.image_token_id, k=k, num_threads=num_threads
    )


def text_requests(setup: EngineSetup, num_samples: int, num_tokens: int) -> list[ScoreRequest]:
    """Samples of about `num_tokens` random tokens, `RESPONSE_SHARE` of them response."""
    generator = np.random.default_rng(0)
    requests = []
    for number in range(num_samples):
        length = int(generator.integers(num_tokens // 2, num_tokens * 3 // 2))
        response = max(1, round(RESPONSE_SHARE * length))
        requests.append(_request(setup, number, generator, length - response, response, ()))
    return requests


def vlm_requests(setup: EngineSetup, num_samples: int) -> list[ScoreRequest]:
    """Samples of one image of noise (16 tokens), a question of about 10 and an answer of about 11 tokens."""
    generator = np.random.default_rng(1)
    requests = []
    for number in range(num_samples):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image = DecodedImage(sha256_hex(pixels.tobytes()), pixels)
        prompt, response = int(generator.integers(6, 14)), int(generator.integers(8, 15))
        requests.append(_request(setup, number, generator, prompt, response, (image,)))
    return requests


def _request(
    setup: EngineSetup,
    number: int,
    generator: np.random.Generator,
    prompt: int,
    response: int,
    images: tuple[DecodedImage, ...],
) -> ScoreRequest:
    ids = generator.integers(0, setup.vocab_size, prompt + response).astype(np.int32)
    if setup.image_token_id is not None:
        ids[ids == setup.image_token_id] = setup.eos_id
        ids[1 : 1 + len(images)] = setup.image_token_id
    return ScoreRequest(
        f"made-{number}",
        ids[:prompt],
        np.array([prompt], np.int32),
        ids[prompt:],
        np.array([response], np.int32),
        images,
    )
