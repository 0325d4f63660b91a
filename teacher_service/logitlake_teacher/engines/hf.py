"""The transformers teacher: exact, slow enough to be trusted, the measure of the other engines.

One forward pass to the last hidden states, then only the response rows go through the lm_head, `_CHUNK_ROWS` at a
time, in float32: no `[sequence, vocabulary]` tensor lives. The tail mass is the logsumexp of what the top-k left
out, never one minus a sum. Because the head is applied by hand, a check at start compares it with the model's own
logits, so that a model with soft-capping or logit scaling is refused instead of being captured wrong.

Axes: B batch, S sequence, R response rows, H hidden, V vocabulary, K captured entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from logitlake_schemas.records import EngineIdentity
from logitlake_shared.alignment import predicting_rows
from logitlake_shared.draws import uniforms
from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage
from logitlake_shared.pixels import load_pixels
from logitlake_shared.topk import DrawnRows, Rows, TeacherRows, concatenate
from logitlake_teacher.config import HfEngineConfig
from logitlake_teacher.engines.base import (
    EngineSetup,
    Generation,
    SampleProblem,
    Sampling,
    ScoredSample,
    ScoreRequest,
    agree_label_ranks,
    fit_request,
    seed_of,
)
from logitlake_teacher.engines.checkpoint import read_checkpoint
from logitlake_teacher.engines.identity import identify_engine

__all__ = ["HfEngine"]

# Rows through the lm_head at once: 512 rows of a 152k vocabulary are 0.3 GiB in float32.
_CHUNK_ROWS = 512
# Draws need the whole distribution in float64 as well.
_DRAWN_CHUNK_ROWS = 128
# The model's own logits and ours come from the same weights; only the order of a dot product can differ.
_HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Sequence:
    """A request as the teacher sees it."""

    index: int
    request: ScoreRequest
    ids_S: NDArray[np.int64]
    rows_R: NDArray[np.int64]
    pixels_NCHW: NDArray[np.float32] | None


class HfEngine:
    """Implements `logitlake_teacher.engines.base.Engine`."""

    def __init__(self, config: HfEngineConfig, setup: EngineSetup) -> None:
        torch.set_num_threads(setup.num_threads)
        checkpoint = read_checkpoint(setup.model_dir)
        self._config = config
        self._setup = setup
        self._context_length = min(config.context_length or checkpoint.context_length, checkpoint.context_length)
        self._num_image_tokens = checkpoint.num_image_tokens
        self._device = _device(config)
        self._model = _load_model(setup, checkpoint.sees_images, config, self._device)
        self._head = self._model.get_output_embeddings()
        head_vocab = int(self._head.weight.shape[0])
        if setup.vocab_size > head_vocab:
            raise EngineError(
                f"{setup.model_dir}: the tokenizer has {setup.vocab_size} tokens, the lm_head only {head_vocab} rows; "
                "tokenizer and checkpoint do not belong together"
            )
        if setup.k > setup.vocab_size:
            raise EngineError(
                f"{setup.model_dir}: asked for {setup.k} entries a token, the vocabulary has {setup.vocab_size}; "
                f"set codec.k_max to at most {setup.vocab_size}"
            )
        self._load_pixels = load_pixels(setup.model_dir) if checkpoint.sees_images else None
        self._check_head()

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredSample | SampleProblem]:
        """See `Engine.score`."""
        answers: list[ScoredSample | SampleProblem | None] = [None] * len(requests)
        pixels: dict[str, NDArray[np.float32]] = {}
        sequences: list[_Sequence] = []
        for index, request in enumerate(requests):
            prepared = self._prepare(index, request, pixels)
            if isinstance(prepared, SampleProblem):
                answers[index] = prepared
            else:
                sequences.append(prepared)
        for batch in self._batches(sequences):
            for sequence, rows in zip(batch, self._score_batch(batch), strict=True):
                answers[sequence.index] = ScoredSample(sequence.request.sample_id, rows, len(sequence.ids_S))
        return [answer for answer in answers if answer is not None]

    def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> list[list[Generation] | SampleProblem]:
        """See `Engine.generate`. Requests go one by one, so that no padding can move a draw."""
        answers: list[list[Generation] | SampleProblem] = []
        for index, request in enumerate(requests):
            prepared = self._prepare(index, request, {}, room=sampling.max_new_tokens)
            answers.append(prepared if isinstance(prepared, SampleProblem) else self._generate_one(prepared, sampling))
        return answers

    def describe(self) -> EngineIdentity:
        """See `Engine.describe`."""
        return identify_engine(self._config, self._setup)

    def close(self) -> None:
        """Frees the weights."""
        self._model = None
        self._head = None

    def _prepare(
        self, index: int, request: ScoreRequest, pixels: dict[str, NDArray[np.float32]], room: int = 0
    ) -> "_Sequence | SampleProblem":
        expanded = fit_request(request, self._setup.image_token_id, self._num_image_tokens, self._context_length, room)
        if isinstance(expanded, SampleProblem):
            return expanded
        for image in request.images:
            if image.image_sha256 not in pixels:
                pixels[image.image_sha256] = self._pixels_of(image)
        pixels_NCHW = (
            np.concatenate([pixels[image.image_sha256] for image in request.images]) if request.images else None
        )
        return _Sequence(index, request, expanded.ids_S, predicting_rows(expanded.is_response_S), pixels_NCHW)

    def _pixels_of(self, image: DecodedImage) -> NDArray[np.float32]:
        if self._load_pixels is None:
            raise EngineError(f"{self._setup.model_dir}: the teacher reads text only, but a sample holds an image")
        return self._load_pixels.model_inputs(image.as_pil())["pixel_values"]

    def _batches(self, sequences: list[_Sequence]) -> Iterator[list[_Sequence]]:
        """Sequences of similar length, at most `batch_tokens` padded positions a batch; the same every time."""
        batch: list[_Sequence] = []
        for sequence in sorted(sequences, key=lambda item: (len(item.ids_S), item.index)):
            # Ascending order: the newcomer is the longest and sets the padded length.
            if batch and (len(batch) + 1) * len(sequence.ids_S) > self._config.batch_tokens:
                yield batch
                batch = []
            batch.append(sequence)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(self, batch: list[_Sequence]) -> Sequence[TeacherRows | DrawnRows]:
        hidden_BSH = self._hidden(batch)
        hidden_RH = torch.cat(
            [hidden_BSH[b, torch.from_numpy(item.rows_R).to(self._device)] for b, item in enumerate(batch)]
        )
        label_ids_R = np.concatenate([item.request.response_ids for item in batch])
        lengths = [len(item.rows_R) for item in batch]
        sampled = self._setup.sampled
        if sampled is None:
            return _split_rows(
                [
                    self._rows_of(hidden_RH[start : start + _CHUNK_ROWS], label_ids_R[start : start + _CHUNK_ROWS])
                    for start in range(0, len(label_ids_R), _CHUNK_ROWS)
                ],
                lengths,
            )
        uniforms_RN = np.concatenate([uniforms(sampled, item.request.sample_id, len(item.rows_R)) for item in batch])
        return _split_rows(
            [
                self._draws_of(hidden_RH[chunk], label_ids_R[chunk], uniforms_RN[chunk])
                for start in range(0, len(label_ids_R), _DRAWN_CHUNK_ROWS)
                for chunk in (slice(start, start + _DRAWN_CHUNK_ROWS),)
            ],
            lengths,
        )

    def _hidden(self, batch: list[_Sequence]) -> torch.Tensor:
        """Last hidden states `[B, S, H]`; right padding changes nothing before it under a causal mask."""
        longest = max(len(item.ids_S) for item in batch)
        ids_BS = torch.zeros((len(batch), longest), dtype=torch.long)
        mask_BS = torch.zeros((len(batch), longest), dtype=torch.long)
        for b, item in enumerate(batch):
            ids_BS[b, : len(item.ids_S)] = torch.from_numpy(item.ids_S)
            mask_BS[b, : len(item.ids_S)] = 1
        inputs: dict[str, Any] = {"input_ids": ids_BS.to(self._device), "attention_mask": mask_BS.to(self._device)}
        images = [item.pixels_NCHW for item in batch if item.pixels_NCHW is not None]
        if images:
            inputs["pixel_values"] = torch.from_numpy(np.concatenate(images)).to(self._device, self._model.dtype)
        hidden: torch.Tensor = self._model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden

    def _rows_of(self, hidden_RH: torch.Tensor, label_ids_R: NDArray[np.int32]) -> TeacherRows:
        k, vocab_size = self._setup.k, self._setup.vocab_size
        logits_RV = self._head(hidden_RH)[:, :vocab_size].float()
        logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
        labels_R = torch.from_numpy(label_ids_R.astype(np.int64)).to(self._device)
        topk_logprobs_RK, topk_ids_RK = logprobs_RV.topk(k, dim=-1)
        label_logprob_R = logprobs_RV.gather(1, labels_R[:, None])[:, 0]
        rank_R = (logprobs_RV > label_logprob_R[:, None]).sum(dim=1) + 1
        # The top-k is struck out and the rest summed: exact however small the tail is, -inf where nothing is left.
        log_tail_mass_R = logprobs_RV.scatter(1, topk_ids_RK, -torch.inf).logsumexp(dim=1)
        topk_ids = topk_ids_RK.to(torch.int32).cpu().numpy()
        return TeacherRows(
            topk_ids_TK=topk_ids,
            topk_logprobs_TK=topk_logprobs_RK.cpu().numpy(),
            label_logprob_T=label_logprob_R.cpu().numpy(),
            label_rank_T=agree_label_ranks(topk_ids, label_ids_R, rank_R.to(torch.int32).cpu().numpy()),
            log_tail_mass_T=log_tail_mass_R.cpu().numpy(),
        )

    def _draws_of(
        self, hidden_RH: torch.Tensor, label_ids_R: NDArray[np.int32], uniforms_RN: NDArray[np.float64]
    ) -> DrawnRows:
        logits_RV = self._head(hidden_RH)[:, : self._setup.vocab_size].float()
        logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
        labels_R = torch.from_numpy(label_ids_R.astype(np.int64)).to(self._device)
        label_logprob_R = logprobs_RV.gather(1, labels_R[:, None])[:, 0]
        # In float64: the cumulated sum of 150,000 float32 would lose the improbable tokens that drawing is for.
        cumulated_RV = logprobs_RV.double().exp().cumsum(dim=1)
        cumulated_RV /= cumulated_RV[:, -1:].clone()
        drawn_RN = torch.searchsorted(cumulated_RV, torch.from_numpy(uniforms_RN).to(self._device), right=True)
        return DrawnRows(
            drawn_ids_TN=drawn_RN.to(torch.int32).cpu().numpy(),
            label_logprob_T=label_logprob_R.cpu().numpy(),
            label_rank_T=((logprobs_RV > label_logprob_R[:, None]).sum(dim=1) + 1).to(torch.int32).cpu().numpy(),
            entropy_T=-(logprobs_RV.exp() * logprobs_RV).sum(dim=1).cpu().numpy(),
        )

    @torch.inference_mode()
    def _generate_one(self, sequence: _Sequence, sampling: Sampling) -> list[Generation]:
        """Candidates of one request, drawn from a generator of its own.

        What the teacher says of a candidate comes from scoring it: the same rows as for a given response.
        """
        torch.manual_seed(seed_of(sampling, sequence.request))
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(sequence.ids_S)[None].to(self._device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if sequence.pixels_NCHW is not None:
            inputs["pixel_values"] = torch.from_numpy(sequence.pixels_NCHW).to(self._device, self._model.dtype)
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
        ids_NS = self._model.generate(
            **inputs,
            **(drawn if sampling.temperature > 0 else {"do_sample": False}),
            num_return_sequences=sampling.n,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._setup.eos_id,
            pad_token_id=self._setup.eos_id,
            suppress_tokens=self._no_tokens(),
        )
        responses = [_cut_at_eos(row, self._setup.eos_id) for row in ids_NS[:, len(sequence.ids_S) :].cpu().numpy()]
        answers = self.score(
            [
                replace(sequence.request, response_ids=ids, response_lengths=np.array([len(ids)], np.int32))
                for ids in responses
            ]
        )
        candidates = []
        for ids, answer in zip(responses, answers, strict=True):
            assert isinstance(answer, ScoredSample)
            assert isinstance(answer.rows, TeacherRows)
            reason: Literal["stop", "length"] = "stop" if ids[-1] == self._setup.eos_id else "length"
            candidates.append(Generation(ids, reason, answer.rows, answer.expanded_length))
        return candidates

    def _no_tokens(self) -> list[int] | None:
        """Slots of a padded lm_head, which must never be drawn."""
        padded = range(self._setup.vocab_size, int(self._head.weight.shape[0]))
        return list(padded) or None

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuses a model whose logits are not lm_head(last hidden state)."""
        ids_BS = torch.arange(min(4, self._setup.vocab_size), device=self._device)[None]
        if self._setup.image_token_id is not None:
            ids_BS = ids_BS.masked_fill(ids_BS == self._setup.image_token_id, self._setup.eos_id)
        own = self._model(input_ids=ids_BS, use_cache=False).logits.float()
        ours = self._head(self._model.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state).float()
        difference = float((own - ours).abs().max())
        if not difference <= _HEAD_TOLERANCE:
            raise EngineError(
                f"{self._setup.model_dir}: the model's logits differ from lm_head(hidden states) by {difference:.3g}, "
                f"expected at most {_HEAD_TOLERANCE}; models with soft-capped or scaled logits, or with non-finite "
                "weights, cannot be captured by the engine `hf`"
            )


def _device(config: HfEngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EngineError("engine.device is 'cuda', but torch sees no GPU; use 'cpu' or install a CUDA build of torch")
    return torch.device(config.device)


def _load_model(setup: EngineSetup, sees_images: bool, config: HfEngineConfig, device: torch.device) -> Any:
    # The command shows its own progress; a second bar for a second of loading only breaks it.
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForImageTextToText if sees_images else transformers.AutoModelForCausalLM
    try:
        model, loading = auto.from_pretrained(
            setup.model_dir, dtype=getattr(torch, config.dtype), local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineError(f"{setup.model_dir}: transformers cannot load the teacher: {error}") from error
    strays = {name: sorted(loading[name]) for name in ("missing_keys", "unexpected_keys") if loading[name]}
    if strays:
        raise EngineError(
            f"{setup.model_dir}: the checkpoint does not fit its config: {strays}; transformers would fill in random "
            "weights, so nothing was captured"
        )
    return model.to(device).eval()


def _split_rows(parts: list[Rows], lengths: list[int]) -> list[Rows]:
    """The rows of a batch, cut from chunks of the lm_head back into samples."""
    rows, cuts = concatenate(parts), np.cumsum(lengths)[:-1]
    columns = [[None] * len(lengths) if column is None else np.split(column, cuts) for column in vars(rows).values()]
    return [type(rows)(*own) for own in zip(*columns, strict=True)]


def _cut_at_eos(ids: NDArray[np.int64], eos_id: int) -> NDArray[np.int32]:
    ends = np.flatnonzero(ids == eos_id)
    return ids[: ends[0] + 1 if len(ends) else None].astype(np.int32)
