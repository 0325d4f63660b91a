"""What came before a token, as one number.

The hash of a prefix is a polynomial over the hashes of its tokens, modulo 2**64, so that the prefixes of all positions
of all samples are two cumulated sums. A placeholder counts as the image that stands there, and where it stands counts:
order matters, and nothing behind a position can reach it.

Axes: S positions of all samples, one sample after the other; T response tokens of all samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitlake_teacher.engines.base import ScoreRequest

__all__ = ["LaidOut", "hash64", "lay_out", "prefix_hashes"]

UInt64 = NDArray[np.uint64]

# An odd number has powers that never vanish modulo 2**64.
_BASE = 0x9E3779B97F4A7C15 | 1


@dataclass(frozen=True)
class LaidOut:
    """Several requests, one after the other."""

    ids_S: NDArray[np.int64]
    """images unexpanded"""
    is_response_S: NDArray[np.bool_]
    starts: NDArray[np.int64]
    """where each request begins, and where the last one ends"""


def lay_out(requests: Sequence[ScoreRequest]) -> LaidOut:
    """The requests, turn by turn, in a few operations for all of them."""
    pieces: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    totals: list[int] = [0]
    for request in requests:
        prompt_ids, response_ids = request.prompt_ids, request.response_ids
        totals.append(len(prompt_ids) + len(response_ids))
        if len(request.prompt_lengths) == 1:
            pieces += (prompt_ids, response_ids)
            lengths += (len(prompt_ids), len(response_ids))
            continue
        prompt_at = response_at = 0
        for prompt_length, response_length in zip(
            request.prompt_lengths.tolist(), request.response_lengths.tolist(), strict=True
        ):
            pieces += (
                prompt_ids[prompt_at : prompt_at + prompt_length],
                response_ids[response_at : response_at + response_length],
            )
            lengths += (prompt_length, response_length)
            prompt_at, response_at = prompt_at + prompt_length, response_at + response_length
    flags = np.zeros(len(lengths), np.bool_)
    flags[1::2] = True
    ids_S = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
    return LaidOut(ids_S, np.repeat(flags, lengths), np.cumsum(totals))


def prefix_hashes(laid: LaidOut, requests: Sequence[ScoreRequest], image_token_id: int | None, seed: int) -> UInt64:
    """`hash_S`: of everything of its own request before each position, and of the seed."""
    tokens_S = laid.ids_S.astype(np.uint64)
    if image_token_id is not None:
        digests = [int(image.image_sha256[:16], 16) for request in requests for image in request.images]
        # One placeholder an image, in order: checked before.
        tokens_S[laid.ids_S == image_token_id] = np.array(digests, np.uint64)
    lengths = np.diff(laid.starts)
    place_S = np.arange(len(tokens_S)) - np.repeat(laid.starts[:-1], lengths)
    term_S = hash64(tokens_S) * _powers(int(lengths.max(initial=0)))[place_S]
    before_S = np.cumsum(term_S, dtype=np.uint64) - term_S
    own_S = before_S - np.repeat(before_S[laid.starts[:-1]], lengths) if len(lengths) else before_S
    return hash64(own_S + hash64(np.array([seed & (2**64 - 1)], np.uint64)))


def hash64(values: UInt64) -> UInt64:
    """A bijection of 64-bit numbers in which every bit depends on every bit (the finaliser of SplitMix64)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _powers(length: int) -> UInt64:
    powers = np.full(max(length, 1), _BASE, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
