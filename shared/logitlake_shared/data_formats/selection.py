"""Which records of a stream are taken: by task, by turns, by images, and how many."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from logitlake_shared.data_formats.records import BadRecord, Conversation, PreferencePair, Record

__all__ = ["Selection", "selected"]


@dataclass(frozen=True)
class Selection:
    """What a record must be to be taken. Every bound includes its own value; none bounds nothing."""

    tasks: tuple[str, ...] | None = None
    max_turns: int | None = None
    """assistant turns, at most; a pair has one"""
    min_images: int = 0
    max_images: int | None = None
    limit: int | None = None
    """take this many, then stop reading"""


def selected(reads: Iterable[Record | BadRecord], selection: Selection) -> Iterator[Record | BadRecord]:
    """The records that are wanted, and every bad one met on the way: those are not for a filter to hide."""
    left = selection.limit
    for read in reads:
        if isinstance(read, BadRecord):
            yield read
        elif _wanted(read, selection):
            yield read
            if left is not None:
                left -= 1
                if not left:
                    return


def _wanted(read: Conversation | PreferencePair, selection: Selection) -> bool:
    if selection.tasks is not None and read.task not in selection.tasks:
        return False
    num_images = len(read.images)
    if num_images < selection.min_images:
        return False
    if selection.max_images is not None and num_images > selection.max_images:
        return False
    if selection.max_turns is None:
        return True
    num_turns = sum(1 for message in read.messages if message["role"] == "assistant")
    return num_turns <= selection.max_turns
