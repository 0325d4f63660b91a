"""The engine `fake`: all samples of a call are scored in a few numpy operations."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from logitlake_schemas.records import EngineIdentity
from logitlake_shared.draws import uniforms
from logitlake_shared.errors import EngineError
from logitlake_shared.topk import DrawnRows, TeacherRows
from logitlake_teacher.config import FakeEngineConfig
from logitlake_teacher.engines.base import (
    EngineSetup,
    Generation,
    SampleProblem,
    Sampling,
    ScoredSample,
    ScoreRequest,
    expand_request,
    fit_request,
    seed_of,
)
from logitlake_teacher.engines.fake.faults import Faults, wrong_rows
from logitlake_teacher.engines.fake.prefixes import LaidOut, UInt64, lay_out, prefix_hashes
from logitlake_teacher.engines.fake.truth import FakeTruth
from logitlake_teacher.engines.identity import identify_engine

__all__ = ["FakeEngine"]


class FakeEngine:
    """Implements `logitlake_teacher.engines.base.Engine`.

    Each distribution is a pure function of the seed, the images and the ids before the position, so batches, order and
    processes cannot change a bit of it.
    """

    def __init__(self, config: FakeEngineConfig, setup: EngineSetup) -> None:
        self._faults = Faults(config)
        if setup.k > setup.vocab_size:
            raise EngineError(
                f"the fake teacher is asked for {setup.k} entries a token, its vocabulary has {setup.vocab_size}; "
                f"set codec.k_max to at most {setup.vocab_size}"
            )
        self._config = config
        self._setup = setup
        self._truth = FakeTruth(setup.vocab_size, config.sharpness, setup.eos_id, config.mean_response)

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredSample | SampleProblem]:
        """See `Engine.score`."""
        self._faults.meet([request.sample_id for request in requests])
        laid = lay_out(requests)
        problems = self._problems(laid, requests, room=0)
        if problems:
            sound = [request for index, request in enumerate(requests) if index not in problems]
            scored = iter(self._score_all(lay_out(sound), sound))
        else:
            scored = iter(self._score_all(laid, requests))
        answers = [problems[index] if index in problems else next(scored) for index in range(len(requests))]
        return [self._answered(answer) for answer in answers] if self._config.wrong else answers

    def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> list[list[Generation] | SampleProblem]:
        """See `Engine.generate`. Candidates are drawn from the fake truth."""
        self._faults.meet([request.sample_id for request in requests])
        problems = self._problems(lay_out(requests), requests, room=sampling.max_new_tokens)
        return [
            problems[index] if index in problems else self._candidates(request, sampling)
            for index, request in enumerate(requests)
        ]

    def describe(self) -> EngineIdentity:
        """See `Engine.describe`. Faults are not part of it: they change no number."""
        return identify_engine(self._config, self._setup)

    def close(self) -> None:
        """Nothing is held."""

    def truth(self, request: ScoreRequest) -> NDArray[np.float64]:
        """`logprobs_TV` float64: the whole distribution for each response token of the request."""
        laid = lay_out([request])
        return _log_softmax(self._truth.logits(self._hashes(laid, [request])[laid.is_response_S]))

    def _hashes(self, laid: LaidOut, requests: Sequence[ScoreRequest]) -> UInt64:
        return prefix_hashes(laid, requests, self._setup.image_token_id, self._config.seed)

    def _problems(self, laid: LaidOut, requests: Sequence[ScoreRequest], room: int) -> dict[int, SampleProblem]:
        """By place in the call: requests that cannot be answered."""
        is_image_S = laid.ids_S == (-1 if self._setup.image_token_id is None else self._setup.image_token_id)
        counts = np.diff(np.append(0, np.cumsum(is_image_S))[laid.starts])
        misplaced = np.diff(np.append(0, np.cumsum(is_image_S & laid.is_response_S))[laid.starts])
        num_images = np.array([len(request.images) for request in requests], np.int64)
        lengths = np.diff(laid.starts) + num_images * (self._config.tokens_per_image - 1)
        suspects = (counts != num_images) | (misplaced > 0) | (lengths + room > self._config.context_length)
        problems = {}
        for index in np.flatnonzero(suspects).tolist():
            fitted = fit_request(
                requests[index],
                self._setup.image_token_id,
                lambda _width, _height: self._config.tokens_per_image,
                self._config.context_length,
                room,
            )
            if isinstance(fitted, SampleProblem):
                problems[index] = fitted
        return problems

    def _score_all(self, laid: LaidOut, requests: Sequence[ScoreRequest]) -> list[ScoredSample]:
        hash_T = self._hashes(laid, requests)[laid.is_response_S]
        label_ids_T = laid.ids_S[laid.is_response_S]
        ends = np.cumsum([len(request.response_ids) for request in requests]).tolist()
        rows: list[TeacherRows] | list[DrawnRows]
        if self._setup.sampled is None:
            rows = _cut(self._truth.rows(hash_T, label_ids_T, self._setup.k, self._setup.temperatures), ends)
        else:
            rows = self._drawn(requests, hash_T, label_ids_T, ends)
        more_tokens = self._config.tokens_per_image - 1
        lengths = np.diff(laid.starts).tolist()
        return [
            ScoredSample(requests[n].sample_id, rows[n], lengths[n] + more_tokens * len(requests[n].images))
            for n in range(len(requests))
        ]

    def _drawn(
        self, requests: Sequence[ScoreRequest], hash_T: UInt64, label_ids_T: NDArray[np.int64], ends: list[int]
    ) -> list[DrawnRows]:
        assert self._setup.sampled is not None
        drawn, start = [], 0
        for request, end in zip(requests, ends, strict=True):
            uniforms_TN = uniforms(self._setup.sampled, request.sample_id, end - start)
            logprobs_TV = _log_softmax(self._truth.logits(hash_T[start:end]))
            drawn.append(_drawn_rows(logprobs_TV, label_ids_T[start:end], uniforms_TN))
            start = end
        return drawn

    def _answered(self, answer: ScoredSample | SampleProblem) -> ScoredSample | SampleProblem:
        wrong = self._config.wrong.get(answer.sample_id)
        if wrong is None or not isinstance(answer, ScoredSample) or not isinstance(answer.rows, TeacherRows):
            return answer
        return replace(answer, rows=wrong_rows(answer.rows, wrong, self._setup.vocab_size))

    def _candidates(self, request: ScoreRequest, sampling: Sampling) -> list[Generation]:
        seed = seed_of(sampling, request)
        texts = [self._continue(request, sampling, np.random.default_rng([seed, n])) for n in range(sampling.n)]
        lengths = [len(ids) for ids in texts]
        answered = [
            replace(request, response_ids=ids, response_lengths=np.array([length], np.int32))
            for ids, length in zip(texts, lengths, strict=True)
        ]
        laid = lay_out(answered)
        hash_T = self._hashes(laid, answered)[laid.is_response_S]
        rows = self._truth.rows(hash_T, np.concatenate(texts).astype(np.int64), self._setup.k, self._setup.temperatures)
        ids_S, _ = self._expand(request)
        return [
            Generation(ids, "stop" if ids[-1] == self._setup.eos_id else "length", own, len(ids_S) + len(ids))
            for ids, own in zip(texts, _cut(rows, np.cumsum(lengths).tolist()), strict=True)
        ]

    def _expand(self, request: ScoreRequest) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        counts = [self._config.tokens_per_image] * len(request.images)
        return expand_request(request, self._setup.image_token_id, counts)

    def _continue(self, request: ScoreRequest, sampling: Sampling, draw: np.random.Generator) -> NDArray[np.int32]:
        """One response, token by token."""
        ids: list[int] = []
        while len(ids) < sampling.max_new_tokens and (not ids or ids[-1] != self._setup.eos_id):
            # The token to come is the last of a response whose own value nothing before it depends on.
            so_far = np.array([*ids, 0], np.int32)
            asked = replace(request, response_ids=so_far, response_lengths=np.array([len(so_far)], np.int32))
            hash_S = self._hashes(lay_out([asked]), [asked])
            logits_V = self._truth.logits(hash_S[-1:])[0]
            if self._setup.image_token_id is not None:
                # A response cannot hold an image.
                logits_V[self._setup.image_token_id] = -np.inf
            ids.append(_draw(logits_V, sampling, draw))
        return np.array(ids, np.int32)


def _cut(rows: TeacherRows, ends: list[int]) -> list[TeacherRows]:
    """The rows of each sample; views, no copies."""
    cut, start = [], 0
    tails_TX = rows.log_tail_mass_TX
    for end in ends:
        own = slice(start, end)
        cut.append(
            TeacherRows(
                rows.topk_ids_TK[own],
                rows.topk_logprobs_TK[own],
                rows.label_logprob_T[own],
                rows.label_rank_T[own],
                rows.log_tail_mass_T[own],
                None if tails_TX is None else tails_TX[own],
            )
        )
        start = end
    return cut


def _draw(logits_V: NDArray[np.float64], sampling: Sampling, draw: np.random.Generator) -> int:
    """One token, by inversion over the nucleus: the fewest tokens whose probability reaches `top_p`."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    p_V = np.exp(_log_softmax(logits_V / sampling.temperature))
    order_V = np.argsort(-p_V, kind="stable")
    cumulated_V = np.cumsum(p_V[order_V])
    nucleus = int(np.searchsorted(cumulated_V, sampling.top_p)) + 1
    mass = cumulated_V[min(nucleus, len(order_V)) - 1]
    return int(order_V[min(int(np.searchsorted(cumulated_V, draw.random() * mass, side="right")), nucleus - 1)])


def _drawn_rows(
    logprobs_TV: NDArray[np.float64], label_ids_T: NDArray[np.int64], uniforms_TN: NDArray[np.float64]
) -> DrawnRows:
    """Draws from full distributions, and what is known of the labels."""
    p_TV = np.exp(logprobs_TV)
    cumulated_TV = np.cumsum(p_TV, axis=1)
    cumulated_TV /= cumulated_TV[:, -1:]
    drawn_TN = np.empty(uniforms_TN.shape, np.int32)
    for t, (row_V, row_N) in enumerate(zip(cumulated_TV, uniforms_TN, strict=True)):
        drawn_TN[t] = np.searchsorted(row_V, row_N, side="right")
    label_logprob_T = logprobs_TV[np.arange(len(label_ids_T)), label_ids_T]
    return DrawnRows(
        drawn_ids_TN=drawn_TN,
        label_logprob_T=label_logprob_T.astype(np.float32),
        label_rank_T=(logprobs_TV > label_logprob_T[:, None]).sum(axis=1).astype(np.int32) + 1,
        entropy_T=-(p_TV * logprobs_TV).sum(axis=1).astype(np.float32),
    )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis."""
    logprobs: NDArray[np.float64] = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logprobs
