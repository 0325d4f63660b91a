"""What a vLLM engine must prove before it captures anything: route against route, and order against order.

A few made-up samples (one and two turns, with images where the teacher sees them, responses of one token and of many)
are scored on the engine itself. `probe_span_hook` compares the span hook with vLLM's own prompt logprobs;
`check_batch_order` compares the samples together, in reverse and alone. A fault in either (rows shifted by one, rows of
a neighbour, uninitialised memory) moves logprobs by whole nats; rounding does not.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from logitlake_schemas import sha256_hex
from logitlake_shared.errors import EngineError
from logitlake_shared.images import DecodedImage
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.engines.base import EngineSetup, SampleProblem, ScoredSample, ScoreRequest

__all__ = ["ROUNDING_NATS", "check_batch_order", "largest_difference", "probe_requests", "probe_span_hook"]

# How far two right answers may be apart, in nats. In float32 it is the worst row that counts: sums in another order
# give 1e-5, a GPU's TF32 a few 1e-4. In half precision logits of size 20 are spaced by 0.02 (float16) and 0.125
# (bfloat16), and a mixture of experts may route a token elsewhere, so there it is the mean over a sample's rows.
ROUNDING_NATS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}

# (tokens of each prompt segment, tokens of each response, images)
_SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...] = (
    ((5,), (7,), 0),
    ((3, 2), (4, 9), 0),
    ((11,), (1,), 0),
    ((2,), (23,), 0),
    ((6,), (5,), 1),
    ((4, 3), (6, 2), 1),
    ((8,), (12,), 2),
    ((17,), (3,), 0),
)
# Coprime to every vocabulary that is not a multiple of it: the ids wander through all of them.
_STRIDE = 7919
_IMAGE_SIDE = 64

Score = Callable[[Sequence[ScoreRequest]], list[ScoredSample | SampleProblem]]


def probe_requests(setup: EngineSetup, sees_images: bool) -> list[ScoreRequest]:
    """The made-up samples; the same for the same teacher."""
    requests = []
    for number, (prompt_lengths, response_lengths, num_images) in enumerate(_SHAPES):
        prompt_ids = _ids(setup, 100 * number, sum(prompt_lengths))
        images = tuple(_image(10 * number + place) for place in range(num_images if sees_images else 0))
        if setup.image_token_id is not None:
            # Behind the first token, so that the sample does not begin with an image.
            prompt_ids[1 : 1 + len(images)] = setup.image_token_id
        requests.append(
            ScoreRequest(
                f"probe-{number}",
                prompt_ids,
                np.array(prompt_lengths, np.int32),
                _ids(setup, 100 * number + 50, sum(response_lengths)),
                np.array(response_lengths, np.int32),
                images,
            )
        )
    return requests


def probe_span_hook(stock: Score, hook: Score, requests: Sequence[ScoreRequest], dtype: str) -> str | None:
    """Why the hook must not be used: the first difference from vLLM's own rows beyond rounding; None without one."""
    for request, one, other in zip(requests, stock(requests), hook(requests), strict=True):
        found = _disagreement(one, other, dtype)
        if found is not None:
            return (
                f"sample {request.sample_id!r} of the start-up probe: vLLM's prompt logprobs and the span hook {found}"
            )
    return None


def check_batch_order(score: Score, requests: Sequence[ScoreRequest], dtype: str) -> None:
    """Raises `EngineError` when a sample's rows depend on what it is batched with."""
    together = score(requests)
    others = {
        "in reverse order": score(requests[::-1])[::-1],
        "alone": [score([request])[0] for request in requests],
    }
    for manner, answers in others.items():
        for request, one, other in zip(requests, together, answers, strict=True):
            found = _disagreement(one, other, dtype)
            if found is not None:
                raise EngineError(
                    f"sample {request.sample_id!r} of the start-up check: its rows in one batch and {manner} {found}; "
                    "this build of vLLM mixes up samples on this machine, so nothing was captured"
                )


def _disagreement(one: ScoredSample | SampleProblem, other: ScoredSample | SampleProblem, dtype: str) -> str | None:
    if isinstance(one, SampleProblem) or isinstance(other, SampleProblem):
        # A made-up sample may be too long for a small context, or hold more images than are allowed.
        return None if type(one) is type(other) else f"do not both answer: {one}, {other}"
    assert isinstance(one.rows, TeacherRows)
    assert isinstance(other.rows, TeacherRows)
    if len(one.rows.label_logprob_T) != len(other.rows.label_logprob_T):
        return f"have {len(one.rows.label_logprob_T)} and {len(other.rows.label_logprob_T)} rows"
    difference_T = largest_difference(one.rows, other.rows)
    figure = float(difference_T.max() if dtype == "float32" else difference_T.mean())
    # Written so that NaN is a disagreement.
    if figure <= ROUNDING_NATS[dtype]:
        return None
    which = "by up to" if dtype == "float32" else "on average by"
    return f"differ {which} {figure:.3g} nats, at most {ROUNDING_NATS[dtype]} is rounding in {dtype}"


def largest_difference(one: TeacherRows, other: TeacherRows) -> NDArray[np.float64]:
    """For each row, how far apart the two accounts of one distribution are, in nats.

    Compared are the label's logprob and each id's (an id that only one side lists can have at most the other's last
    logprob, so equal logprobs that changed places count nothing), and of the tail its mass: one side may know it only
    to the rounding of 1.
    """
    label_T = np.abs(one.label_logprob_T.astype(np.float64) - other.label_logprob_T)
    tail_T = np.abs(np.exp(one.log_tail_mass_T.astype(np.float64)) - np.exp(other.log_tail_mass_T.astype(np.float64)))
    worst_T: NDArray[np.float64] = np.max([label_T, tail_T, _ids_apart(one, other), _ids_apart(other, one)], axis=0)
    return worst_T


def _ids_apart(one: TeacherRows, other: TeacherRows) -> NDArray[np.float64]:
    own_TK, theirs_TK = one.topk_logprobs_TK.astype(np.float64), other.topk_logprobs_TK.astype(np.float64)
    same_TKK = one.topk_ids_TK[:, :, None] == other.topk_ids_TK[:, None, :]
    listed_TK = same_TKK.any(axis=2)
    their_value_TK = np.take_along_axis(theirs_TK, same_TKK.argmax(axis=2), axis=1)
    above_last_TK = np.maximum(own_TK - theirs_TK[:, -1:], 0)
    apart_T: NDArray[np.float64] = np.where(listed_TK, np.abs(own_TK - their_value_TK), above_last_TK).max(axis=1)
    return apart_T


def _ids(setup: EngineSetup, first: int, count: int) -> NDArray[np.int32]:
    """Token ids of no meaning, none of them an image."""
    ids = (first + _STRIDE * np.arange(count, dtype=np.int64)) % setup.vocab_size
    if setup.image_token_id is not None:
        ids[ids == setup.image_token_id] = setup.eos_id
    return ids.astype(np.int32)


def _image(seed: int) -> DecodedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(_IMAGE_SIDE, _IMAGE_SIDE, 3), dtype=np.uint8)
    return DecodedImage(sha256_hex(pixels.tobytes()), pixels)
