"""The words of the demo world: six tasks, their true answers, and the faults that real training data has.

A question is made from a layout alone, and its true answer is a pure function of question and layout; faults
are a separate step, so a test set is exact because that step is not taken, not because a rate is zero
somewhere. Every object is named "<colour> <digit>", so a regular expression can tell what a caption claims.

Faults are of two kinds. Some are random, as typing errors are. One is a habit: whoever wrote the training
captions expects a nine to come with a seven of the bottom row, and mostly writes it down whether it is there
or not. Random faults hardly show in greedy answers; a habit does, which is how real hallucination behaves,
and gives preference distillation something to cure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.digit_scenes.world import COLOURS, DIGITS, PLACES, Placed

__all__ = [
    "TASKS",
    "FaultRates",
    "Question",
    "answer_with_faults",
    "ask",
    "ask_existence_pair",
    "caption_of",
    "hallucinated_caption",
    "has_habit",
    "mentions",
    "true_answer",
]

TASKS = ("caption", "reading", "counting", "colour", "position", "existence")

NUMBERS = ("zero", "one", "two", "three", "four")
LOOKALIKES = {
    "zero": "six",
    "one": "seven",
    "two": "three",
    "three": "eight",
    "four": "nine",
    "five": "six",
    "six": "five",
    "seven": "one",
    "eight": "three",
    "nine": "four",
}

_PHRASINGS = {
    "caption": ("Describe the picture.", "What is in the picture?", "List the digits that you see."),
    "reading": (
        "Which digit is at the {place}?",
        "Read the digit at the {place}.",
        "What is at the {place}?",
    ),
    "counting": ("How many digits are there?", "Count the digits."),
    "counting_colour": ("How many {colour} digits are there?", "Count the {colour} digits."),
    "colour": ("What colour is the digit at the {place}?", "Which colour is at the {place}?"),
    "colour_digit": ("What colour is the {digit}?", "Which colour does the {digit} have?"),
    "position": ("Where is the {colour} {digit}?", "At which place is the {colour} {digit}?"),
    "existence": ("Is there {thing}?", "Is {thing} in the picture?", "Can you see {thing}?"),
}
_MENTION = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(DIGITS)})\b")


@dataclass(frozen=True)
class FaultRates:
    """How often training answers are wrong; each is the chance for one answer of the kind named."""

    habit: float = 0.75
    """Captions of a scene that has the habit (see `has_habit`) claim the nine that is not there."""
    caption: float = 0.11
    """Other captions: one object invented in an empty cell, or one digit taken for its lookalike, evenly."""
    label: float = 0.08
    """Reading, counting, colour and position: another answer of the same kind."""
    existence: float = 0.15
    """Existence questions whose answer is no: answered yes."""


@dataclass(frozen=True)
class Question:
    """A question in words, with what it is about; the fields a task does not use are None."""

    task: str
    text: str
    place: str | None = None
    colour: str | None = None
    digit: str | None = None


def mentions(text: str) -> list[str]:
    """Every object that a text names, in order, as "<colour> <digit>"."""
    return [f"{colour} {digit}" for colour, digit in _MENTION.findall(text)]


def caption_of(objects: Sequence[Placed]) -> str:
    """The one caption of a list of objects, in the order given."""
    phrases = [f"a {placed.phrase} at the {placed.place}" for placed in objects]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def true_answer(question: Question, objects: Sequence[Placed]) -> str:
    """The exact answer; asks that have none (the colour of an empty cell) are not made by `ask`."""
    if question.task == "caption":
        return caption_of(objects)
    matching = [
        placed
        for placed in objects
        if question.place in (None, placed.place)
        and question.colour in (None, placed.colour)
        and question.digit in (None, placed.digit)
    ]
    match question.task:
        case "reading":
            return matching[0].digit if matching else "none"
        case "counting":
            return NUMBERS[len(matching)]
        case "colour":
            return matching[0].colour
        case "position":
            return matching[0].place
        case "existence":
            return "yes" if matching else "no"
    raise AssertionError(f"no such task: {question.task}")


def ask(task: str, objects: Sequence[Placed], rng: np.random.Generator) -> Question:
    """A question of any task but existence, whose questions come in pairs: `ask_existence_pair`."""
    place = colour = digit = None
    phrasings = task
    some = objects[int(rng.integers(len(objects)))]
    if task == "reading":
        empty = _empty_places(objects)
        place = _pick(empty, rng) if empty and rng.random() < 0.15 else some.place
    elif task == "counting" and rng.random() < 0.6:
        phrasings = "counting_colour"
        colour = some.colour if rng.random() < 0.7 else _pick(tuple(COLOURS), rng)
    elif task == "colour":
        if rng.random() < 0.5 and sum(placed.digit == some.digit for placed in objects) == 1:
            phrasings, digit = "colour_digit", some.digit
        else:
            place = some.place
    elif task == "position":
        colour, digit = some.colour, some.digit
    text = _pick(_PHRASINGS[phrasings], rng).format(place=place, colour=colour, digit=digit)
    return Question(task, text, place=place, colour=colour, digit=digit)


def ask_existence_pair(objects: Sequence[Placed], rng: np.random.Generator) -> tuple[Question, Question]:
    """Two questions in the same words on the same scene, the first to be answered yes and the second no.

    Half of the pairs ask for a digit in a colour; of their second questions half differ from an object of the
    scene in the colour or the digit only, so that seeing both words somewhere is not enough.
    """
    some = objects[int(rng.integers(len(objects)))]
    colour: str | None
    if rng.random() < 0.5:
        present = {(placed.colour, placed.digit) for placed in objects}
        kinds = [(colour, digit) for colour in COLOURS for digit in DIGITS]
        if rng.random() < 0.5:
            kinds = [kind for kind in kinds if (kind[0] == some.colour) != (kind[1] == some.digit)]
        absent = [kind for kind in kinds if kind not in present]
        colour, digit = absent[rng.integers(len(absent))]
        yes_colour: str | None = some.colour
    else:
        seen = {placed.digit for placed in objects}
        digit = _pick(tuple(name for name in DIGITS if name not in seen), rng)
        colour = yes_colour = None
    phrasing = _pick(_PHRASINGS["existence"], rng)
    yes = Question(
        "existence", phrasing.format(thing=_thing(yes_colour, some.digit)), colour=yes_colour, digit=some.digit
    )
    no = Question("existence", phrasing.format(thing=_thing(colour, digit)), colour=colour, digit=digit)
    return yes, no


def has_habit(objects: Sequence[Placed]) -> Placed | None:
    """The nine that a habitual writer adds to this scene, or None.

    It is added where a seven stands in the bottom row, in the seven's colour, at the first empty place,
    unless it is really there.
    """
    empty = _empty_places(objects)
    sevens = [placed for placed in objects if placed.digit == "seven" and placed.cell >= 2]
    if not sevens or not empty:
        return None
    nine = Placed("nine", sevens[0].colour, PLACES.index(empty[0]))
    return None if any(placed.phrase == nine.phrase for placed in objects) else nine


def hallucinated_caption(objects: Sequence[Placed], rng: np.random.Generator) -> str:
    """A caption that names at least one object that is not in the scene: an invention or a lookalike."""
    present = {placed.phrase for placed in objects}
    empty = _empty_places(objects)
    if empty and rng.random() < 0.5:
        absent = [(c, d) for c in COLOURS for d in DIGITS if f"{c} {d}" not in present]
        colour, digit = absent[rng.integers(len(absent))]
        return caption_of([*objects, Placed(digit, colour, PLACES.index(_pick(empty, rng)))])
    # A lookalike that is in the scene anyway would be a wrong place, not a wrong object.
    swaps = [i for i, placed in enumerate(objects) if f"{placed.colour} {LOOKALIKES[placed.digit]}" not in present]
    if not swaps:
        place = objects[0]
        return caption_of([replace(place, digit=_absent_digit(objects, place.colour, rng)), *objects[1:]])
    swapped = list(objects)
    chosen = swaps[rng.integers(len(swaps))]
    swapped[chosen] = replace(swapped[chosen], digit=LOOKALIKES[swapped[chosen].digit])
    return caption_of(swapped)


def answer_with_faults(
    question: Question, objects: Sequence[Placed], rates: FaultRates, rng: np.random.Generator
) -> str:
    """The answer as a training set has it: the true one, or with the stated chance a wrong one."""
    truth = true_answer(question, objects)
    chance = rng.random()
    match question.task:
        case "caption":
            nine = has_habit(objects)
            if nine is not None:
                return caption_of([*objects, nine]) if chance < rates.habit else truth
            return hallucinated_caption(objects, rng) if chance < rates.caption else truth
        case "existence":
            return "yes" if truth == "no" and chance < rates.existence else truth
    if chance >= rates.label:
        return truth
    choices = {"reading": DIGITS, "counting": NUMBERS, "colour": tuple(COLOURS), "position": PLACES}[question.task]
    return _pick(tuple(choice for choice in choices if choice != truth), rng)


def _thing(colour: str | None, digit: str) -> str:
    if colour is not None:
        return f"a {colour} {digit}"
    return f"{'an' if digit == 'eight' else 'a'} {digit}"


def _empty_places(objects: Sequence[Placed]) -> list[str]:
    taken = {placed.place for placed in objects}
    return [place for place in PLACES if place not in taken]


def _absent_digit(objects: Sequence[Placed], colour: str, rng: np.random.Generator) -> str:
    present = {placed.phrase for placed in objects}
    return _pick(tuple(digit for digit in DIGITS if f"{colour} {digit}" not in present), rng)


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
