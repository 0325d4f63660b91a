"""What every teacher engine takes, gives and promises.

An engine is asked about whole samples (prompt segments and the responses between them) and answers with one set of
rows a sample: row j describes the distribution that predicts response token j. Ids go in unexpanded, one
placeholder an image; how many tokens an image becomes is the engine's own business and never leaves it, except as
`expanded_length`. A sample that cannot be scored comes back as a `SampleProblem`, and never harms its neighbours;
an engine that cannot go on raises `EngineError`.

The records carry numpy arrays and bytes only: they cross process borders.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from logitlake_schemas import SampledPolicy
from logitlake_schemas.records import EngineIdentity
from logitlake_shared.alignment import expand_images, interleave
from logitlake_shared.errors import DataError, ImageError
from logitlake_shared.images import DecodedImage
from logitlake_shared.topk import DrawnRows, TeacherRows

__all__ = [
    "CountImageTokens",
    "Engine",
    "EngineSetup",
    "ExpandedRequest",
    "Generation",
    "Int32Array",
    "SampleProblem",
    "ScoreRequest",
    "ScoredSample",
    "agree_label_ranks",
    "expand_request",
    "fit_request",
    "seed_of",
    "too_long_problem",
]

Int32Array = NDArray[np.int32]
CountImageTokens = Callable[[int, int], int]
"""(width, height) of an image -> tokens that it becomes. Raises `ImageError` (`image_shape`) where none fits."""


@dataclass(frozen=True)
class EngineSetup:
    """What the service tells an engine beside its own options."""

    model_dir: Path
    """folder of the teacher's checkpoint"""
    vocab_size: int
    """number of real tokens; entries of a padded lm_head beyond it are not tokens"""
    eos_id: int
    """closes every response"""
    image_token_id: int | None
    """placeholder of one image; none for a teacher that reads text only"""
    k: int
    """entries captured for each response token, at most `vocab_size`"""
    num_threads: int
    """CPU threads of the forward pass"""
    sampled: SampledPolicy | None = None
    """draws from the full distribution instead of its most probable entries, for engines that see all of it"""
    temperatures: tuple[float, ...] = ()
    """temperatures beside 1 at which the tail mass is captured, too"""


@dataclass(frozen=True)
class ScoreRequest:
    """One sample to score: alternating prompt segments and responses, ids unexpanded."""

    sample_id: str
    prompt_ids: Int32Array
    prompt_lengths: Int32Array
    response_ids: Int32Array
    response_lengths: Int32Array
    images: tuple[DecodedImage, ...] = ()
    """in the order of their placeholders; decoded under guard before any engine sees them"""


@dataclass(frozen=True)
class ExpandedRequest:
    """A request as the teacher sees it."""

    ids_S: NDArray[np.int64]
    """every image as many placeholders as it has tokens"""
    is_response_S: NDArray[np.bool_]


@dataclass(frozen=True)
class ScoredSample:
    """The teacher's rows for one sample, one row a response token."""

    sample_id: str
    rows: TeacherRows | DrawnRows
    """draws where the engine was set up for them"""
    expanded_length: int
    """length of the sequence that the teacher saw, images expanded"""


@dataclass(frozen=True)
class SampleProblem:
    """Why one sample could not be scored."""

    sample_id: str
    code: str
    """stable, for machines: `prompt_too_long`, `too_many_images`, `teacher_nonfinite`, …"""
    message: str
    """for people, with the figures"""


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn."""

    max_new_tokens: int
    n: int = 1
    """candidates of each request; they share one prefill of the prompt"""
    temperature: float = 0.0
    """0 is greedy and wants `n` = 1"""
    top_p: float = 1.0
    seed: int = 0
    """candidates depend on the seed and the request's id and prompt, not on its neighbours: see `seed_of`"""


@dataclass(frozen=True)
class Generation:
    """One candidate response."""

    response_ids: Int32Array
    """EOS included where the teacher said it"""
    finish_reason: Literal["stop", "length"]
    rows: TeacherRows
    """of the teacher's own distribution at T=1, whatever the candidate was drawn with: one row a response token"""
    expanded_length: int
    """length of prompt and response, images expanded"""


class Engine(Protocol):
    """A teacher. The same behaviour suite runs on every implementation (`tests/contract`)."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoredSample | SampleProblem]:
        """One answer a request, in the order of the requests. The same call gives the same bytes.

        Raises `EngineError` if the teacher itself cannot go on.
        """
        ...

    def generate(self, requests: Sequence[ScoreRequest], sampling: Sampling) -> list[list[Generation] | SampleProblem]:
        """`sampling.n` candidates for each request, whose responses are empty: one prompt segment, no response."""
        ...

    def describe(self) -> EngineIdentity:
        """Who computes the numbers; part of the cache's fingerprint."""
        ...

    def close(self) -> None:
        """Frees what the engine holds. Calling it twice is fine."""
        ...


def expand_request(
    request: ScoreRequest, image_token_id: int | None, tokens_per_image: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`(ids_S, is_response_S)` of what the teacher sees: `tokens_per_image[i]` placeholders for image i."""
    ids_S, is_response_S = interleave(
        request.prompt_ids, request.prompt_lengths, request.response_ids, request.response_lengths
    )
    if image_token_id is None and not tokens_per_image:
        return ids_S, is_response_S
    return expand_images(ids_S, is_response_S, image_token_id, tokens_per_image)


def fit_request(
    request: ScoreRequest,
    image_token_id: int | None,
    count_image_tokens: CountImageTokens,
    context_length: int,
    room: int = 0,
) -> ExpandedRequest | SampleProblem:
    """The request with its images expanded, if it fits the context with `room` tokens to spare.

    Else the problem: `prompt_too_long`, `image_placeholders` (a placeholder too many or too few, as in a prompt whose
    images were expanded already) or the code of an `ImageError`.
    """
    ids_S, is_response_S = expand_request(request, None, ())
    try:
        tokens_per_image = [count_image_tokens(image.width, image.height) for image in request.images]
        ids_S, is_response_S = expand_images(ids_S, is_response_S, image_token_id, tokens_per_image)
    except ImageError as error:
        code, _, message = str(error).partition(": ")
        return SampleProblem(request.sample_id, code, message)
    except DataError as error:
        return SampleProblem(request.sample_id, "image_placeholders", str(error))
    if len(ids_S) + room > context_length:
        return too_long_problem(request.sample_id, len(ids_S) + room, context_length)
    return ExpandedRequest(ids_S, is_response_S)


def seed_of(sampling: Sampling, request: ScoreRequest) -> int:
    """The seed of one request's candidates, 48 bits: no two requests of a call draw with the same random numbers."""
    digest = hashlib.sha256(f"{sampling.seed}:{request.sample_id}".encode()).digest()
    return int.from_bytes(digest[:6], "little")


def agree_label_ranks(
    topk_ids_TK: NDArray[np.int32], label_ids_T: NDArray[np.int32], rank_T: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Ranks of the labels that agree with the order of the top-k, ties included.

    Engines count equal logits differently. Here a label inside the top-k has the rank of its column (1 = first) and
    one outside has at least K + 1, so that `topk_ids[rank - 1] == label` whenever `rank <= K`.
    """
    is_label_TK = topk_ids_TK == label_ids_T[:, None]
    column_T = is_label_TK.argmax(axis=1) + 1
    outside_T = np.maximum(rank_T, topk_ids_TK.shape[1] + 1)
    return np.where(is_label_TK.any(axis=1), column_T, outside_T).astype(np.int32)


def too_long_problem(sample_id: str, expanded_length: int, context_length: int) -> SampleProblem:
    """The problem of a sample that does not fit the teacher's context, with both numbers."""
    return SampleProblem(
        sample_id,
        "prompt_too_long",
        f"the sample has {expanded_length} tokens with its images expanded, the teacher's context holds "
        f"{context_length}; shorten the sample or use a teacher with a longer context",
    )
