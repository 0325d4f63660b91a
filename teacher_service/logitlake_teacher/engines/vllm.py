"""The vLLM teacher, by its public interface only. The one file of the service that imports vllm.

Scoring is a prefill that asks for `prompt_logprobs`: flat lists and no detokenising (forty times faster than the
defaults), no prefix cache (its cached rows would be uninitialised memory), one k for all requests of a step and
never mixed with sampling. Prompts go in with ONE placeholder an image, because vLLM expands them itself and would
silently expand an expanded one again; what it reports back is compared with our own expansion, token by token,
before a row is believed.

vLLM returns the top-k but not the mass outside it, so here the tail is one minus the sum of the head: exact to the
rounding of float32, hence the floor below. The engine `hf` has the exact tail.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitlake_schemas.records import EngineIdentity
from logitlake_shared.alignment import predicting_rows
from logitlake_shared.errors import EngineError
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.config import VllmEngineConfig
from logitlake_teacher.engines.base import (
    EngineSetup,
    Generation,
    SampleProblem,
    Sampling,
    ScoredSample,
    ScoreRequest,
    agree_label_ranks,
    expand_request,
    fit_request,
    seed_of,
)
from logitlake_teacher.engines.checkpoint import read_checkpoint
from logitlake_teacher.engines.identity import identify_engine

__all__ = ["LOG_TAIL_FLOOR", "VllmEngine"]

# One minus a sum of float32 probabilities is known to about 1e-7 (the spacing of float32 below 1 is 6e-8): a
# smaller remainder is rounding, and a softmax never is exactly zero, so the tail is held at this value.
LOG_TAIL_FLOOR = float(np.log(1e-7))

# A CPU build of vLLM wants these before it is imported; a GPU build has better defaults. What the user has set stays.
_CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles its rank count on first use: half a minute, and a C++ compiler that a machine may not have.
    "TORCHDYNAMO_DISABLE": "1",
}
_QUIET_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class _Prompt:
    """A request as vLLM takes it, and as it must come back."""

    index: int
    request: ScoreRequest
    prompt: dict[str, Any]
    expanded_ids_S: NDArray[np.int64]
    is_response_S: NDArray[np.bool_]


class VllmEngine:
    """Implements `logitlake_teacher.engines.base.Engine`."""

    def __init__(self, config: VllmEngineConfig, setup: EngineSetup) -> None:
        checkpoint = read_checkpoint(setup.model_dir)
        self._config = config
        self._setup = setup
        self._num_image_tokens = checkpoint.num_image_tokens
        # vLLM counts the one token that it generates after the sample.
        model_length = min(config.context_length or checkpoint.context_length, checkpoint.context_length)
        self._context_length = model_length - 1
        if setup.sampled is not None:
            raise EngineError("the engine 'vllm' returns the most probable tokens and cannot draw from all; use 'hf'")
        if setup.k > setup.vocab_size:
            raise EngineError(
                f"{setup.model_dir}: asked for {setup.k} entries a token, the vocabulary has {setup.vocab_size}; "
                f"set codec.k_max to at most {setup.vocab_size}"
            )
        self._vllm = _import_vllm(setup.num_threads)
        try:
            self._llm = self._vllm.LLM(
                model=str(setup.model_dir),
                dtype=config.dtype,
                seed=0,
                max_model_len=model_length,
                max_logprobs=setup.k,
                max_num_batched_tokens=config.batch_tokens,
                enable_prefix_caching=False,
                enforce_eager=config.enforce_eager,
                gpu_memory_utilization=config.gpu_memory_utilization,
                tensor_parallel_size=config.tensor_parallel_size,
                disable_log_stats=True,
                **(self._image_options() if checkpoint.sees_images else {}),
            )
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise EngineError(f"{setup.model_dir}: vLLM cannot load the teacher: {error}") from error

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredSample | SampleProblem]:
        """See `Engine.score`."""
        answers, prompts = self._prepare_all(requests)
        sampling = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=self._setup.k, flat_logprobs=True, detokenize=False
        )
        for prompt, output in zip(prompts, self._run(prompts, sampling), strict=True):
            rows = self._rows_of(prompt, output)
            answers[prompt.index] = ScoredSample(prompt.request.sample_id, rows, len(prompt.expanded_ids_S))
        return [answer for answer in answers if answer is not None]

    def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> list[list[Generation] | SampleProblem]:
        """See `Engine.generate`. All candidates of a request share one prefill; their rows come with decoding."""
        problems, prompts = self._prepare_all(requests, room=sampling.max_new_tokens)
        answers: list[list[Generation] | SampleProblem | None] = [
            problem if isinstance(problem, SampleProblem) else None for problem in problems
        ]
        params = [
            self._vllm.SamplingParams(
                n=sampling.n,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed_of(sampling, prompt.request) if sampling.temperature > 0 else None,
                logprobs=self._setup.k,
                flat_logprobs=True,
                detokenize=False,
                stop_token_ids=[self._setup.eos_id],
            )
            for prompt in prompts
        ]
        for prompt, output in zip(prompts, self._run(prompts, params), strict=True):
            answers[prompt.index] = [self._candidate(prompt, candidate) for candidate in output.outputs]
        return [answer for answer in answers if answer is not None]

    def _candidate(self, prompt: _Prompt, candidate: Any) -> Generation:
        ids = np.asarray(candidate.token_ids, dtype=np.int32)
        rows = self._flat_rows(candidate.logprobs, np.arange(len(ids)), len(ids), ids)
        reason: Literal["stop", "length"] = "stop" if candidate.finish_reason == "stop" else "length"
        return Generation(ids, reason, rows, len(prompt.expanded_ids_S) + len(ids))

    def describe(self) -> EngineIdentity:
        """See `Engine.describe`."""
        return identify_engine(self._config, self._setup)

    def close(self) -> None:
        """Frees the weights and the key-value cache."""
        self._llm = None

    def _image_options(self) -> dict[str, Any]:
        """The image processor's PIL path, as in `logitlake_shared.pixels`: torchvision resamples to other pixels."""
        return {
            "limit_mm_per_prompt": {"image": self._config.max_images},
            "mm_processor_kwargs": {"backend": "pil"},
        }

    def _run(self, prompts: list[_Prompt], sampling: Any) -> list[Any]:
        if not prompts:
            return []
        outputs: list[Any] = self._llm.generate([item.prompt for item in prompts], sampling, use_tqdm=False)
        return outputs

    def _prepare_all(
        self, requests: Sequence[ScoreRequest], room: int = 0
    ) -> tuple[list[ScoredSample | SampleProblem | None], list[_Prompt]]:
        answers: list[ScoredSample | SampleProblem | None] = [None] * len(requests)
        prompts = []
        for index, request in enumerate(requests):
            prepared = self._prepare(index, request, room)
            if isinstance(prepared, SampleProblem):
                answers[index] = prepared
            else:
                prompts.append(prepared)
        return answers, prompts

    def _prepare(self, index: int, request: ScoreRequest, room: int) -> "_Prompt | SampleProblem":
        setup = self._setup
        ids_S, _ = expand_request(request, None, ())
        expanded = fit_request(request, setup.image_token_id, self._num_image_tokens, self._context_length, room)
        if isinstance(expanded, SampleProblem):
            return expanded
        prompt: dict[str, Any] = {"prompt_token_ids": ids_S.tolist()}
        if len(request.images) > self._config.max_images:
            return SampleProblem(
                request.sample_id,
                "too_many_images",
                f"the sample has {len(request.images)} images, engine.max_images is {self._config.max_images}",
            )
        if request.images:
            prompt["multi_modal_data"] = {"image": [image.as_pil() for image in request.images]}
        return _Prompt(index, request, prompt, expanded.ids_S, expanded.is_response_S)

    def _rows_of(self, prompt: _Prompt, output: Any) -> TeacherRows:
        """The response rows of vLLM's flat lists.

        Entry i of `prompt_logprobs` describes token i given those before it, in k + 1 columns: first the actual
        token with its rank, then ranks 1 to k. Entry 0 is empty, so the flat lists start at token 1, and row i of
        theirs is what position i predicts.
        """
        k = self._setup.k
        returned_S = np.asarray(output.prompt_token_ids, dtype=np.int64)
        if not np.array_equal(returned_S, prompt.expanded_ids_S):
            raise EngineError(
                f"sample {prompt.request.sample_id!r}: vLLM saw {len(returned_S)} tokens that are not the "
                f"{len(prompt.expanded_ids_S)} tokens that were meant; the images were expanded differently, so no row "
                "can be placed"
            )
        flat = output.prompt_logprobs
        num_positions = len(returned_S) - 1
        if len(flat.token_ids) != num_positions * (k + 1):
            raise EngineError(
                f"sample {prompt.request.sample_id!r}: vLLM returned {len(flat.token_ids)} logprobs, expected "
                f"{num_positions} positions of {k + 1}"
            )
        return self._flat_rows(flat, predicting_rows(prompt.is_response_S), num_positions, prompt.request.response_ids)

    def _flat_rows(self, flat: Any, rows_R: NDArray[np.int64], num_positions: int, label_ids_R: Any) -> TeacherRows:
        """[positions, k + 1] flat lists of vLLM -> the rows `rows_R`; column 0 is the actual token."""
        k = self._setup.k
        ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(num_positions, k + 1)[rows_R]
        logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(num_positions, k + 1)[rows_R]
        rank_T = np.asarray(flat.ranks, dtype=np.int32).reshape(num_positions, k + 1)[rows_R, 0]
        topk_ids_TK, topk_logprobs_TK = ids[:, 1:], logprobs[:, 1:]
        return TeacherRows(
            topk_ids_TK=topk_ids_TK,
            topk_logprobs_TK=topk_logprobs_TK,
            label_logprob_T=logprobs[:, 0],
            label_rank_T=agree_label_ranks(topk_ids_TK, label_ids_R, rank_T),
            log_tail_mass_T=_log_tail(topk_logprobs_TK, self._setup.vocab_size),
        )


def _import_vllm(num_threads: int) -> Any:
    """vLLM, imported after the environment that it reads at import."""
    import torch

    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        for name, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise EngineError(
            f"engine.type is 'vllm', but vLLM cannot be imported: {error}; install logitlake[teacher] (GPU) or "
            "logitlake[teacher-cpu], or use engine.type=hf"
        ) from error

    torch.set_num_threads(num_threads)
    return vllm


def _log_tail(topk_logprobs_TK: NDArray[np.float32], vocab_size: int) -> NDArray[np.float32]:
    """`log_tail_mass_T` from the head: log(1 - sum p), held at `LOG_TAIL_FLOOR`; -inf where K is the vocabulary."""
    num_tokens, k = topk_logprobs_TK.shape
    if k >= vocab_size:
        return np.full(num_tokens, -np.inf, dtype=np.float32)
    head_T = np.exp(topk_logprobs_TK.astype(np.float64)).sum(axis=1)
    floor = np.exp(LOG_TAIL_FLOOR)
    log_tail_T: NDArray[np.float32] = np.log(np.maximum(1.0 - head_T, floor)).astype(np.float32)
    return log_tail_T
