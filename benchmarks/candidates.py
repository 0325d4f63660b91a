"""Candidates of one prompt share its prefill: N = 8 in one request against eight requests, through vLLM.

    python -m benchmarks.candidates [--json] [--quick]

The prompt is one image of 484 tokens and a question, an answer is 32 tokens (a few end earlier). The teacher is a LLaVA
with random weights and the width of SmolLM2-135M (hidden 576), so that prefill and decoding weigh as they do in a model
and not in a toy. Two ways of asking eight times are compared: all eight in one call, which vLLM batches, and one after
the other. In both the engine is one whose requests share nothing (`share_prefill = false`).
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from benchmarks.harness import Figure, publish
from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import VllmEngineConfig
from logitlake_teacher.engines import Engine, EngineSetup, SampleProblem, Sampling, ScoreRequest, build_engine

NUM_CANDIDATES = 8
ANSWER_TOKENS = 32
SIDE, PATCH = 308, 14
IMAGE_TOKENS = (SIDE // PATCH) ** 2
CONTEXT = 1024
DIGIT_TEACHER = Path(__file__).parents[1] / "examples" / "digit_scenes" / "models" / "teacher"
REACH = 2.0


def measure(quick: bool) -> list[Figure]:
    """Seconds of the three ways, and how many times faster the shared prefill is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder, num_layers=4 if quick else 12)
        rounds = 2 if quick else 5
        one_call = _seconds(folder, True, lambda engine, request: _ask_once(engine, request, NUM_CANDIDATES), rounds)
        batch = _seconds(folder, False, _ask_together, rounds)
        singly = _seconds(folder, False, _ask_singly, rounds)
    return [
        Figure(f"one request of n = {NUM_CANDIDATES}", one_call, "s"),
        Figure(f"{NUM_CANDIDATES} requests in one call", batch, "s"),
        Figure(f"{NUM_CANDIDATES} requests one after the other", singly, "s"),
        Figure(
            "shared prefill against requests in one call",
            batch / one_call,
            "x",
            f"≥ {REACH}",
            batch >= REACH * one_call,
        ),
        Figure(
            "shared prefill against requests one by one",
            singly / one_call,
            "x",
            f"≥ {REACH}",
            singly >= REACH * one_call,
        ),
    ]


def save_teacher(folder: Path, num_layers: int) -> None:
    """A random LLaVA whose image is `IMAGE_TOKENS` tokens, with the tokenizer and template of the digit scenes."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen3Config,
    )

    tokenizer = AutoTokenizer.from_pretrained(DIGIT_TEACHER)
    tokenizer.model_max_length = CONTEXT
    side = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    # vLLM wants the tower's keys as released checkpoints have them; transformers writes shorter ones.
    path = folder / "model.safetensors"
    weights = {
        key.replace("vision_tower.", "vision_tower.vision_model.")
        if "vision_tower." in key and "vision_model." not in key
        else key: value
        for key, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def _seconds(folder: Path, share_prefill: bool, ask: Callable[[Engine, ScoreRequest], None], rounds: int) -> float:
    """Median over `rounds` prompts, each with an image of its own, after one that warms up."""
    renderer = Renderer(folder)
    setup = EngineSetup(folder, renderer.vocab_size, renderer.eos_id, renderer.image_token_id, k=1, num_threads=1)
    engine = build_engine(
        VllmEngineConfig(share_prefill=share_prefill, batch_tokens=CONTEXT, route="prompt_logprobs"), setup
    )
    try:
        taken = []
        for number in range(rounds + 1):
            request = _request(renderer, number)
            start = time.monotonic()
            ask(engine, request)
            taken.append(time.monotonic() - start)
    finally:
        engine.close()
    return statistics.median(taken[1:])


def _request(renderer: Renderer, number: int) -> ScoreRequest:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels, "RGB").save(buffer, "PNG")
    prompt_ids = renderer.render_prompt(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
    )
    return ScoreRequest(
        f"prompt-{number}",
        prompt_ids,
        np.array([len(prompt_ids)], np.int32),
        np.zeros(0, np.int32),
        np.zeros(1, np.int32),
        (DecodedImage.of(buffer.getvalue()),),
    )


def _ask(engine: Engine, requests: list[ScoreRequest], n: int) -> None:
    answers = engine.generate(requests, Sampling(max_new_tokens=ANSWER_TOKENS, n=n, temperature=1.0, seed=1))
    for candidates in answers:
        assert not isinstance(candidates, SampleProblem), candidates
        assert len(candidates) == n


def _ask_once(engine: Engine, request: ScoreRequest, n: int) -> None:
    _ask(engine, [request], n)


def _apart(request: ScoreRequest) -> list[ScoreRequest]:
    return [replace(request, sample_id=f"{request.sample_id}/{place}") for place in range(NUM_CANDIDATES)]


def _ask_together(engine: Engine, request: ScoreRequest) -> None:
    _ask(engine, _apart(request), 1)


def _ask_singly(engine: Engine, request: ScoreRequest) -> None:
    for one in _apart(request):
        _ask(engine, [one], 1)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True)
@click.option("--quick", is_flag=True)
def main(as_json: bool, quick: bool) -> None:
    publish("candidates", measure(quick), as_json)


if __name__ == "__main__":
    main()
