"""Which two candidates become the pair: the widest margin within the length balance, or a reason why there is none.

Pure and exact. The candidates' order plays no part: everything that could be equal is decided by the candidates'
own tokens, so that a pair is a function of what the teacher wrote and not of the place where it stood. A prompt
without a pair is no failure of the capture, but never silent either: it gets a code of its own, `pair_…`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from logitlake_teacher.config import MadePairs
from logitlake_teacher.pairs.candidates import Candidate

__all__ = ["NoPair", "Rated", "SelectedPair", "select"]


@dataclass(frozen=True)
class Rated:
    """A candidate and its rating, a float32 number: what is compared is what is stored."""

    candidate: Candidate
    rating: float


@dataclass(frozen=True)
class SelectedPair:
    """A pair, and where its two stand among all that were rated (1 = best)."""

    chosen: Rated
    rejected: Rated
    chosen_rank: int
    rejected_rank: int
    ratings: tuple[float, ...]
    """of all, the best first"""

    @property
    def margin(self) -> float:
        """By how much the chosen one is better, in the unit of the rating."""
        return self.chosen.rating - self.rejected.rating


@dataclass(frozen=True)
class NoPair:
    """Why a prompt gives no pair."""

    code: str
    """stable, for machines: `pair_one_candidate`, `pair_no_margin`, `pair_unbalanced`, …"""
    message: str
    """for people, with the figures"""


def select(
    rated: Sequence[Rated], min_margin: float, options: MadePairs, gold: Rated | None = None
) -> SelectedPair | NoPair:
    """The pair of the widest margin that is at least `min_margin` and within the length balance of `options`.

    With `gold`, that is the chosen one, and `rated` holds the others. Of pairs with one margin, the two of the most
    similar lengths win, then the first by `Candidate.key`.
    """
    everybody = list(rated) if gold is None else [*rated, gold]
    pairs = [
        (chosen, rejected)
        for chosen in (rated if gold is None else [gold])
        for rejected in rated
        if chosen is not rejected
    ]
    if not pairs:
        return NoPair("pair_one_candidate", f"{len(everybody)} responses are left of it, a pair needs two")
    wide = [pair for pair in pairs if _margin(pair) >= min_margin]
    if not wide:
        widest = max(map(_margin, pairs))
        return NoPair("pair_no_margin", f"the widest margin is {widest:.4g}, at least {min_margin} is asked for")
    balanced = [pair for pair in wide if _balanced(pair, options)]
    if not balanced:
        lengths = ", ".join(f"{_length(chosen)} and {_length(rejected)}" for chosen, rejected in wide[:3])
        return NoPair(
            "pair_unbalanced",
            f"{len(wide)} pairs have the margin, none the length balance (tokens: {lengths}{', …' * (len(wide) > 3)})",
        )
    chosen, rejected = min(balanced, key=_preference)
    ranked = sorted(everybody, key=lambda one: (-one.rating, one.candidate.key))
    return SelectedPair(
        chosen, rejected, ranked.index(chosen) + 1, ranked.index(rejected) + 1, tuple(one.rating for one in ranked)
    )


_Pair = tuple[Rated, Rated]


def _margin(pair: _Pair) -> float:
    return pair[0].rating - pair[1].rating


def _length(rated: Rated) -> int:
    return len(rated.candidate.response_ids)


def _balanced(pair: _Pair, options: MadePairs) -> bool:
    shorter, longer = sorted(map(_length, pair))
    if options.max_length_difference is not None and longer - shorter > options.max_length_difference:
        return False
    return longer <= options.max_length_ratio * shorter


def _preference(pair: _Pair) -> tuple[float, int, object, object]:
    """The smallest is the pair to take."""
    return -_margin(pair), abs(_length(pair[0]) - _length(pair[1])), pair[0].candidate.key, pair[1].candidate.key
