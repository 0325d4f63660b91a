"""Which position predicts which token. Decided here and nowhere else.

A causal model's hidden state at position i - 1 describes the distribution of token i. Everything that pairs a
distribution with a token (the teacher engines, the student's collator) asks this module for the rows; nobody else
adds or subtracts one. Positions are never stored: teacher and student expand an image to different numbers of
tokens, so what travels is row j = the distribution that predicts response token j, and both sides find their own
positions from the token ids. (The reference code of arXiv 2408.15881 pairs p(token i + 1) with token i's mask.)
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from logitlake_shared.errors import DataError

__all__ = ["expand_images", "interleave", "predicting_rows"]

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def interleave(
    prompt_ids: npt.ArrayLike,
    prompt_lengths: Sequence[int] | npt.NDArray[np.integer],
    response_ids: npt.ArrayLike,
    response_lengths: Sequence[int] | npt.NDArray[np.integer],
) -> tuple[Ids, Mask]:
    """Prompt segment, response, prompt segment, response, … as one sequence.

    Returns `ids_S` (int64) and `is_response_S` (bool). Raises `DataError` when the lengths do not add up.
    """
    prompts, responses = np.asarray(prompt_ids, np.int64), np.asarray(response_ids, np.int64)
    if (
        len(prompt_lengths) != len(response_lengths)
        or sum(prompt_lengths) != len(prompts)
        or sum(response_lengths) != len(responses)
    ):
        raise DataError(
            f"prompt and response lengths do not fit their ids: {list(prompt_lengths)} for {len(prompts)} prompt ids, "
            f"{list(response_lengths)} for {len(responses)} response ids; expected one prompt segment before each "
            "response and lengths that sum to the ids"
        )
    ids, mask, prompt_at, response_at = [], [], 0, 0
    for prompt_length, response_length in zip(prompt_lengths, response_lengths, strict=True):
        ids += [
            prompts[prompt_at : prompt_at + prompt_length],
            responses[response_at : response_at + response_length],
        ]
        mask += [np.zeros(prompt_length, np.bool_), np.ones(response_length, np.bool_)]
        prompt_at, response_at = prompt_at + int(prompt_length), response_at + int(response_length)
    return np.concatenate(ids), np.concatenate(mask)


def expand_images(
    ids_S: Ids, is_response_S: Mask, image_token_id: int | None, tokens_per_image: Sequence[int]
) -> tuple[Ids, Mask]:
    """Repeats the i-th image placeholder `tokens_per_image[i]` times.

    Raises `DataError` when the number of placeholders is not the number of images, or one stands in a response.
    """
    is_image_S = np.zeros(len(ids_S), np.bool_) if image_token_id is None else ids_S == image_token_id
    if int(is_image_S.sum()) != len(tokens_per_image):
        raise DataError(
            f"the prompt holds {int(is_image_S.sum())} image placeholders but {len(tokens_per_image)} images were "
            "given; write <image> once for each image, in the order of the images"
        )
    if bool((is_image_S & is_response_S).any()):
        raise DataError("an image placeholder stands inside a response; only prompts can hold images")
    repeats_S = np.ones(len(ids_S), np.int64)
    repeats_S[is_image_S] = tokens_per_image
    return np.repeat(ids_S, repeats_S), np.repeat(is_response_S, repeats_S)


def predicting_rows(is_response_S: Mask) -> Ids:
    """`rows_R`: for each response token, in order, the position whose hidden state predicts it.

    Raises `DataError` when the sequence begins with a response token, which nothing predicts.
    """
    if len(is_response_S) and bool(is_response_S[0]):
        raise DataError("the sequence begins with a response token, which no position predicts; give it a prompt")
    return np.flatnonzero(is_response_S).astype(np.int64) - 1
