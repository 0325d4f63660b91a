"""What capturing through vLLM costs over a bare prefill on the same engine.

The bound of a route is a bare `generate(max_tokens=1)` without logprobs on the same engine, plus the lm_head product
and the top-k on the rows that the route returns, timed alone: all positions for `prompt_logprobs`, response tokens for
`span_hook`.
"""

from collections.abc import Callable, Sequence

import torch

from benchmarks.capture_samples import setup_of, smollm2, text_requests, vlm, vlm_requests
from benchmarks.harness import Figure, interleaved, median
from logitlake_teacher.config import VllmEngineConfig
from logitlake_teacher.engines import EngineSetup, ScoredSample, ScoreRequest
from logitlake_teacher.engines.vllm.engine import VllmEngine
from logitlake_teacher.engines.vllm.frontend import sampling_params

__all__ = ["route_figures"]

K = 64
# As vLLM's own lm_head for prompt logprobs: so many rows at once.
_BOUND_ROWS = 1024


def route_figures(rounds: int, quick: bool) -> list[Figure]:
    """Both routes on SmolLM2-135M and on the tiny VLM."""
    figures = []
    for name, model_dir, requests_of in (
        ("SmolLM2-135M", smollm2(), lambda setup: text_requests(setup, 4 if quick else 12, 160)),
        ("tiny VLM", vlm(), lambda setup: vlm_requests(setup, 64 if quick else 256)),
    ):
        setup = setup_of(model_dir, K, num_threads=2)
        engine = VllmEngine(VllmEngineConfig(route="span_hook"), setup)
        try:
            figures += _routes(name, engine, setup, requests_of(setup), rounds)
        finally:
            engine.close()
    return figures


def _routes(
    name: str, engine: VllmEngine, setup: EngineSetup, requests: Sequence[ScoreRequest], rounds: int
) -> list[Figure]:
    answers = engine.score(requests)
    num_positions = sum(answer.expanded_length for answer in answers if isinstance(answer, ScoredSample))
    num_responses = sum(len(request.response_ids) for request in requests)
    head = _head(setup)
    seconds = interleaved(
        {
            "bare": lambda: _bare(engine, requests),
            "A": lambda: engine.score_by(requests, "prompt_logprobs"),
            "vLLM of A": lambda: _bare(engine, requests, prompt_logprobs=K),
            "C": lambda: engine.score_by(requests, "span_hook"),
            "rows of A": lambda: head(num_positions),
            "rows of C": lambda: head(num_responses),
        },
        rounds,
    )
    figures = []
    for route, title in (("A", "prompt_logprobs (A)"), ("C", "span_hook (C)")):
        shares = [
            (bare + rows) / captured
            for bare, rows, captured in zip(seconds["bare"], seconds[f"rows of {route}"], seconds[route], strict=True)
        ]
        share = median(shares)
        figures.append(Figure(f"{name}: bound / {title}", share, "x", ">= 0.9", share >= 0.9))
        figures.append(Figure(f"{name}: {title}", num_positions / median(seconds[route]), "positions / s"))
    for title, part, whole in (("C over A", "A", "C"), ("A, share of vLLM's own calls", "vLLM of A", "A")):
        ratio = median([a / b for a, b in zip(seconds[part], seconds[whole], strict=True)])
        figures.append(Figure(f"{name}: {title}", ratio, "x"))
    return figures


def _bare(engine: VllmEngine, requests: Sequence[ScoreRequest], prompt_logprobs: int | None = None) -> None:
    """The same prompts through the same engine, nothing asked for, or nothing done with what is."""
    prompts = [prompt.prompt for prompt in engine._prepare_all(requests, [None] * len(requests))]
    params = sampling_params(
        max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True, prompt_logprobs=prompt_logprobs
    )
    engine._frontend.run("score", prompts, [params] * len(prompts))


def _head(setup: EngineSetup) -> Callable[[int], None]:
    """lm_head product and top-k of so many rows, in float32, with as many threads as the engine has."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(setup.model_dir).get_text_config()
    torch.set_num_threads(setup.num_threads)
    weight_VH = torch.randn(setup.vocab_size, config.hidden_size)
    hidden_RH = torch.randn(_BOUND_ROWS, config.hidden_size)

    def run(num_rows: int) -> None:
        for start in range(0, num_rows, _BOUND_ROWS):
            (hidden_RH[: min(_BOUND_ROWS, num_rows - start)] @ weight_VH.T).topk(K, dim=1)

    return run
