"""The vLLM teacher. Scores by one of two routes, draws candidates, and believes nothing that it has not compared.

Route `prompt_logprobs` is vLLM's public one: a prefill that asks for the k best of every position, flat lists and no
detokenising (forty times faster than the defaults). Route `span_hook` computes response rows only and knows the exact
tail (`span_hook.py`); it is taken where this version of vLLM is listed and the start-up probe saw both routes agree.

Prompts go in with ONE placeholder an image, because vLLM expands them itself and would silently expand an expanded one
again; what it reports back is compared with our own expansion, token by token, before a row is believed. Scoring never
reads the prefix cache, whose rows would be uninitialised memory, and every answer says that it did not; only the
candidates of one prompt share their prefill through it. An image is known to vLLM's caches by the digest of its bytes
and of everything that turns them into pixels.
"""

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitlake_schemas.fingerprint import fingerprint
from logitlake_schemas.records import EngineIdentity
from logitlake_shared.alignment import predicting_rows
from logitlake_shared.errors import EngineError
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.config import VllmEngineConfig
from logitlake_teacher.engines.base import (
    EngineSetup,
    ExpandedRequest,
    Generation,
    SampleProblem,
    Sampling,
    ScoredSample,
    ScoreRequest,
    expand_request,
    fit_request,
    seed_of,
)
from logitlake_teacher.engines.checkpoint import TeacherCheckpoint, read_checkpoint
from logitlake_teacher.engines.identity import identify_engine
from logitlake_teacher.engines.vllm.frontend import Frontend, open_frontend, sampling_params
from logitlake_teacher.engines.vllm.rows import PackedLayout, rows_of_flat, rows_of_packed
from logitlake_teacher.engines.vllm.span_hook import SPAN_HOOK_VERSIONS, TeacherWorker, span_request
from logitlake_teacher.engines.vllm.startup import check_batch_order, probe_requests, probe_span_hook

__all__ = ["Route", "VllmEngine"]

Route = Literal["prompt_logprobs", "span_hook"]

_log = logging.getLogger(__name__)

# The lowest bias that vLLM takes: e^-50 at its highest temperature.
_NEVER = -100.0


@dataclass(frozen=True)
class _Prompt:
    """A request as vLLM takes it, and as it must come back."""

    index: int
    request: ScoreRequest
    prompt: dict[str, Any]
    expanded: ExpandedRequest


class VllmEngine:
    """Implements `logitlake_teacher.engines.base.Engine`. May be called from several threads."""

    route: Route
    """the route that scores; both give the same rows within rounding"""

    def __init__(self, config: VllmEngineConfig, setup: EngineSetup) -> None:
        checkpoint = read_checkpoint(setup.model_dir, config.mm_processor_kwargs)
        _check_setup(config, setup)
        self._config = config
        self._setup = setup
        self._count_image_tokens = checkpoint.num_image_tokens
        self._layout = PackedLayout(setup.k, len(setup.temperatures))
        # A teacher that is sampled hot says `<image>`, too, and a response cannot hold an image. Rows are not touched.
        self._banned = None if setup.image_token_id is None else {setup.image_token_id: _NEVER}
        self._identity = identify_engine(config, setup)
        self._image_version = fingerprint(
            {"processor": self._identity.image_processor_sha256, "options": _processor_options(config)}
        )[:16]
        # vLLM counts the one token that it generates after the sample.
        model_length = min(config.context_length or checkpoint.context_length, checkpoint.context_length)
        self._context_length = model_length - 1
        self._frontend: Frontend = open_frontend(
            _engine_options(config, setup, checkpoint, model_length),
            setup.num_threads,
            # The only runner with a listed version; a user's own choice stays, and may then be refused.
            runner="v1" if config.route == "span_hook" else None,
        )
        try:
            self._check_image_backend()
            self._trim_vocabulary()
            requests = probe_requests(setup, checkpoint.sees_images)
            self.route = self._choose_route(requests)
            check_batch_order(self.score, requests, config.dtype)
        except BaseException:
            self._frontend.close()
            raise

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredSample | SampleProblem]:
        """See `Engine.score`."""
        return self.score_by(requests, self.route)

    def score_by(self, requests: Sequence[ScoreRequest], route: Route) -> list[ScoredSample | SampleProblem]:
        """`score` by that route, whichever the engine chose: both can be asked where the span hook is in place."""
        answers: list[ScoredSample | SampleProblem | None] = [None] * len(requests)
        prompts = self._prepare_all(requests, answers)
        rows_of: Callable[[_Prompt, Any], TeacherRows]
        if route == "span_hook":
            rows_of = self._rows_of_hook
            stock = sampling_params(max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True)
            params = [_with_rows(stock, prompt) for prompt in prompts]
        else:
            rows_of = self._rows_of_prompt_logprobs
            stock = sampling_params(
                max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True, prompt_logprobs=self._setup.k
            )
            params = [stock] * len(prompts)
        outputs = self._frontend.run("score", [prompt.prompt for prompt in prompts], params)
        for prompt, output in zip(prompts, outputs, strict=True):
            if isinstance(output, Exception):
                answers[prompt.index] = _refused(prompt, output)
                continue
            _check_output(prompt, output)
            answers[prompt.index] = ScoredSample(
                prompt.request.sample_id, rows_of(prompt, output), len(prompt.expanded.ids_S)
            )
        return [answer for answer in answers if answer is not None]

    def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> list[list[Generation] | SampleProblem]:
        """See `Engine.generate`. All candidates of a request share one prefill; their rows come with decoding.

        Where the tail at other temperatures was asked for, which decoding does not tell, the candidates are scored.
        """
        if sampling.temperature > 0 and not self._frontend.can_draw:
            raise EngineError(
                "on a CPU vLLM cannot draw candidates from a prompt that it may compute in pieces; set "
                f"engine.batch_tokens (now {self._config.batch_tokens}) to at least engine.context_length "
                f"({self._context_length + 1}), or lower the latter"
            )
        answers: list[list[Generation] | SampleProblem | None] = [None] * len(requests)
        prompts = self._prepare_all(requests, answers, room=sampling.max_new_tokens)
        params = [
            sampling_params(
                n=sampling.n,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed_of(sampling, prompt.request) if sampling.temperature > 0 else None,
                logprobs=self._setup.k,
                stop_token_ids=[self._setup.eos_id],
                logit_bias=self._banned,
            )
            for prompt in prompts
        ]
        outputs = self._frontend.run("sample", [item.prompt for item in prompts], params)
        for prompt, output in zip(prompts, outputs, strict=True):
            answers[prompt.index] = (
                _refused(prompt, output)
                if isinstance(output, Exception)
                else [self._candidate(prompt, candidate) for candidate in output.outputs]
            )
        complete = [answer for answer in answers if answer is not None]
        return self._with_scored_rows(requests, complete) if self._setup.temperatures else complete

    def describe(self) -> EngineIdentity:
        """See `Engine.describe`."""
        return self._identity

    def close(self) -> None:
        """Frees the weights and the key-value cache."""
        self._frontend.close()

    def _check_image_backend(self) -> None:
        if self._frontend.image_backend not in (None, "pil"):
            raise EngineError(
                f"{self._setup.model_dir}: vLLM resamples images by {self._frontend.image_backend}, to other pixels "
                "than the engine 'hf' and every student see; take use_fast and backend out of "
                "engine.mm_processor_kwargs, or install a transformers release whose processors know use_fast=false"
            )

    def _trim_vocabulary(self) -> None:
        """Makes vLLM forget the entries of the lm_head that are no tokens. Raises `EngineError` if it does not."""
        have, want = self._frontend.vocab_size, self._setup.vocab_size
        if have < want:
            raise EngineError(
                f"{self._setup.model_dir}: the tokenizer has {want} tokens, the lm_head only {have} rows; tokenizer "
                "and checkpoint do not belong together"
            )
        if have == want:
            return
        widths = self._frontend.call_workers(TeacherWorker.logitlake_trim_vocabulary.__name__, want)
        seen = {width for width in widths if width is not None}
        if seen != {want}:
            raise EngineError(
                f"{self._setup.model_dir}: the lm_head has {have} rows for {want} tokens, and vLLM "
                f"{self._identity.engine_version} could not be made to leave the others out (it gives {sorted(seen)} "
                "logits); their mass would be captured as tail. Use engine.type=hf, or vLLM 0.32"
            )

    def _choose_route(self, requests: list[ScoreRequest]) -> Route:
        """`config.route`, or for `auto` the span hook where it may be used. Raises `EngineError` where it must be."""
        if self._config.route == "prompt_logprobs":
            return "prompt_logprobs"
        problem = self._install_span_hook(requests)
        if problem is None:
            _log.info("vLLM scores by its span hook: response rows only, with the exact tail")
            return "span_hook"
        if self._config.route == "span_hook":
            raise EngineError(f"engine.route is 'span_hook', but {problem}; set engine.route=prompt_logprobs")
        if self._setup.temperatures:
            raise EngineError(
                f"the tail at temperatures {self._setup.temperatures} is known to the span hook only, but {problem}; "
                "capture at temperature 1 alone, or use engine.type=hf"
            )
        _log.warning("vLLM scores by prompt logprobs, because %s", problem)
        return "prompt_logprobs"

    def _install_span_hook(self, requests: list[ScoreRequest]) -> str | None:
        """Why the span hook cannot be used; None when it is in place and was seen to agree with vLLM's own rows."""
        runner = self._frontend.call_workers(TeacherWorker.logitlake_runner.__name__)[0]
        version = self._identity.engine_version
        listed = SPAN_HOOK_VERSIONS.get(runner, frozenset())
        if version not in listed:
            return (
                f"the hook was not tested with vLLM {version} and its model runner {runner}; listed are "
                f"{ {name: sorted(versions) for name, versions in SPAN_HOOK_VERSIONS.items()} } "
                "(VLLM_USE_V2_MODEL_RUNNER=0 chooses v1)"
            )
        self._frontend.call_workers(
            TeacherWorker.logitlake_install_span_hook.__name__,
            self._setup.k,
            self._setup.vocab_size,
            self._setup.temperatures,
        )
        return probe_span_hook(
            lambda asked: self.score_by(asked, "prompt_logprobs"),
            lambda asked: self.score_by(asked, "span_hook"),
            requests,
            self._config.dtype,
        )

    def _rows_of_hook(self, prompt: _Prompt, output: Any) -> TeacherRows:
        packed_TW, label_ids_T = output.prompt_token_id_logprobs, prompt.request.response_ids
        expected = (len(label_ids_T), self._layout.width)
        if packed_TW is None or packed_TW.shape != expected:
            shape = None if packed_TW is None else packed_TW.shape
            raise EngineError(
                f"sample {prompt.request.sample_id!r}: the span hook returned rows of shape {shape}, expected "
                f"{expected}"
            )
        return rows_of_packed(packed_TW, self._layout, label_ids_T)

    def _rows_of_prompt_logprobs(self, prompt: _Prompt, output: Any) -> TeacherRows:
        """The response rows of vLLM's flat lists.

        Entry i of `prompt_logprobs` describes token i given those before it, in k + 1 columns. Entry 0 is empty, so
        the flat lists start at token 1, and row i of theirs is what position i predicts.
        """
        k, flat = self._setup.k, output.prompt_logprobs
        num_positions = len(prompt.expanded.ids_S) - 1
        if len(flat.token_ids) != num_positions * (k + 1):
            raise EngineError(
                f"sample {prompt.request.sample_id!r}: vLLM returned {len(flat.token_ids)} logprobs, expected "
                f"{num_positions} positions of {k + 1}"
            )
        rows_R = predicting_rows(prompt.expanded.is_response_S)
        return rows_of_flat(flat, k, self._setup.vocab_size, prompt.request.response_ids, rows_R)

    def _candidate(self, prompt: _Prompt, candidate: Any) -> Generation:
        ids = np.asarray(candidate.token_ids, dtype=np.int32)
        rows = rows_of_flat(candidate.logprobs, self._setup.k, self._setup.vocab_size, ids)
        reason: Literal["stop", "length"] = "stop" if candidate.finish_reason == "stop" else "length"
        return Generation(ids, reason, rows, len(prompt.expanded.ids_S) + len(ids))

    def _with_scored_rows(
        self, requests: Sequence[ScoreRequest], drawn: Sequence[list[Generation] | SampleProblem]
    ) -> list[list[Generation] | SampleProblem]:
        """The candidates, each with the rows of scoring it."""
        forced = [
            replace(
                request, response_ids=candidate.response_ids, response_lengths=np.array([len(candidate.response_ids)])
            )
            for request, candidates in zip(requests, drawn, strict=True)
            if not isinstance(candidates, SampleProblem)
            for candidate in candidates
        ]
        scored = iter(self.score(forced))
        return [
            candidates
            if isinstance(candidates, SampleProblem)
            else [replace(candidate, rows=_scored_rows(next(scored))) for candidate in candidates]
            for candidates in drawn
        ]

    def _prepare_all(self, requests: Sequence[ScoreRequest], answers: list[Any], room: int = 0) -> list[_Prompt]:
        """What vLLM can be asked; the problems of the other requests go into `answers`."""
        prompts = []
        for index, request in enumerate(requests):
            prepared = self._prepare(index, request, room)
            if isinstance(prepared, SampleProblem):
                answers[index] = prepared
            else:
                prompts.append(prepared)
        return prompts

    def _prepare(self, index: int, request: ScoreRequest, room: int) -> "_Prompt | SampleProblem":
        setup = self._setup
        if len(request.images) > self._config.max_images:
            return SampleProblem(
                request.sample_id,
                "too_many_images",
                f"the sample has {len(request.images)} images, engine.max_images is {self._config.max_images}",
            )
        expanded = fit_request(request, setup.image_token_id, self._count_image_tokens, self._context_length, room)
        if isinstance(expanded, SampleProblem):
            return expanded
        prompt: dict[str, Any] = {"prompt_token_ids": _unexpanded(request).tolist()}
        if request.images:
            prompt["multi_modal_data"] = {"image": [image.as_pil() for image in request.images]}
            prompt["multi_modal_uuids"] = {
                "image": [f"{image.image_sha256}-{self._image_version}" for image in request.images]
            }
        return _Prompt(index, request, prompt, expanded)


def _check_setup(config: VllmEngineConfig, setup: EngineSetup) -> None:
    """Refuses what no route can answer. Raises `EngineError`."""
    if setup.sampled is not None:
        raise EngineError("the engine 'vllm' returns the most probable tokens and cannot draw from all; use 'hf'")
    if setup.k > setup.vocab_size:
        raise EngineError(
            f"{setup.model_dir}: asked for {setup.k} entries a token, the vocabulary has {setup.vocab_size}; "
            f"set codec.k_max to at most {setup.vocab_size}"
        )
    if setup.temperatures and config.route == "prompt_logprobs":
        raise EngineError(
            f"engine.route is 'prompt_logprobs', which cannot tell the tail at temperatures {setup.temperatures}; set "
            "engine.route to auto or span_hook, or capture at temperature 1 alone"
        )


def _engine_options(
    config: VllmEngineConfig, setup: EngineSetup, checkpoint: TeacherCheckpoint, model_length: int
) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    options: dict[str, Any] = {
        "model": str(setup.model_dir),
        "dtype": config.dtype,
        "quantization": config.quantization,
        "seed": config.seed,
        "max_model_len": model_length,
        "max_logprobs": setup.k,
        "logprobs_mode": "raw_logprobs",
        "max_num_batched_tokens": config.batch_tokens,
        "enable_prefix_caching": config.share_prefill,
        "enforce_eager": config.enforce_eager,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "renderer_num_workers": config.renderer_num_workers,
        "worker_extension_cls": f"{TeacherWorker.__module__}.{TeacherWorker.__qualname__}",
        "disable_log_stats": True,
    }
    if checkpoint.sees_images:
        options["limit_mm_per_prompt"] = {"image": config.max_images}
        options["mm_processor_kwargs"] = _processor_options(config)
    return options


def _processor_options(config: VllmEngineConfig) -> dict[str, Any]:
    """The image processor's PIL path, as in `logitlake_shared.pixels`: torchvision resamples to other pixels.

    By its old name: `backend="pil"` reaches the video processor of a Qwen-VL as well, which has no such path.
    """
    return {"use_fast": False, **config.mm_processor_kwargs}


def _check_output(prompt: _Prompt, output: Any) -> None:
    """Raises `EngineError` unless vLLM computed exactly the sequence that was meant, all of it."""
    returned_S = np.asarray(output.prompt_token_ids, dtype=np.int64)
    sample = f"sample {prompt.request.sample_id!r}"
    if not np.array_equal(returned_S, prompt.expanded.ids_S):
        raise EngineError(
            f"{sample}: vLLM saw {len(returned_S)} tokens that are not the {len(prompt.expanded.ids_S)} tokens that "
            "were meant; the images were expanded differently, so no row can be placed"
        )
    if output.num_cached_tokens:
        raise EngineError(
            f"{sample}: vLLM took {output.num_cached_tokens} positions from its prefix cache although it was told not "
            "to, and has no rows for them; set engine.share_prefill=false"
        )


def _with_rows(params: Any, prompt: _Prompt) -> Any:
    """The sampling parameters, naming the prompt's response rows."""
    named = copy(params)
    named.extra_args = span_request(predicting_rows(prompt.expanded.is_response_S), prompt.request.response_ids)
    return named


def _refused(prompt: _Prompt, error: Exception) -> SampleProblem:
    return SampleProblem(prompt.request.sample_id, "teacher_refused", f"vLLM refused the sample: {error}")


def _scored_rows(answer: ScoredSample | SampleProblem) -> TeacherRows:
    """Of a candidate, which fits wherever it was generated."""
    assert isinstance(answer, ScoredSample), answer
    assert isinstance(answer.rows, TeacherRows)
    return answer.rows


def _unexpanded(request: ScoreRequest) -> NDArray[np.int64]:
    """One placeholder an image."""
    ids_S, _ = expand_request(request, None, ())
    return ids_S
