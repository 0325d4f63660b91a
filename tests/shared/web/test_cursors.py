"""Lists by the page, and ids that sort."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from logitlake_shared.ids import is_id, least_id, new_id
from logitlake_shared.web.cursors import Cursor, encode_cursor, page_of
from logitlake_shared.web.problems import Problem

KEYS = st.lists(st.text(min_size=1), unique=True)


@given(first=KEYS, added=KEYS, limit=st.integers(1, 5))
def test_pages_hold_every_item_once_while_items_are_added(first: list[str], added: list[str], limit: int) -> None:
    """Each that was there at the start is seen once, in order; one that came later at most once."""
    keys, cursor, seen = sorted(first), None, list[str]()
    later = iter(added)
    while True:
        page = page_of([(key, key) for key in keys], "list", limit, cursor)
        seen += page.data
        assert page.has_more == (page.next_cursor is not None)
        if not page.has_more:
            break
        cursor = page.next_cursor
        keys = sorted({*keys, *([new] if (new := next(later, None)) is not None else [])})
    assert seen == sorted(set(seen))
    assert set(first) <= set(seen) <= set(first) | set(added)


@given(st.text(max_size=50))
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(Problem) as refused:
        page_of([("a", 1)], "list", 1, text)
    assert refused.value.code == "invalid_request"


def test_a_list_goes_on_after_the_longest_id() -> None:
    """A sample's id may be that long where it is asked for, so the list of samples must get past it."""
    cursor = encode_cursor("\N{MUSICAL SYMBOL G CLEF}" * 4096, "list")
    assert TypeAdapter(Cursor).validate_python(cursor) == cursor


def test_a_cursor_of_another_list_is_refused() -> None:
    with pytest.raises(Problem):
        page_of([("a", 1), ("b", 2)], "list", 1, encode_cursor("a", "another list"))


def test_ids_sort_by_their_time() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_id("job"))
        time.sleep(0.002)  # their clock is a millisecond's
    assert ids == sorted(ids)
    now = time.time()
    assert ids[-1] < least_id("job", now + 1)
    assert least_id("job", now) <= new_id("job")
    assert least_id("job", -1) < ids[0]
    assert len({new_id("job") for _ in range(1000)}) == 1000
    assert all(is_id(one, "job") and not is_id(one, "qry") for one in ids)
    assert not is_id("job_x", "job")
