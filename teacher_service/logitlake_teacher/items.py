"""What a plan is made of: samples and pairs as token ids, and the units that they are captured in.

The records cross process borders: arrays, strings and bytes only.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitlake_schemas import UnitError
from logitlake_shared.alignment import interleave
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.messages import Messages

__all__ = ["Item", "PlannedPair", "PlannedSample", "Unit", "single_turn"]

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class PlannedSample:
    """One conversation, rendered: what a `Conversation` says, in ids."""

    sample_id: str
    task: str
    source: str
    split: str
    messages: Messages
    prompt_ids: Int32
    prompt_lengths: Int32
    response_ids: Int32
    response_lengths: Int32
    images: tuple[ImageRef, ...]
    image_sha256: tuple[str, ...]
    problem: UnitError | None = None
    """why it cannot be captured, where planning found that out; it becomes an error row of its unit"""

    @property
    def item_id(self) -> str:
        """The id under which errors and duplicates are reported."""
        return self.sample_id

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence, an image counted as one."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class PlannedPair:
    """One preference pair, rendered."""

    pair_id: str
    task: str
    source: str
    split: str
    messages: Messages
    prompt_ids: Int32
    chosen_ids: Int32
    rejected_ids: Int32
    images: tuple[ImageRef, ...]
    image_sha256: tuple[str, ...]
    problem: UnitError | None = None
    """why it cannot be captured, where planning found that out; it becomes an error row of its unit"""

    @property
    def item_id(self) -> str:
        """The id under which errors and duplicates are reported."""
        return self.pair_id

    @property
    def num_tokens(self) -> int:
        """Tokens of the two sequences, an image counted as one."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


Item = PlannedSample | PlannedPair


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work: it is captured by one engine and commits itself as a whole."""

    unit_id: str
    """`<number>-<content digest>`"""
    items: tuple[Item, ...]
    """all samples or all pairs"""

    @property
    def rows(self) -> pa.Table | None:
        """The items as a plan holds them (`planning.rows`), a row each; none for a unit that is not from a plan."""
        return None


def single_turn(sample: PlannedSample) -> PlannedSample:
    """The sample as a prompt that waits for its last answer: everything before that answer is one prompt segment.

    `response_ids` is the answer that the data gives, empty where it gives none; `messages` end with the user turn.
    """
    ids_S, _ = interleave(sample.prompt_ids, sample.prompt_lengths, sample.response_ids, sample.response_lengths)
    answer_length = int(sample.response_lengths[-1])
    prompt_length = len(ids_S) - answer_length
    # Token ids may come without their conversation.
    answered = bool(sample.messages) and sample.messages[-1]["role"] == "assistant"
    return replace(
        sample,
        messages=sample.messages[:-1] if answered else sample.messages,
        prompt_ids=ids_S[:prompt_length].astype(np.int32),
        prompt_lengths=np.array([prompt_length], np.int32),
        response_ids=ids_S[prompt_length:].astype(np.int32),
        response_lengths=np.array([answer_length], np.int32),
    )
