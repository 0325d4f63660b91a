"""Ids that say what they name and sort by when they were made: `job_01JDZ…`.

Behind the name is a UUIDv7 (RFC 9562) in Crockford's base 32; nobody takes one apart.
"""

import re
import secrets
import threading
import time

__all__ = ["is_id", "least_id", "new_id"]

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH = 26  # 130 bits for 128
_RANDOM_BITS = 74
_ID = re.compile(rf"[a-z]{{2,6}}_[{_ALPHABET}]{{{_LENGTH}}}")


_lock = threading.Lock()
_last = (0, 0)
"""milliseconds and random bits of the id before"""


def new_id(kind: str) -> str:
    """A new id of this kind, e.g. `job`. Within a process it sorts after all before it, else to the millisecond."""
    global _last
    with _lock:
        milliseconds, random_bits = time.time_ns() // 1_000_000, secrets.randbits(_RANDOM_BITS)
        if milliseconds <= _last[0]:  # RFC 9562, 6.2, method 2: one more than the last, by a random amount
            milliseconds, random_bits = _last[0], _last[1] + 1 + secrets.randbits(32)
            if random_bits >> _RANDOM_BITS:
                milliseconds, random_bits = milliseconds + 1, 0
        _last = milliseconds, random_bits
    return _spelled(kind, milliseconds, random_bits)


def least_id(kind: str, seconds: float) -> str:
    """No id of this kind that is made at that time (since the epoch) or later sorts before it."""
    return _spelled(kind, max(int(seconds * 1000), 0), 0)


def _spelled(kind: str, milliseconds: int, random_bits: int) -> str:
    number = milliseconds << 80 | 7 << 76 | random_bits >> 62 << 64 | 0b10 << 62 | random_bits & (1 << 62) - 1
    digits = []
    for _ in range(_LENGTH):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return f"{kind}_{''.join(reversed(digits))}"


def is_id(text: str, kind: str) -> bool:
    """Whether `text` can be an id of this kind."""
    return text.startswith(f"{kind}_") and _ID.fullmatch(text) is not None
