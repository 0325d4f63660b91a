"""What answers are worth: exact match, POPE's figures for yes/no questions, CHAIR's for captions.

Texts in, figures out, nothing heavy on the way. Every figure is a share of counts over the whole test set, never a
mean of shares, and a share of nothing is None: it is unknown, not zero.

* Exact match compares texts after `normalise`.
* Existence questions follow POPE (arXiv 2305.10355): the positive class is "yes", so a hallucination is a false
  positive. An answer that is neither yes nor no counts as "no" and is reported as `num_unclear`; POPE's own script
  takes it for "yes", which would let a model that says nothing look like one that always agrees.
* Captions follow CHAIR (arXiv 1809.02156): mentions are compared with the objects truly there, over captions
  (CHAIR_s, the response level of Object HalBench) and over mentions (CHAIR_i).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "CaptionFigures",
    "ExistenceFigures",
    "accuracy",
    "caption_figures",
    "existence_figures",
    "hallucinated",
    "is_right",
    "mentions",
    "normalise",
    "yes_or_no",
]

_EDGES = " .,;:!?\"'"
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class ExistenceFigures:
    """POPE's figures; the positive class is "yes"."""

    num_questions: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    hallucination_f1: float | None
    """harmonic mean of precision and recall of "yes" """
    yes_ratio: float | None
    """share of the answers that say yes"""
    num_unclear: int
    """answers that are neither yes nor no, counted as no unless POPE's own way was asked for"""


@dataclass(frozen=True)
class CaptionFigures:
    """CHAIR's figures."""

    num_captions: int
    hallucination_rate: float | None
    """share of captions with at least one mention of what is not there (CHAIR_s)"""
    hallucinated_mentions: float | None
    """share of mentions of what is not there, repeated mentions counted again (CHAIR_i)"""
    object_recall: float | None
    """share of the objects truly there, each kind once an image, that their caption mentions"""
    num_mentions: int
    exact: float | None
    """share of the captions with a gold text that equal it"""


def normalise(text: str) -> str:
    """Case folded, blanks collapsed, punctuation and quotes around it dropped."""
    return " ".join(text.casefold().split()).strip(_EDGES)


def is_right(answer: str, gold: str) -> bool:
    """Whether the two are the same text after `normalise`."""
    return normalise(answer) == normalise(gold)


def accuracy(answers_and_gold: Iterable[tuple[str, str]]) -> float | None:
    """Share of exact matches."""
    outcomes = [is_right(answer, gold) for answer, gold in answers_and_gold]
    return _share(sum(outcomes), len(outcomes))


def yes_or_no(answer: str) -> bool | None:
    """What the first sentence says: False if it holds `no` or `not`, else True if it holds `yes`, else None."""
    words = set(_WORD.findall(answer.casefold().split(".")[0]))
    if words & {"no", "not"}:
        return False
    return True if "yes" in words else None


def existence_figures(
    answers_and_gold: Iterable[tuple[str, bool]], *, unclear_is_yes: bool = False
) -> ExistenceFigures:
    """POPE's figures of answers to questions whose true answer is yes (True) or no (False)."""
    said = [(yes_or_no(answer), gold) for answer, gold in answers_and_gold]
    counts = Counter((unclear_is_yes if claim is None else claim, gold) for claim, gold in said)
    hits, false_alarms, misses = counts[True, True], counts[True, False], counts[False, True]
    return ExistenceFigures(
        num_questions=len(said),
        accuracy=_share(hits + counts[False, False], len(said)),
        precision=_share(hits, hits + false_alarms),
        recall=_share(hits, hits + misses),
        hallucination_f1=_share(2 * hits, 2 * hits + false_alarms + misses),
        yes_ratio=_share(hits + false_alarms, len(said)),
        num_unclear=sum(claim is None for claim, _ in said),
    )


def mentions(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The objects that a text names, in order, repeated as often as it names them: the pattern's whole matches."""
    return [normalise(match[0]) for match in pattern.finditer(text) if match[0]]


def hallucinated(text: str, objects: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """The mentions of a text that are not among the objects."""
    there = {normalise(name) for name in objects}
    return [mention for mention in mentions(text, pattern) if mention not in there]


def caption_figures(
    captions: Sequence[tuple[str, str | None, Sequence[str]]], pattern: re.Pattern[str]
) -> CaptionFigures:
    """CHAIR's figures of captions, each with its gold text (None where there is none) and the objects truly there."""
    num_mentions = num_false_mentions = num_false_captions = num_objects = num_found = 0
    for caption, _, objects in captions:
        mentioned = mentions(caption, pattern)
        false_mentions = hallucinated(caption, objects, pattern)
        there = {normalise(name) for name in objects}
        num_mentions += len(mentioned)
        num_false_mentions += len(false_mentions)
        num_false_captions += bool(false_mentions)
        num_objects += len(there)
        num_found += len(there & set(mentioned))
    return CaptionFigures(
        num_captions=len(captions),
        hallucination_rate=_share(num_false_captions, len(captions)),
        hallucinated_mentions=_share(num_false_mentions, num_mentions),
        object_recall=_share(num_found, num_objects),
        num_mentions=num_mentions,
        exact=accuracy((caption, gold) for caption, gold, _ in captions if gold is not None),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
