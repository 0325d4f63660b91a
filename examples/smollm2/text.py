"""Real prose that any machine with a Python environment has: the descriptions of its installed packages.

A wheel's METADATA carries the project's README. Markdown ones are stripped to their paragraphs of prose (no code,
tables, badges or links), each paragraph is kept once however many packages repeat it, and the prose of a package is
cut into passages of a prompt and its continuation. Packages go to one split as whole families, so that no sentence
of a held-out passage has a sibling in training: a family is everything before the first dash of the name, since
`opentelemetry-api` and `opentelemetry-sdk` share a README.

The same environment gives the same passages, byte for byte. Another one gives others, so figures are to be compared
within a run and not across machines.
"""

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

__all__ = ["HELD_OUT", "TRAIN", "Passage", "installed_markdown", "passages", "prose", "records", "split_of"]

TRAIN, HELD_OUT = "train", "held_out"
_INSTRUCTION = "Continue this text:"

# About 1.4 tokens a word of such text: a prompt of 45 tokens, a continuation of 80 to 130.
_PROMPT_WORDS = 32
_RESPONSE_WORDS = 72
_MIN_RESPONSE_WORDS = 56
# Share of the families that are held out: one in four, so that a few dozen packages are enough for both.
_HELD_OUT_PERIOD = 4
_MIN_PARAGRAPH_WORDS = 12
_MIN_LETTERS = 0.75

_REMOVED = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        (r"<!--.*?-->", re.DOTALL),
        (r"^[ ]{0,3}(```|~~~).*?^[ ]{0,3}\1[`~]*[ ]*$", re.DOTALL | re.MULTILINE),
        (r"<(pre|table|style|script)\b.*?</\1>", re.DOTALL | re.IGNORECASE),
        (r"<[^<>]+>", 0),
        (r"^[ ]{0,3}\[[^\]]+\]:.*$", re.MULTILINE),
        (r"^(\||[ ]{4}|\t).*$", re.MULTILINE),
    )
)
_IMAGE = re.compile(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])")
_LINK = re.compile(r"(?<!\w)\[([^\[\]]*)\](\([^)]*\)|\[[^\]]*\])?")
_URL = re.compile(r"https?://\S+")
_EMPHASIS = re.compile(r"[*`]+|\b_+|_+\b")
_HEADING = re.compile(r"^\s*(#|={3,}|-{3,}|\*{3,})")
# An item of a list or a quotation is a paragraph without its mark.
_ITEM = re.compile(r"^\s*([-*+]\s+|\d+[.)]\s+|>\s*)")


@dataclass(frozen=True)
class Passage:
    """A piece of prose, cut in two."""

    package: str
    number: int
    """place of the passage in its package's prose"""
    prompt: str
    response: str


def prose(markdown: str) -> list[str]:
    """The paragraphs of running English in a Markdown document, each on one line without marks."""
    text = markdown.replace("\r\n", "\n")
    for pattern in _REMOVED:
        text = pattern.sub("", text)
    text = _LINK.sub(r"\1", _LINK.sub(r"\1", _IMAGE.sub("", text)))
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if not line.strip() or _HEADING.match(line) or _ITEM.match(line):
            paragraphs.append([])
        if not _HEADING.match(line):
            paragraphs[-1].append(_ITEM.sub("", line))
    cleaned = (" ".join(_EMPHASIS.sub("", " ".join(lines)).split()) for lines in paragraphs)
    return [paragraph for paragraph in cleaned if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() for character in paragraph)
    return (
        paragraph.isascii()
        and len(paragraph.split()) >= _MIN_PARAGRAPH_WORDS
        and letters >= _MIN_LETTERS * len(paragraph)
        and paragraph[-1] in ".!?:"
        and not _URL.search(paragraph)
    )


def split_of(package: str) -> str:
    """The split of a package, a function of its family alone."""
    family = package.split("-")[0]
    return TRAIN if hashlib.sha256(family.encode()).digest()[0] % _HELD_OUT_PERIOD else HELD_OUT


def installed_markdown() -> dict[str, str]:
    """The Markdown description of each installed package by canonical name, in order of the names."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata.json
        name = re.sub(r"[-_.]+", "-", str(metadata.get("name", ""))).lower()
        kind = str(metadata.get("description_content_type", ""))
        if name != "logitlake" and kind.startswith("text/markdown"):
            found.setdefault(name, str(metadata.get("description", "")))
    return dict(sorted(found.items()))


def passages(markdown_by_package: dict[str, str]) -> dict[str, list[Passage]]:
    """All passages by split. First the first passage of every package, then the second ones, and so on, so that
    taking some from the top takes from many packages."""
    seen: set[str] = set()
    by_split: dict[str, list[list[Passage]]] = {TRAIN: [], HELD_OUT: []}
    for package, markdown in sorted(markdown_by_package.items()):
        words: list[str] = []
        for paragraph in prose(markdown):
            if paragraph not in seen:
                seen.add(paragraph)
                words += paragraph.split()
        by_split[split_of(package)].append(list(_cut(package, words)))
    return {
        split: [passage for row in zip_longest(*per_package) for passage in row if passage is not None]
        for split, per_package in by_split.items()
    }


def _cut(package: str, words: list[str]) -> Iterator[Passage]:
    step = _PROMPT_WORDS + _RESPONSE_WORDS
    for number, start in enumerate(range(0, len(words), step)):
        prompt = words[start : start + _PROMPT_WORDS]
        response = words[start + _PROMPT_WORDS : start + step]
        if len(response) >= _MIN_RESPONSE_WORDS:
            yield Passage(package, number, " ".join(prompt), " ".join(response))


def records(chosen: Iterable[Passage], split: str) -> list[dict[str, Any]]:
    """Passages as records of LLaVA's JSON without images, sorted by id."""
    return [
        {
            "id": f"{split}/{passage.package}/{passage.number:03d}",
            "source": passage.package,
            "task": "continue",
            "split": split,
            "conversations": [
                {"from": "human", "value": f"{_INSTRUCTION}\n{passage.prompt}"},
                {"from": "gpt", "value": passage.response},
            ],
        }
        for passage in sorted(chosen, key=lambda passage: (passage.package, passage.number))
    ]
