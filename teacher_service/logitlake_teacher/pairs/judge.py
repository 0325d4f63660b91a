"""The teacher as judge of its own candidates: what it is asked, and which tokens are its answer.

The question goes where the candidate's own question stood: history and images stay, the last user turn is replaced by
its images and the filled template. What is read is the distribution of the next token alone, so that an answer costs
one prefill, and the rating is exact whatever the teacher would have gone on to say.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitlake_schemas import CaptureSpec, UnitError, sha256_hex
from logitlake_shared.errors import ConfigError
from logitlake_shared.images import DecodedImage
from logitlake_shared.messages import Messages
from logitlake_shared.rendering import Renderer
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.config import JudgeRanking
from logitlake_teacher.engines import Engine, ScoredSample, ScoreRequest
from logitlake_teacher.items import PlannedSample
from logitlake_teacher.pairs.ranking import combined, judge_rating
from logitlake_teacher.unit_work import accept

__all__ = ["JUDGE_K", "Judge", "Judged"]

JUDGE_K = 20
"""Entries a token that are asked for: the answers stand among the first few, and what does not is asked for by name."""


@dataclass(frozen=True)
class Judged:
    """One response to be judged, in its conversation."""

    item: PlannedSample
    """in the form of a single turn: its messages end with the user turn that the response answers"""
    number: int
    """tells the responses to one item apart"""
    text: str
    images: tuple[DecodedImage, ...]


@dataclass(frozen=True)
class _Question:
    """One claim of a response, as the teacher is asked about it."""

    about: int
    """the place of the response"""
    item: PlannedSample
    request_id: str
    prompt_ids: NDArray[np.int32]
    images: tuple[DecodedImage, ...]


class Judge:
    """Asks and reads. Raises `ConfigError` when the words of approval and refusal cannot be told apart by a token."""

    def __init__(self, options: JudgeRanking, renderer: Renderer) -> None:
        self._options = options
        self._renderer = renderer
        self.yes_ids = _single_tokens(options.yes, "yes", renderer)
        self.no_ids = _single_tokens(options.no, "no", renderer)
        shared = sorted(set(self.yes_ids) & set(self.no_ids))
        if shared:
            raise ConfigError(
                f"pairs.ranking: the token {renderer.token(shared[0])!r} means both yes and no: yes={options.yes}, "
                f"no={options.no}; name other words"
            )

    @property
    def template_sha256(self) -> str:
        """What was asked, as a digest; the text itself is in the cache's spec."""
        return sha256_hex(self._options.template.encode())

    def claims_of(self, text: str) -> list[str]:
        """The pieces of a candidate that are judged, one at least."""
        if self._options.claims is None:
            return [text]
        # A group in the expression would come back as a piece, and None where it did not take part.
        pieces, start = [], 0
        for cut in re.finditer(self._options.claims, text):
            pieces.append(text[start : cut.start()])
            start = cut.end()
        pieces.append(text[start:])
        return [piece.strip() for piece in pieces if piece.strip()] or [text]

    def prompt(self, messages: Messages, claim: str) -> NDArray[np.int32]:
        """The ids of the judge's prompt; `messages` end with the user turn that the candidate answers."""
        *history, last = messages
        parts = last["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        question = "\n".join(part["text"].strip() for part in parts if part["type"] == "text")
        asked = self._options.template.format(question=question, answer=claim)
        images = [part for part in parts if part["type"] == "image"]
        return self._renderer.render_prompt([*history, {**last, "content": [*images, {"type": "text", "text": asked}]}])

    def ratings(self, engine: Engine, judged: Sequence[Judged], spec: CaptureSpec) -> list[float | UnitError]:
        """The rating of each response, or why the teacher gave none."""
        questions = [
            _Question(
                about,
                one.item,
                f"{one.item.sample_id}/judge/{one.number}.{number}",
                self.prompt(one.item.messages, claim),
                one.images,
            )
            for about, one in enumerate(judged)
            for number, claim in enumerate(self.claims_of(one.text))
        ]
        ratings: list[list[float]] = [[] for _ in judged]
        failed: dict[int, UnitError] = {}
        for question, answer in zip(questions, self._answers(engine, questions, spec), strict=True):
            if isinstance(answer, UnitError):
                failed.setdefault(question.about, answer)
            else:
                ratings[question.about].append(self._rating(answer))
        return [failed.get(about) or combined(own, self._options.combine) for about, own in enumerate(ratings)]

    def _answers(
        self, engine: Engine, questions: Sequence[_Question], spec: CaptureSpec
    ) -> list[dict[int, float] | UnitError]:
        """The logprob of every yes and no token after each question.

        Every question is scored once with an answer of one token, whose row holds the most probable tokens too; a
        token that is not among these is scored by itself. So the logprobs are exact, and mostly cost one pass.
        """
        known: list[dict[int, float] | UnitError] = [{} for _ in questions]
        asked = [(place, self.yes_ids[0]) for place in range(len(questions))]
        while asked:
            answers = engine.score([_request(questions[place], token) for place, token in asked])
            for (place, token), answer in zip(asked, answers, strict=True):
                checked = accept(questions[place].item, answer, np.array([token], np.int32), spec)
                logprobs = known[place]
                if isinstance(checked, UnitError):
                    known[place] = checked
                elif not isinstance(logprobs, UnitError):
                    logprobs |= _logprobs_of(checked, token)
            asked = [
                (place, token)
                for place, logprobs in enumerate(known)
                if not isinstance(logprobs, UnitError)
                for token in (*self.yes_ids, *self.no_ids)
                if token not in logprobs
            ]
        return known

    def _rating(self, logprobs: dict[int, float]) -> float:
        yes = [logprobs[token] for token in self.yes_ids]
        no = [logprobs[token] for token in self.no_ids]
        return judge_rating(yes, no, self._options.rating)


def _request(question: _Question, token: int) -> ScoreRequest:
    prompt_ids = question.prompt_ids
    return ScoreRequest(
        question.request_id,
        prompt_ids,
        np.array([len(prompt_ids)], np.int32),
        np.array([token], np.int32),
        np.array([1], np.int32),
        question.images,
    )


def _logprobs_of(answer: ScoredSample, token: int) -> dict[int, float]:
    """What one row says: its most probable tokens, and the token that was asked about."""
    rows = answer.rows
    assert isinstance(rows, TeacherRows)
    entries = zip(rows.topk_ids_TK[0].tolist(), rows.topk_logprobs_TK[0].tolist(), strict=True)
    return {**dict(entries), token: float(rows.label_logprob_T[0])}


def _single_tokens(words: Sequence[str], meaning: str, renderer: Renderer) -> tuple[int, ...]:
    """The tokens that alone are one of the words, as it stands, capitalised or in capitals, with a blank or without."""
    forms = [
        f"{blank}{form}" for word in words for form in (word, word.capitalize(), word.upper()) for blank in ("", " ")
    ]
    ids = [renderer.render_response(form)[:-1].tolist() for form in dict.fromkeys(forms)]
    singles = tuple(dict.fromkeys(own[0] for own in ids if len(own) == 1))
    if not singles:
        raise ConfigError(
            f"pairs.ranking.{meaning}: none of {', '.join(map(repr, words))} is a single token of the teacher's "
            "tokenizer, so its probability is not the probability of one next token; name words that are"
        )
    return singles
