"""A unit's columns written as they are, and sample by sample: one table."""

from collections.abc import Callable

import numpy as np

from logitlake_shared.lake import UnitResult
from logitlake_shared.messages import messages_text
from logitlake_shared.rows import LakeSample, samples_to_table, stored_table
from logitlake_shared.topk import join

DESCRIBED = (
    "sample_id",
    "task",
    "source",
    "split",
    "prompt_ids",
    "prompt_lengths",
    "response_ids",
    "response_lengths",
    "expanded_length",
    "image_sha256",
    "finish_reason",
)


def test_columns_as_they_are_make_the_table_of_the_samples(make_unit: Callable[..., UnitResult]) -> None:
    """With and without a logprob for the image left out; every column, its type and its nulls."""
    samples = [sample for sample in make_unit(1, num_samples=5).samples if isinstance(sample, LakeSample)]
    no_image = [None, np.arange(4, dtype=np.float32), None, None, np.zeros(4, np.float32)]
    for given in (no_image, [None] * 5):
        with_pass = [
            LakeSample(**{**vars(sample), "label_logprob_no_image_T": own})
            for sample, own in zip(samples, given, strict=True)
        ]
        described = {
            **{name: [getattr(sample, name) for sample in samples] for name in DESCRIBED},
            "messages": [messages_text(sample.messages) for sample in samples],
            "label_logprob_no_image": given,
        }
        table = stored_table(described, join([sample.rows for sample in samples]))
        assert table.equals(samples_to_table(with_pass))
