"""Ids that say what they name and sort by when they were made: `job_01JDZ…`.

Behind the name is a UUIDv7 (RFC 9562) in Crockford's base 32; nobody takes one apart.
"""

import re
import secrets
import time

__all__ = ["is_id", "new_id"]

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH = 26  # 130 bits for 128
_ID = re.compile(rf"[a-z]{{2,6}}_[{_ALPHABET}]{{{_LENGTH}}}")


def new_id(kind: str) -> str:
    """A new id of this kind, e.g. `job`: later ones sort after earlier ones, to the millisecond."""
    milliseconds = time.time_ns() // 1_000_000
    random_bits = secrets.randbits(74)
    number = milliseconds << 80 | 7 << 76 | random_bits >> 62 << 64 | 0b10 << 62 | random_bits & (1 << 62) - 1
    digits = []
    for _ in range(_LENGTH):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return f"{kind}_{''.join(reversed(digits))}"


def is_id(text: str, kind: str) -> bool:
    """Whether `text` can be an id of this kind."""
    return text.startswith(f"{kind}_") and _ID.fullmatch(text) is not None
