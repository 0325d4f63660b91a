"""A teacher without weights: its distribution over the vocabulary is a hash of what came before.

For tests, dry runs and load trials of everything around an engine. Each distribution is a pure function of the seed,
the images and the ids before the position, so batches, order and processes cannot change a bit of it, and the whole
truth over the vocabulary is there for laws to be tested against. It can also be told to misbehave, in the ways
that real teachers do.
"""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

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
    agree_label_ranks,
    expand_request,
    seed_of,
    too_long_problem,
)
from logitlake_teacher.engines.identity import FAKE_VERSION, identify_engine

__all__ = ["FakeEngine"]


class FakeEngine:
    """Implements `logitlake_teacher.engines.base.Engine`."""

    def __init__(self, config: FakeEngineConfig, setup: EngineSetup) -> None:
        if config.die_at_start:
            os._exit(1)
        if setup.k > setup.vocab_size:
            raise EngineError(
                f"the fake teacher is asked for {setup.k} entries a token, its vocabulary has {setup.vocab_size}; "
                f"set codec.k_max to at most {setup.vocab_size}"
            )
        self._config = config
        self._setup = setup
        self._num_calls = 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredSample | SampleProblem]:
        """See `Engine.score`."""
        self._count_call()
        return [self._score_one(request) for request in requests]

    def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> list[list[Generation] | SampleProblem]:
        """See `Engine.generate`. Candidates are drawn from the fake truth."""
        self._count_call()
        return [self._generate_one(request, sampling) for request in requests]

    def describe(self) -> EngineIdentity:
        """See `Engine.describe`. Faults are not part of it: they change no number."""
        return identify_engine(self._config, self._setup)

    def close(self) -> None:
        """Nothing is held."""

    def truth(self, request: ScoreRequest) -> NDArray[np.float64]:
        """`logprobs_TV` float64: the whole distribution for each response token of the request."""
        return np.stack([_log_softmax(logits_V) for logits_V in self._logits(request)])

    def _count_call(self) -> None:
        if self._config.die_after_calls is not None and self._num_calls >= self._config.die_after_calls:
            os.kill(os.getpid(), signal.SIGKILL)
        self._num_calls += 1

    def _misbehave(self, sample_id: str) -> None:
        config = self._config
        if sample_id in config.die_on:
            os._exit(1)
        if sample_id in config.hang_on:
            threading.Event().wait()
        if sample_id in config.raise_on:
            raise EngineError(f"the fake teacher was told to fail on sample {sample_id!r}")

    def _score_one(self, request: ScoreRequest) -> ScoredSample | SampleProblem:
        config = self._config
        self._misbehave(request.sample_id)
        ids_S, _ = self._expand(request)
        if len(ids_S) > config.context_length:
            return too_long_problem(request.sample_id, len(ids_S), config.context_length)
        logprobs_TV = self.truth(request)
        rows = self._rows(request, logprobs_TV)
        if request.sample_id in config.nan_on:
            rows.label_logprob_T[0] = np.nan
        return ScoredSample(request.sample_id, rows, len(ids_S))

    def _expand(self, request: ScoreRequest) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        counts = [self._config.tokens_per_image] * len(request.images)
        return expand_request(request, self._setup.image_token_id, counts)

    def _rows(self, request: ScoreRequest, logprobs_TV: NDArray[np.float64]) -> TeacherRows | DrawnRows:
        if self._setup.sampled is None:
            return self._top_rows(logprobs_TV, request.response_ids)
        uniforms_TN = uniforms(self._setup.sampled, request.sample_id, len(logprobs_TV))
        return _drawn_rows(logprobs_TV, request.response_ids, uniforms_TN)

    def _top_rows(self, logprobs_TV: NDArray[np.float64], label_ids_T: NDArray[np.int32]) -> TeacherRows:
        return _top_rows(logprobs_TV, label_ids_T, self._setup.k, self._setup.temperatures)

    def _prefix(self, request: ScoreRequest) -> "hashlib._Hash":
        """The hash of the seed and the images, to be continued by the ids."""
        prefix = hashlib.sha256(f"{FAKE_VERSION}:{self._config.seed}".encode())
        for image in request.images:
            prefix.update(bytes.fromhex(image.image_sha256))
        return prefix

    def _logits(self, request: ScoreRequest) -> Iterator[NDArray[np.float64]]:
        ids_S, is_response_S = expand_request(request, None, ())
        prefix = self._prefix(request)
        for token, is_response in zip(ids_S.tolist(), is_response_S.tolist(), strict=True):
            if is_response:
                yield self._logits_after(prefix)
            prefix.update(_token_bytes(token))

    def _logits_after(self, prefix: "hashlib._Hash") -> NDArray[np.float64]:
        draw = np.random.default_rng(int.from_bytes(prefix.digest()[:16], "little"))
        logits_V = draw.standard_normal(self._setup.vocab_size) * self._config.sharpness
        if self._config.mean_response is not None:
            # p(EOS) = 1 / mean at every token: lengths are geometric with that mean.
            logits_V[self._setup.eos_id] = -np.inf
            logits_V[self._setup.eos_id] = np.logaddexp.reduce(logits_V) - np.log(self._config.mean_response - 1)
        return logits_V

    def _generate_one(self, request: ScoreRequest, sampling: Sampling) -> list[Generation] | SampleProblem:
        self._misbehave(request.sample_id)
        ids_S, _ = self._expand(request)
        if len(ids_S) + sampling.max_new_tokens > self._config.context_length:
            length = len(ids_S) + sampling.max_new_tokens
            return too_long_problem(request.sample_id, length, self._config.context_length)
        prefix = self._prefix(request)
        for token in request.prompt_ids.tolist():
            prefix.update(_token_bytes(token))
        return [
            self._continue(
                prefix.copy(),
                sampling,
                np.random.default_rng([seed_of(sampling, request), index, *prefix.digest()[:8]]),
                len(ids_S),
            )
            for index in range(sampling.n)
        ]

    def _continue(
        self, prefix: "hashlib._Hash", sampling: Sampling, draw: np.random.Generator, prompt_length: int
    ) -> Generation:
        ids: list[int] = []
        truth: list[NDArray[np.float64]] = []
        while len(ids) < sampling.max_new_tokens and (not ids or ids[-1] != self._setup.eos_id):
            logits_V = self._logits_after(prefix)
            truth.append(_log_softmax(logits_V))
            ids.append(_draw(logits_V, sampling, draw))
            prefix.update(_token_bytes(ids[-1]))
        response_ids = np.array(ids, dtype=np.int32)
        return Generation(
            response_ids,
            "stop" if ids[-1] == self._setup.eos_id else "length",
            self._top_rows(np.stack(truth), response_ids),
            prompt_length + len(ids),
        )


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


def _top_rows(
    logprobs_TV: NDArray[np.float64], label_ids_T: NDArray[np.int32], k: int, temperatures: Sequence[float]
) -> TeacherRows:
    """The captured part of full distributions; equal logprobs are ordered by id."""
    order_TV = np.argsort(-logprobs_TV, axis=1, kind="stable")
    topk_ids_TK = order_TV[:, :k].astype(np.int32)
    label_logprob_T = logprobs_TV[np.arange(len(label_ids_T)), label_ids_T]
    rank_T = (logprobs_TV > label_logprob_T[:, None]).sum(axis=1).astype(np.int32) + 1
    sorted_TV = np.take_along_axis(logprobs_TV, order_TV, axis=1)
    log_tails = [_log_tail_mass(sorted_TV / temperature, k).astype(np.float32) for temperature in (1, *temperatures)]
    return TeacherRows(
        topk_ids_TK=topk_ids_TK,
        topk_logprobs_TK=sorted_TV[:, :k].astype(np.float32),
        label_logprob_T=label_logprob_T.astype(np.float32),
        label_rank_T=agree_label_ranks(topk_ids_TK, label_ids_T, rank_T),
        log_tail_mass_T=log_tails[0],
        log_tail_mass_TX=np.stack(log_tails[1:], axis=1) if temperatures else None,
    )


def _log_tail_mass(logits_TV: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """`log_tail_T`: log probability of all but the first `k`, -inf where that is none."""
    if k == logits_TV.shape[1]:
        return np.full(len(logits_TV), -np.inf)
    log_tail_T: NDArray[np.float64] = np.logaddexp.reduce(logits_TV[:, k:], axis=1) - np.logaddexp.reduce(
        logits_TV, axis=1
    )
    return log_tail_T


def _drawn_rows(
    logprobs_TV: NDArray[np.float64], label_ids_T: NDArray[np.int32], uniforms_TN: NDArray[np.float64]
) -> DrawnRows:
    """Draws from full distributions, and what is known of the labels."""
    p_TV = np.exp(logprobs_TV)
    cumulated_TV = np.cumsum(p_TV, axis=1)
    cumulated_TV /= cumulated_TV[:, -1:]
    drawn = [
        np.searchsorted(row_V, row_N, side="right") for row_V, row_N in zip(cumulated_TV, uniforms_TN, strict=True)
    ]
    label_logprob_T = logprobs_TV[np.arange(len(label_ids_T)), label_ids_T]
    return DrawnRows(
        drawn_ids_TN=np.stack(drawn).astype(np.int32),
        label_logprob_T=label_logprob_T.astype(np.float32),
        label_rank_T=(logprobs_TV > label_logprob_T[:, None]).sum(axis=1).astype(np.int32) + 1,
        entropy_T=-(p_TV * logprobs_TV).sum(axis=1).astype(np.float32),
    )


def _log_softmax(logits_V: NDArray[np.float64]) -> NDArray[np.float64]:
    logprobs: NDArray[np.float64] = logits_V - np.logaddexp.reduce(logits_V)
    return logprobs


def _token_bytes(token: int) -> bytes:
    return token.to_bytes(4, "little", signed=True)
