"""Lists by the page: `{data, next_cursor, has_more}`, where a cursor names the last item that was seen.

So a list stays whole while items are added: none is shown twice, none is left out. A cursor is opaque and belongs to
one list; another's, or one that was tampered with, is refused rather than answered with something else.
"""

import base64
import binascii
import zlib
from collections.abc import Sequence
from typing import Annotated, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

from logitlake_shared.web.problems import FieldError, Problem

__all__ = ["Cursor", "Limit", "Page", "decode_cursor", "encode_cursor", "page_of"]

Item = TypeVar("Item")

Limit = Annotated[int, Query(ge=1, le=200, description="items of a page")]
# In base64 an id of the most characters that a path may have (4096), each of four bytes, and the checksum.
Cursor = Annotated[str | None, Query(max_length=21_852, description="`next_cursor` of the page before")]


class Page(BaseModel, Generic[Item]):
    """A part of a list."""

    data: list[Item]
    next_cursor: str | None = Field(default=None, description="asks for the next page; null at the end")
    has_more: bool


def page_of(items: Sequence[tuple[str, Item]], of_list: str, limit: int, cursor: str | None) -> Page[Item]:
    """A page of a list that is in memory: items by their keys, which rise.

    `of_list` names the list with all that was asked of it. Raises `Problem` for a cursor that is not its own.
    """
    after = None if cursor is None else decode_cursor(cursor, of_list)
    left = [(key, item) for key, item in items if after is None or key > after]
    shown, has_more = left[:limit], len(left) > limit
    next_cursor = encode_cursor(shown[-1][0], of_list) if has_more else None
    return Page(data=[item for _, item in shown], next_cursor=next_cursor, has_more=has_more)


def encode_cursor(key: str, of_list: str) -> str:
    """The cursor after the item of this key."""
    return base64.urlsafe_b64encode(_checksum(key, of_list) + key.encode()).rstrip(b"=").decode()


def decode_cursor(cursor: str, of_list: str) -> str:
    """The key that a cursor names. Raises `Problem` `invalid_request` for one that is not of this list."""
    try:
        data = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        key = data[4:].decode()
        if data[:4] == _checksum(key, of_list):
            return key
    except (binascii.Error, ValueError):
        pass
    detail = "not a cursor of this list; send `next_cursor` of a page of it, with the same filters"
    raise Problem("invalid_request", f"query.cursor: {detail}", [FieldError(pointer="/query/cursor", detail=detail)])


def _checksum(key: str, of_list: str) -> bytes:
    return zlib.crc32(f"{of_list}\0{key}".encode()).to_bytes(4, "big")
