"""Canonical JSON and sha256: how a thing that determines content gets its name.

Two documents that say the same have the same bytes (sorted keys, no spaces, UTF-8, no NaN), hence the same
fingerprint, on every machine and in every version of Python.
"""

import hashlib
import json
from typing import Any

__all__ = ["canonical_json", "fingerprint", "sha256_hex"]


def sha256_hex(data: bytes) -> str:
    """The sha256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(document: Any) -> bytes:
    """`document` (plain JSON types) as its one canonical UTF-8 form. Raises `ValueError` on NaN or infinity."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(document: Any) -> str:
    """sha256 of the canonical JSON of `document`."""
    return sha256_hex(canonical_json(document))
