"""Every figure against a sum small enough to do by hand; what is a share of nothing is unknown, not zero."""

import re

import pytest

from logitlake_student.metrics import (
    accuracy,
    caption_figures,
    existence_figures,
    hallucinated,
    is_right,
    mentions,
    normalise,
    yes_or_no,
)

OBJECTS = re.compile(r"\b(red|blue) (one|two)\b", re.IGNORECASE)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two.", "two"),
        ("  top \n left ", "top left"),
        ('"Yes!"', "yes"),
        ("3.5", "3.5"),
        ("Straße", "strasse"),
        ("", ""),
    ],
)
def test_normalising_keeps_what_is_said(text: str, normal: str) -> None:
    """Case, blanks and punctuation around the text go; what stands inside stays."""
    assert normalise(text) == normal


def test_exact_match_is_exact() -> None:
    """More than the answer is not the answer, and silence is not one either."""
    assert is_right("Two.", "two")
    assert not is_right("two red", "two")
    assert not is_right("", "two")
    assert accuracy([("two", "two"), ("Two.", "two"), ("", "two"), ("three", "two")]) == 2 / 4
    assert accuracy([]) is None


@pytest.mark.parametrize(
    ("answer", "claim"),
    [
        ("yes", True),
        ("Yes, there is a red two.", True),
        ("No.", False),
        ("no, it is blue", False),
        ("There is not. Yes?", False),
        ("Yes. No doubt.", True),
        ("nothing", None),
        ("eyes", None),
        ("", None),
    ],
)
def test_yes_and_no_are_words_of_the_first_sentence(answer: str, claim: bool | None) -> None:
    """Neither a part of a longer word nor a later sentence decides."""
    assert yes_or_no(answer) is claim


def test_existence_figures_by_hand() -> None:
    """3 hits, 1 false alarm, 2 misses (one of them unclear), 2 right refusals (one of them unclear)."""
    figures = existence_figures(
        [("yes", True)] * 3 + [("yes", False), ("no", True), ("perhaps", True), ("no", False), ("", False)]
    )
    assert figures.num_questions == 8
    assert figures.accuracy == 5 / 8
    assert figures.precision == 3 / 4
    assert figures.recall == 3 / 5
    assert figures.hallucination_f1 == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert figures.yes_ratio == 4 / 8
    assert figures.num_unclear == 2


def test_saying_yes_to_everything_is_seen() -> None:
    """On a balanced set: half right, recall 1, F1 2/3, yes ratio 1."""
    figures = existence_figures([("yes", True), ("yes", False)])
    assert (figures.accuracy, figures.precision, figures.recall, figures.yes_ratio) == (1 / 2, 1 / 2, 1.0, 1.0)
    assert figures.hallucination_f1 == 2 / 3


def test_existence_figures_of_nothing_are_unknown() -> None:
    """No question: nothing is known. Never said yes: precision is unknown, recall and F1 are 0."""
    nothing = existence_figures([])
    assert (nothing.num_questions, nothing.num_unclear) == (0, 0)
    assert {nothing.accuracy, nothing.precision, nothing.recall, nothing.hallucination_f1, nothing.yes_ratio} == {None}
    silent = existence_figures([("no", True), ("no", False)])
    assert (silent.precision, silent.recall, silent.hallucination_f1, silent.yes_ratio) == (None, 0.0, 0.0, 0.0)
    assert existence_figures([("no", False)]).hallucination_f1 is None


def test_mentions_are_whole_matches_in_order() -> None:
    """Groups of the pattern do not matter; repeated mentions are repeated; case is folded."""
    text = "A Red one, a blue two and a red  one beside a red one; redone, red onely."
    assert mentions(text, OBJECTS) == ["red one", "blue two", "red one"]
    assert hallucinated(text, ["Red One"], OBJECTS) == ["blue two"]
    assert mentions("", OBJECTS) == []


def test_caption_figures_by_hand() -> None:
    """Four captions, one of them empty: 2 hallucinate, 3 of 6 mentions are false, 3 of 6 objects are found."""
    figures = caption_figures(
        [
            ("a red one and a blue two", "a red one and a blue two", ["red one", "blue two"]),
            ("a red two, a red two", "a red one", ["red one"]),
            ("a red one and a blue one", None, ["red one", "red one", "red two"]),  # a kind counts once an image
            ("", "a blue two", ["blue two"]),
        ],
        OBJECTS,
    )
    assert figures.num_captions == 4
    assert figures.hallucination_rate == 2 / 4
    assert figures.num_mentions == 6
    assert figures.hallucinated_mentions == 3 / 6
    assert figures.object_recall == 3 / 6
    assert figures.exact == 1 / 3


def test_caption_figures_of_nothing_are_unknown() -> None:
    """No caption: nothing is known. Captions without a mention: none hallucinates, and no mention is false or true."""
    nothing = caption_figures([], OBJECTS)
    assert {nothing.hallucination_rate, nothing.hallucinated_mentions, nothing.object_recall, nothing.exact} == {None}
    silent = caption_figures([("a picture", None, ["red one"])], OBJECTS)
    assert (silent.hallucination_rate, silent.hallucinated_mentions, silent.object_recall) == (0.0, None, 0.0)
    empty_scene = caption_figures([("a red one", None, [])], OBJECTS)
    assert (empty_scene.hallucination_rate, empty_scene.object_recall) == (1.0, None)
