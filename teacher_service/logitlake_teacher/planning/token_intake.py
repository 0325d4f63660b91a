"""From token ids to a plan's rows: checked against the teacher and digested, column by column.

What `intake` is to conversations, without a template, a tokenizer or an object for each row. A row that the teacher
cannot be asked about becomes a row with a problem, as there, so that planning sees all faults of the data in one run.

Axes: N rows, R responses of all rows, one row after the other.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from logitlake_shared.data_formats import ImageRef
from logitlake_shared.data_formats.columns import NumberLists, RowProblems
from logitlake_shared.data_formats.tokens import TOKEN_LISTS, TokenBatch
from logitlake_shared.messages import messages_text
from logitlake_shared.rendering import Renderer
from logitlake_teacher.engines.base import too_long_problem
from logitlake_teacher.planning.intake import RECORD_INVALID, image_fault
from logitlake_teacher.planning.rows import rows_of_columns

__all__ = ["TokenIntake"]

_TOO_LONG = too_long_problem("", 0, 0).code
# What a row that cannot be used still says: nothing but its id, its place and its problem.
_BLANK = {"task": "", "source": "", "split": "", "messages": messages_text([]), **dict.fromkeys(TOKEN_LISTS, ())}


@dataclass(frozen=True)
class TokenIntake:
    """How token ids become rows: what the teacher's tokenizer and context allow."""

    vocab_size: int
    eos_id: int
    image_token_id: int | None
    context_length: int
    open_end: bool
    """the last response may be empty: the teacher is to write it"""
    tolerant: bool
    """the source lets problems pass"""

    @classmethod
    def of(cls, renderer: Renderer, context_length: int, *, open_end: bool, tolerant: bool) -> "TokenIntake":
        """For the teacher of this renderer."""
        own = renderer.vocab_size, renderer.eos_id, renderer.image_token_id
        return cls(*own, context_length, open_end, tolerant)

    def rows(self, batches: Iterable[TokenBatch]) -> Iterator[pa.RecordBatch]:
        """The rows of each batch, in order."""
        return (self._rows_of(batch) for batch in batches if len(batch))

    def _rows_of(self, batch: TokenBatch) -> pa.RecordBatch:
        columns = {name: batch.columns.column(name) for name in batch.columns.schema.names}
        columns["item_id"] = columns.pop("sample_id")
        images = batch.images
        invalid, too_long = RowProblems.of(columns.pop("problem")), RowProblems(len(batch))
        self._check(columns, images, invalid, too_long)
        if invalid or too_long:
            is_bad_N = invalid.mask() | too_long.mask()
            for name, blank in _BLANK.items():
                own = columns[name]
                columns[name] = pc.if_else(pa.array(is_bad_N), pa.scalar(blank, own.type), own)
            if images is not None:
                images = tuple(() if bad else own for own, bad in zip(images, is_bad_N.tolist(), strict=True))
        # A row that is wrong in itself is told so, however long it is.
        columns["problem_code"] = pc.coalesce(_code(RECORD_INVALID, invalid), _code(_TOO_LONG, too_long))
        columns["problem_message"] = pc.coalesce(invalid.column(), too_long.column())
        return rows_of_columns("samples", columns, images, tolerant=self.tolerant)

    def _check(
        self,
        columns: Mapping[str, pa.Array],
        images: Sequence[tuple[ImageRef, ...]] | None,
        invalid: RowProblems,
        too_long: RowProblems,
    ) -> None:
        lists = {name: NumberLists.of(columns[name]) for name in TOKEN_LISTS}
        prompts, responses = lists["prompt_ids"], lists["response_ids"]
        self._check_vocabulary("prompt_ids", prompts, invalid)
        self._check_vocabulary("response_ids", responses, invalid)
        self._check_responses(lists, invalid)
        self._check_images(prompts, responses, images, invalid)
        length_N = prompts.sizes + responses.sizes
        for row in np.flatnonzero(length_N > self.context_length).tolist():
            too_long.add(row, too_long_problem("", int(length_N[row]), self.context_length).message)

    def _check_vocabulary(self, name: str, ids: NumberLists, invalid: RowProblems) -> None:
        # One comparison for both ends: a negative number is a large unsigned one.
        for place in np.flatnonzero(ids.values.view(np.uint32) >= self.vocab_size).tolist():
            row = ids.row_of(place)
            invalid.add(
                row,
                f"`{name}` holds {ids.values[place]} at place {place - ids.starts[row]}, the teacher's vocabulary has "
                f"ids from 0 to {self.vocab_size - 1}; are the ids another tokenizer's?",
            )

    def _check_responses(self, lists: Mapping[str, NumberLists], invalid: RowProblems) -> None:
        """There is something before the first response, and each ends with EOS, as every response of a lake does."""
        prompts, responses = lists["prompt_lengths"], lists["response_lengths"]
        starts = responses.starts
        has_any_N = responses.sizes > 0
        firsts, lasts = starts[:-1][has_any_N], starts[1:][has_any_N] - 1
        for turn in firsts[prompts.values[firsts] == 0].tolist():
            invalid.add(responses.row_of(turn), "the first prompt segment is empty, and nothing predicts the response")
        is_empty_R = responses.values == 0
        if self.open_end:
            is_empty_R[lasts] = False
        for turn in np.flatnonzero(is_empty_R).tolist():
            row = responses.row_of(turn)
            invalid.add(row, f"response {turn - starts[row]} is empty; a response has its EOS at least")
        # A row that the reader found wrong has no ids, so that the lengths of all others sum to those that are here.
        turns = np.flatnonzero(responses.values > 0)
        last_ids = lists["response_ids"].values[np.cumsum(responses.values, dtype=np.int64)[turns] - 1]
        for place in np.flatnonzero(last_ids != self.eos_id).tolist():
            row = responses.row_of(turns[place])
            invalid.add(
                row,
                f"response {turns[place] - starts[row]} ends with {last_ids[place]} and not with the teacher's EOS, "
                f"{self.eos_id}; end it with that, or leave the row out if it was cut short",
            )

    def _check_images(
        self,
        prompts: NumberLists,
        responses: NumberLists,
        images: Sequence[tuple[ImageRef, ...]] | None,
        invalid: RowProblems,
    ) -> None:
        token = self.image_token_id
        nothing_N = np.zeros(len(prompts.sizes), np.int64)
        num_images_N = nothing_N if images is None else np.array([len(own) for own in images], np.int64)
        num_placeholders_N = nothing_N if token is None else prompts.count(token)
        num_misplaced_N = nothing_N if token is None else responses.count(token)
        for row in np.flatnonzero((num_placeholders_N != num_images_N) | (num_misplaced_N > 0)).tolist():
            fault = image_fault(token, int(num_images_N[row]), int(num_placeholders_N[row]), num_misplaced_N[row] > 0)
            if fault is not None:
                invalid.add(row, fault)


def _code(code: str, problems: RowProblems) -> pa.Array:
    """The code where there is a problem, else null."""
    return pc.if_else(problems.column().is_valid(), pa.scalar(code), pa.scalar(None, pa.string()))
