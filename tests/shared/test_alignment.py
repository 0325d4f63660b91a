"""Which position predicts which token."""

import numpy as np
import pytest

from logitlake_shared.alignment import expand_images, interleave, predicting_rows
from logitlake_shared.errors import DataError


def test_two_turns_with_an_image_by_hand() -> None:
    """<img> a | x E | b | y E with 3 tokens an image:

    position  0 1 2 3 4 5 6 7 8        responses stand at 4 5 and 7 8,
    token     I I I a x E b y E        so rows 3 4 and 6 7 predict them
    """
    ids, mask = interleave([99, 10, 11], [2, 1], [20, 1, 21, 1], [2, 2])
    assert ids.tolist() == [99, 10, 20, 1, 11, 21, 1]
    ids, mask = expand_images(ids, mask, 99, [3])
    assert ids.tolist() == [99, 99, 99, 10, 20, 1, 11, 21, 1]
    assert predicting_rows(mask).tolist() == [3, 4, 6, 7]
    assert ids[predicting_rows(mask) + 1].tolist() == [20, 1, 21, 1]


def test_rows_point_at_the_token_before_whatever_the_expansion() -> None:
    """ids[rows + 1] is the response for every image size: cached rows survive another image tokenizer."""
    response = [4, 5, 1]
    for tokens_per_image in (1, 2, 16, 576):
        ids, mask = expand_images(*interleave([99, 7], [2], response, [3]), 99, [tokens_per_image])
        assert ids[predicting_rows(mask) + 1].tolist() == response


def test_what_does_not_add_up_is_refused() -> None:
    """Lengths, placeholders and beginnings that do not fit each raise, with the numbers."""
    with pytest.raises(DataError, match="lengths"):
        interleave([1, 2], [1], [3], [1])
    ids, mask = interleave([99, 7], [2], [3], [1])
    with pytest.raises(DataError, match="1 image placeholders but 2 images"):
        expand_images(ids, mask, 99, [4, 4])
    with pytest.raises(DataError, match="inside a response"):
        expand_images(ids, np.array([True, False, False]), 99, [4])
    with pytest.raises(DataError, match="begins with a response"):
        predicting_rows(np.array([True]))
