"""The turns of a conversation as one text: a list to whoever looks inside, and the text to whoever carries it."""

import json
import pickle

import pytest

from logitlake_shared.messages import StoredMessages, messages_text

TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Wieviel wärmer? 🌡"}]},
    {"role": "assistant", "content": "3 °C"},
]


def test_stored_turns_are_the_list_that_they_were() -> None:
    """Length, places, slices, iteration and equality are the list's; so is what a change of one turn leaves alone."""
    stored = StoredMessages(messages_text(TURNS))
    assert len(stored) == 2
    assert stored[0] == TURNS[0]
    assert stored[-1]["content"] == "3 °C"
    assert stored[:-1] == TURNS[:-1]
    assert [*stored] == TURNS
    assert stored == TURNS
    assert stored == StoredMessages(json.dumps(TURNS))
    assert stored != TURNS[:1]
    assert stored != "no turns"
    assert pickle.loads(pickle.dumps(stored)) == stored  # our own bytes


def test_carrying_turns_does_not_rewrite_them() -> None:
    """Text that is stored goes on as it is, however it was spelled; turns are spelled without escapes."""
    spelled = json.dumps(TURNS, indent=1)
    assert messages_text(StoredMessages(spelled)) == spelled
    assert "wärmer" in messages_text(TURNS)
    assert json.loads(messages_text(TURNS)) == TURNS


def test_stored_turns_are_no_key() -> None:
    """As a list: equal ones may be spelled differently, so they have no hash."""
    with pytest.raises(TypeError):
        hash(StoredMessages("[]"))
