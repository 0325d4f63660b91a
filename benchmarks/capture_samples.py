"""Samples and timing that the parts of `python -m benchmarks.capture` share."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from examples.smollm2.checkpoints import find_gguf, save_teacher

from benchmarks.logprobs import FOLDER
from logitlake_schemas import sha256_hex
from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer
from logitlake_teacher.engines import EngineSetup, ScoreRequest

__all__ = [
    "RESPONSE_SHARE",
    "in_own_process",
    "interleaved",
    "median",
    "setup_of",
    "smollm2",
    "text_requests",
    "vlm",
    "vlm_requests",
]

Result = TypeVar("Result")

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


def interleaved(passes: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each pass in each round; they take turns, and one round more comes first and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """The middle of a pass's rounds."""
    return statistics.median(seconds)


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The function's result; its process ends with it, and with that whatever libraries it started."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
