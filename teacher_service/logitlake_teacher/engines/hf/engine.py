"""The engine `hf`: requests to batches, rows to answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
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
    fit_request,
)
from logitlake_teacher.engines.checkpoint import read_checkpoint
from logitlake_teacher.engines.hf.model import TeacherModel, TeacherSequence
from logitlake_teacher.engines.hf.rows import drawn_rows, rows_at_once, top_rows
from logitlake_teacher.engines.identity import identify_engine

__all__ = ["HfEngine"]

ImageInputs = dict[str, NDArray[Any]]


class HfEngine:
    """Implements `logitlake_teacher.engines.base.Engine`."""

    def __init__(self, config: HfEngineConfig, setup: EngineSetup) -> None:
        torch.set_num_threads(setup.num_threads)
        checkpoint = read_checkpoint(setup.model_dir)
        if setup.k > setup.vocab_size:
            raise EngineError(
                f"{setup.model_dir}: asked for {setup.k} entries a token, the vocabulary has {setup.vocab_size}; "
                f"set codec.k_max to at most {setup.vocab_size}"
            )
        self._config = config
        self._setup = setup
        self._context_length = min(config.context_length or checkpoint.context_length, checkpoint.context_length)
        self._count_image_tokens = checkpoint.num_image_tokens
        self._model: TeacherModel | None = TeacherModel(config, setup, checkpoint.sees_images)
        self._load_pixels = load_pixels(setup.model_dir) if checkpoint.sees_images else None

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredSample | SampleProblem]:
        """See `Engine.score`."""
        answers: list[ScoredSample | SampleProblem | None] = [None] * len(requests)
        images: dict[str, ImageInputs] = {}
        sequences: list[TeacherSequence] = []
        for index, request in enumerate(requests):
            prepared = self._prepare(index, request, images)
            if isinstance(prepared, SampleProblem):
                answers[index] = prepared
            else:
                sequences.append(prepared)
        for batch in self._batches(sequences):
            for sequence, rows in zip(batch, self._score_batch(batch), strict=True):
                answers[sequence.index] = ScoredSample(sequence.request.sample_id, rows, len(sequence.ids_S))
        return [answer for answer in answers if answer is not None]

    def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> list[list[Generation] | SampleProblem]:
        """See `Engine.generate`. Requests go one by one, so that no neighbour can move a draw."""
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

    def _open_model(self) -> TeacherModel:
        if self._model is None:
            raise EngineError(f"{self._setup.model_dir}: the engine was closed; make another one")
        return self._model

    def _prepare(
        self, index: int, request: ScoreRequest, images: dict[str, ImageInputs], room: int = 0
    ) -> TeacherSequence | SampleProblem:
        """`images` remembers what was made of each picture: the samples of a unit share theirs."""
        if request.images and self._load_pixels is None:
            raise EngineError(f"{self._setup.model_dir}: the teacher reads text only, but a sample holds an image")
        fitted = fit_request(request, self._setup.image_token_id, self._count_image_tokens, self._context_length, room)
        if isinstance(fitted, SampleProblem):
            return fitted
        own = {image.image_sha256: self._inputs_of(image, images) for image in request.images}
        return TeacherSequence(index, request, fitted.ids_S, predicting_rows(fitted.is_response_S), own)

    def _inputs_of(self, image: DecodedImage, images: dict[str, ImageInputs]) -> ImageInputs:
        if image.image_sha256 not in images:
            assert self._load_pixels is not None
            images[image.image_sha256] = self._load_pixels.model_inputs(image.as_pil())
        return images[image.image_sha256]

    def _batches(self, sequences: list[TeacherSequence]) -> Iterator[list[TeacherSequence]]:
        """Sequences of similar length, at most `batch_tokens` positions a batch; the same every time."""
        packs = self._config.batching == "packed"
        batch: list[TeacherSequence] = []
        used = 0
        for sequence in sorted(sequences, key=lambda item: (len(item.ids_S), item.index)):
            # Ascending order: where rows are padded, the newcomer is the longest and sets their length.
            length = len(sequence.ids_S)
            if batch and (used + length if packs else (len(batch) + 1) * length) > self._config.batch_tokens:
                yield batch
                batch, used = [], 0
            batch.append(sequence)
            used += length
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(self, batch: list[TeacherSequence]) -> Sequence[TeacherRows | DrawnRows]:
        model, sampled = self._open_model(), self._setup.sampled
        hidden_RH = model.response_states(batch)
        label_ids_R = np.concatenate([item.request.response_ids for item in batch])
        lengths = [len(item.rows_R) for item in batch]
        if sampled is None:
            k, temperatures = self._setup.k, self._setup.temperatures
            return self._in_chunks(
                hidden_RH, lengths, lambda logits_RV, chunk: top_rows(logits_RV, label_ids_R[chunk], k, temperatures)
            )
        uniforms_RN = np.concatenate([uniforms(sampled, item.request.sample_id, len(item.rows_R)) for item in batch])
        return self._in_chunks(
            hidden_RH, lengths, lambda logits_RV, chunk: drawn_rows(logits_RV, label_ids_R[chunk], uniforms_RN[chunk])
        )

    def _in_chunks(
        self, hidden_RH: torch.Tensor, lengths: list[int], rows_of: Callable[[torch.Tensor, slice], Rows]
    ) -> list[Rows]:
        """The rows of each sequence; the lm_head sees as many at once as fit its chunk."""
        model = self._open_model()
        at_once = rows_at_once(model.head_size, model.device, drawn=self._setup.sampled is not None)
        chunks = [slice(start, start + at_once) for start in range(0, max(len(hidden_RH), 1), at_once)]
        return _split_rows([rows_of(model.logits(hidden_RH[chunk]), chunk) for chunk in chunks], lengths)

    @torch.inference_mode()
    def _generate_one(self, sequence: TeacherSequence, sampling: Sampling) -> list[Generation]:
        """What the teacher says of a candidate comes from scoring it: the same rows as for a given response."""
        responses = self._open_model().candidates(sequence, sampling)
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


def _split_rows(parts: list[Rows], lengths: list[int]) -> list[Rows]:
    """The rows of a batch, cut from chunks of the lm_head back into samples."""
    rows, cuts = concatenate(parts), np.cumsum(lengths)[:-1]
    columns = [[None] * len(lengths) if column is None else np.split(column, cuts) for column in vars(rows).values()]
    return [type(rows)(*own) for own in zip(*columns, strict=True)]
