"""The turns of a conversation as a plan and a shard hold them: one JSON text, read only by those who look inside.

Nearly all of a conversation's way through the program only carries it: from the plan into the lake, from the lake past
a trainer that learns from ids. Taking the text apart and writing it again for each sample cost more than capturing it
with a teacher that costs nothing.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

__all__ = ["Messages", "StoredMessages", "messages_text"]

Messages = Sequence[Mapping[str, Any]]
"""turns with `role` and `content`: text, or parts `{"type": "image"}`, `{"type": "text", "text": …}`"""

_encode = json.JSONEncoder(ensure_ascii=False).encode


class StoredMessages(Sequence[dict[str, Any]]):
    """The turns in a JSON text: a sequence that is parsed when it is looked into, and equal to the list that it is."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __len__(self) -> int:
        return len(self._turns())

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, place: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._turns()[place]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._turns())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StoredMessages) and other.text == self.text:
            return True
        return isinstance(other, Iterable) and self._turns() == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __repr__(self) -> str:
        return f"StoredMessages({self.text!r})"

    def _turns(self) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = json.loads(self.text)
        return turns


def messages_text(messages: Messages) -> str:
    """The turns as they are stored."""
    return messages.text if isinstance(messages, StoredMessages) else _encode(messages)
