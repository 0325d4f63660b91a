"""Candidates: what the teacher wrote for a prompt, as far as it can stand in a pair, and each text once."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitlake_shared.rendering import Renderer

__all__ = ["Candidate", "distinct", "normalised", "usable"]

# Marks that close or open a word and are not part of it. A sign before a number is, and so is "%".
_CLOSING = ".,;:!?…\"')]}”’»。，、；：！？」』）"
_OPENING = "\"'([{“‘«「『（"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One response, by the teacher or of the data, and what the teacher thinks of its tokens. Equal to itself alone."""

    response_ids: NDArray[np.int32]
    """EOS included"""
    text: str
    logprobs_T: NDArray[np.float32]
    """the teacher's logprob of each token, at T = 1"""

    @property
    def ids(self) -> tuple[int, ...]:
        """The same ids, to compare and to look up by."""
        return tuple(self.response_ids.tolist())

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """Orders candidates by length and content, never by the place where they were drawn."""
        return len(self.response_ids), self.ids


def normalised(text: str) -> str:
    """The text as two answers are compared: lower case, one blank between words, no marks around them."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    stripped = (word.rstrip(_CLOSING).lstrip(_OPENING) for word in words)
    return " ".join(word for word in stripped if word)


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate for each normalised text, the first by `key`; in that order. Doing it twice changes nothing."""
    by_text: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda one: one.key):
        by_text.setdefault(normalised(candidate.text), candidate)
    return list(by_text.values())


def usable(
    written: Sequence[Candidate], renderer: Renderer, not_text: str | None = None
) -> tuple[list[Candidate], Counter[str]]:
    """The candidates that can stand in a pair, each text once, and how many were left out for which reason.

    Left out is what was cut off, what is empty, what names an image that is not there, and what says the same as
    another candidate or as `not_text`.
    """
    faults = [_fault(candidate, renderer) for candidate in written]
    left_out = Counter(fault for fault in faults if fault is not None)
    whole = [candidate for candidate, fault in zip(written, faults, strict=True) if fault is None]
    kept = distinct(whole)
    left_out["repeat another"] = len(whole) - len(kept)
    if not_text is not None:
        others = [candidate for candidate in kept if normalised(candidate.text) != normalised(not_text)]
        left_out["say what the data's answer says"] = len(kept) - len(others)
        kept = others
    return kept, +left_out


def _fault(candidate: Candidate, renderer: Renderer) -> str | None:
    if candidate.response_ids[-1] != renderer.eos_id:
        return "cut off before their end"
    if not candidate.text:
        return "empty"
    # A placeholder that the teacher wrote, or spelled, would stand for an image that is not there.
    placeholder = renderer.image_token_id
    if placeholder is not None and (
        placeholder in candidate.response_ids or placeholder in renderer.render_response(candidate.text)
    ):
        return "with an image placeholder"
    return None
