"""Inside vLLM's workers: the response rows of a sample and nothing else, with the exact tail.

vLLM's own `prompt_logprobs` pass every position of a prompt through the lm_head, images included, materialise the
whole `[step, vocabulary]` softmax, and turn each row into Python objects. Here a request names its rows
(`SamplingParams.extra_args`), only their hidden states meet the lm_head, a chunk at a time, and what comes back is one
packed float32 array that vLLM hands through untouched (it travels as `prompt_token_id_logprobs`). Since the logits are
at hand, the mass outside the top-k is summed and not inferred, at T=1 and at any other temperature.

The hook adds to the model runner and takes nothing away: requests that do not name rows are served as ever, so both
routes can be compared on one engine. It reads private state of the runner, therefore it is used only with versions on
`SPAN_HOOK_VERSIONS`, and only after `startup.py` has seen both routes agree.

Axes: S positions of one step, R response rows of it, H hidden, V vocabulary, K captured entries, W packed columns.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlake_teacher.engines.vllm.rows import PackedLayout

__all__ = ["SPAN_HOOK_VERSIONS", "PromptSlice", "RowScorer", "SpanHook", "TeacherWorker", "span_request"]

# Versions of vLLM on which this hook was tested, by model runner. V1 is what a CPU runs, and a GPU where
# VLLM_USE_V2_MODEL_RUNNER=0 says so. The adapter for V2 below is tested against vLLM's own worker class, but V2 itself
# needs a GPU and has not run with it: no version is listed, so it is never used.
SPAN_HOOK_VERSIONS: Mapping[str, frozenset[str]] = {"v1": frozenset({"0.32.0"}), "v2": frozenset()}

# Logits that live at once: 256 MiB in float32, 441 rows of a 152k vocabulary.
_CHUNK_LOGITS = 1 << 26
_KEY = "logitlake_rows"

ComputeLogits = Callable[[torch.Tensor], torch.Tensor | None]


def span_request(rows_R: NDArray[np.int64], label_ids_R: NDArray[np.int32]) -> dict[str, Any]:
    """`extra_args` of a request: the positions whose hidden states are wanted, and the tokens that they predict.

    As bytes, which vLLM neither walks through nor copies.
    """
    return {_KEY: np.stack([rows_R, label_ids_R]).astype(np.int32).tobytes()}


class RowScorer:
    """Hidden states to packed rows."""

    def __init__(self, k: int, vocab_size: int, temperatures: tuple[float, ...]) -> None:
        self._layout = PackedLayout(k, len(temperatures))
        self._vocab_size = vocab_size
        self._temperatures = temperatures
        self._chunk_rows = max(1, _CHUNK_LOGITS // vocab_size)

    def score(
        self, hidden_RH: torch.Tensor, labels_R: torch.Tensor, compute_logits: ComputeLogits
    ) -> torch.Tensor | None:
        """Packed rows `[R, W]`; None on the ranks of a tensor-parallel group that get no logits."""
        packed_RW = torch.empty((len(labels_R), self._layout.width), dtype=torch.float32, device=hidden_RH.device)
        has_logits = True
        for start in range(0, len(labels_R), self._chunk_rows):
            chunk = slice(start, start + self._chunk_rows)
            logits_RV = compute_logits(hidden_RH[chunk])
            # Every rank of the group must come to every gather, whether it gets something or not.
            if logits_RV is None:
                has_logits = False
            else:
                self._pack(logits_RV[:, : self._vocab_size].float(), labels_R[chunk], packed_RW[chunk])
        return packed_RW if has_logits else None

    def _pack(self, logits_RV: torch.Tensor, labels_R: torch.Tensor, packed_RW: torch.Tensor) -> None:
        """Fills `packed_RW`; the logits are used up."""
        layout, k = self._layout, self._layout.k
        label_logit_R = logits_RV.gather(1, labels_R[:, None])[:, 0]
        rank_R = (logits_RV > label_logit_R[:, None]).sum(dim=1, dtype=torch.int32) + 1
        # One entry more than is kept: it is the largest of the rest, and steadies the sum over them.
        best_RK, best_ids_RK = logits_RV.topk(min(k + 1, self._vocab_size), dim=1)
        topk_RK, topk_ids_RK = best_RK[:, :k], best_ids_RK[:, :k]
        if k < self._vocab_size:
            pivot_R = best_RK[:, k]
            rest_RV = logits_RV.scatter_(1, topk_ids_RK, -torch.inf).sub_(pivot_R[:, None])
        else:
            pivot_R, rest_RV = best_RK[:, 0], torch.full_like(logits_RV[:, :1], -torch.inf)
        tails = packed_RW[:, layout.tails]
        for column, temperature in enumerate(self._temperatures, start=1):
            log_rest_R = (rest_RV / temperature).exp_().sum(dim=1).log_() + pivot_R / temperature
            log_head_R = (topk_RK / temperature).logsumexp(dim=1)
            tails[:, column] = log_rest_R - torch.logaddexp(log_rest_R, log_head_R)
        log_rest_R = rest_RV.exp_().sum(dim=1).log_() + pivot_R
        log_sum_R = torch.logaddexp(log_rest_R, topk_RK.logsumexp(dim=1))
        tails[:, 0] = log_rest_R - log_sum_R
        packed_RW[:, layout.LABEL_LOGPROB] = label_logit_R - log_sum_R
        packed_RW[:, layout.LABEL_RANK] = rank_R.view(torch.float32)
        packed_RW[:, layout.logprobs] = topk_RK - log_sum_R[:, None]
        packed_RW[:, layout.ids] = topk_ids_RK.to(torch.int32).view(torch.float32)


@dataclass(frozen=True)
class PromptSlice:
    """The part of one request's prompt that a step computes."""

    request_id: str
    start: int
    """first position of the prompt in this step"""
    stop: int
    """position behind the last"""
    offset: int
    """row of the step's hidden states that belongs to `start`"""
    is_last: bool
    """whether the step ends the prompt"""


@dataclass
class _Wanted:
    rows_R: NDArray[np.int32]
    labels_R: NDArray[np.int32]
    parts: list[torch.Tensor] = field(default_factory=list)


class SpanHook:
    """Collects the wanted rows of requests over the steps of their prefill. Knows nothing of a model runner."""

    def __init__(self, scorer: RowScorer) -> None:
        self._scorer = scorer
        self._wanted: dict[str, _Wanted] = {}

    def add(self, request_id: str, extra_args: Mapping[str, Any] | None) -> None:
        """Remembers a request that names rows; one that is known starts again (it was preempted)."""
        named = (extra_args or {}).get(_KEY)
        if named is not None:
            self._wanted[request_id] = _Wanted(*np.frombuffer(named, np.int32).reshape(2, -1))

    def remove(self, request_id: str) -> None:
        """Forgets a request."""
        self._wanted.pop(request_id, None)

    def step(
        self, slices: Iterable[PromptSlice], hidden_SH: torch.Tensor, compute_logits: ComputeLogits
    ) -> dict[str, torch.Tensor]:
        """Scores what this step computed; returns the packed rows of requests whose prompt is complete."""
        mine = [(item, self._wanted[item.request_id]) for item in slices if item.request_id in self._wanted]
        spans = [np.searchsorted(wanted.rows_R, (item.start, item.stop)) for item, wanted in mine]
        rows_R = [
            wanted.rows_R[first:last] - item.start + item.offset
            for (item, wanted), (first, last) in zip(mine, spans, strict=True)
        ]
        labels_R = [wanted.labels_R[first:last] for (_, wanted), (first, last) in zip(mine, spans, strict=True)]
        if not mine:
            return {}
        packed_RW = self._scorer.score(
            hidden_SH[_on_device(rows_R, hidden_SH)], _on_device(labels_R, hidden_SH), compute_logits
        )
        finished = {}
        parts = None if packed_RW is None else torch.split(packed_RW, [len(rows) for rows in rows_R])
        for number, (item, wanted) in enumerate(mine):
            if parts is not None:
                wanted.parts.append(parts[number])
            if item.is_last:
                if parts is not None:
                    finished[item.request_id] = torch.cat(wanted.parts)
                self.remove(item.request_id)
        return finished


def _on_device(arrays: list[NDArray[np.int32]], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(like.device)


class TeacherWorker:
    """Mixed into vLLM's worker class by name (`worker_extension_cls`); its methods are called on every worker."""

    model_runner: Any
    """vLLM's, of the worker that this is mixed into"""

    def logitlake_trim_vocabulary(self, vocab_size: int) -> int | None:
        """Cuts logits beyond the tokenizer's tokens off where they are made, so that no softmax or draw sees them.

        Returns how many logits the model gives from now on; None on ranks that hold no lm_head.
        """
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        model, config = self.model_runner.model, self.model_runner.model_config
        processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        for processor in processors:
            processor.org_vocab_size = min(processor.org_vocab_size, vocab_size)
        if not processors:
            return None
        hidden_RH = torch.zeros((1, config.get_hidden_size()), dtype=config.dtype, device=self.model_runner.device)
        with torch.inference_mode():
            logits_RV = model.compute_logits(hidden_RH)
        return None if logits_RV is None else int(logits_RV.shape[-1])

    def logitlake_runner(self) -> str:
        """`v1` or `v2`: which of vLLM's model runners this worker has."""
        return "v2" if hasattr(self.model_runner, "prompt_logprobs_worker") else "v1"

    def logitlake_install_span_hook(self, k: int, vocab_size: int, temperatures: tuple[float, ...]) -> None:
        """From now on requests may name rows."""
        hook = SpanHook(RowScorer(k, vocab_size, tuple(temperatures)))
        install = _install_v2 if self.logitlake_runner() == "v2" else _install_v1
        install(self.model_runner, hook)


def _install_v1(runner: Any, hook: SpanHook) -> None:
    """vllm/v1/worker/gpu_model_runner.py: prompt logprobs are made after sampling, outputs in `sample_tokens`."""
    prompt_logprobs, sample_tokens = runner._get_prompt_logprobs_dict, runner.sample_tokens
    finished: dict[str, torch.Tensor] = {}

    def with_rows(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        slices = list(_slices_v1(runner, hook, num_scheduled_tokens))
        rows = hook.step(slices, hidden_states, runner.model.compute_logits)
        finished.update({request_id: packed_RW.cpu() for request_id, packed_RW in rows.items()})
        return prompt_logprobs(hidden_states, num_scheduled_tokens)

    def with_rows_in_output(*arguments: Any, **options: Any) -> Any:
        output = sample_tokens(*arguments, **options)
        if finished:
            # Under asynchronous scheduling the output comes wrapped.
            inner = getattr(output, "_model_runner_output", output)
            inner.prompt_token_id_logprobs_dict = dict(finished)
            finished.clear()
        return output

    runner._get_prompt_logprobs_dict = with_rows
    runner.sample_tokens = with_rows_in_output


def _slices_v1(runner: Any, hook: SpanHook, num_scheduled_tokens: dict[str, int]) -> Iterable[PromptSlice]:
    """The prompts of this step; `num_computed_tokens` still counts what was there before it."""
    for request_id, num_tokens in num_scheduled_tokens.items():
        request = runner.requests[request_id]
        start, prompt_length = request.num_computed_tokens, len(request.prompt_token_ids)
        if start >= prompt_length:
            continue
        if start == 0:
            hook.add(request_id, request.sampling_params.extra_args)
        stop = start + num_tokens
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
        yield PromptSlice(request_id, start, stop, offset, stop >= prompt_length)


def _install_v2(runner: Any, hook: SpanHook) -> None:
    """vllm/v1/worker/gpu/: a worker object of its own makes prompt logprobs; ours stands in front of it."""
    runner.prompt_logprobs_worker = SpanWorkerV2(runner.prompt_logprobs_worker, hook)


class SpanWorkerV2:
    """Has the interface of vLLM's `PromptLogprobsWorker`; what it does not do itself is done by the one it wraps."""

    def __init__(self, wrapped: Any, hook: SpanHook) -> None:
        self._wrapped = wrapped
        self._hook = hook

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        """A request, new or resumed after preemption."""
        self._wrapped.add_request(req_id, req_idx, sampling_params)
        self._hook.add(req_id, sampling_params.extra_args)

    def remove_request(self, req_id: str) -> None:
        """A request that ended or was preempted."""
        self._wrapped.remove_request(req_id)
        self._hook.remove(req_id)

    def compute_prompt_logprobs(self, *arguments: Any, **options: Any) -> Any:
        """As it was."""
        return self._wrapped.compute_prompt_logprobs(*arguments, **options)

    def compute_prompt_token_id_logprobs(
        self, logits_fn: ComputeLogits, hidden_states: torch.Tensor, input_batch: Any, prompt_lens: NDArray[np.int32]
    ) -> dict[str, torch.Tensor]:
        """Scores of fixed ids as they were, and the packed rows of requests that named some."""
        slices = []
        for i, request_id in enumerate(input_batch.req_ids):
            start = int(input_batch.num_computed_prefill_tokens_np[i])
            stop = start + int(input_batch.num_scheduled_tokens[i])
            prompt_length = int(prompt_lens[input_batch.idx_mapping_np[i]])
            if start < prompt_length:
                offset = int(input_batch.query_start_loc_np[i])
                slices.append(PromptSlice(request_id, start, stop, offset, stop >= prompt_length))
        scores: dict[str, torch.Tensor] = self._wrapped.compute_prompt_token_id_logprobs(
            logits_fn, hidden_states, input_batch, prompt_lens
        )
        return scores | self._hook.step(slices, hidden_states, logits_fn)
