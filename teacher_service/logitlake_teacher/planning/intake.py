"""From records to a plan's rows: rendered, checked and digested, a batch at a time and on several cores.

A record that cannot be used becomes a row with a problem, so that planning sees all faults of the data in one run
and says them together; whether they end the command is the source's `on_bad_record`.

Rendering is what planning spends its time on (a chat template is a program, run for each conversation). After the
first batches it moves to worker processes, which small data never needs.
"""

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitlake_schemas import CacheKind, UnitError
from logitlake_shared.alignment import interleave
from logitlake_shared.data_formats import BadRecord, Conversation, PreferencePair
from logitlake_shared.errors import DataError
from logitlake_shared.rendering import Rendered, Renderer
from logitlake_teacher.items import PlannedPair, PlannedSample
from logitlake_teacher.planning.rows import Draft, rows_of

__all__ = ["RECORD_INVALID", "Intake", "image_fault"]

RECORD_INVALID = "record_invalid"
"""code of a record that cannot be read or rendered"""

# Conversations rendered at once: the tokenizer is several times faster on many texts.
_BATCH = 512
# Processes cost seconds to start; so many batches take no longer here.
_BATCHES_HERE = 64
_NO_IDS = np.zeros(0, np.int32)

_Record = Conversation | PreferencePair | BadRecord


@dataclass(frozen=True)
class Intake:
    """How the records of a source become rows."""

    kind: CacheKind
    model_dir: Path
    open_end: bool
    """a conversation may wait for its last answer"""
    tolerant: bool
    """the source lets problems pass"""
    processes: int

    def rows(self, records: Iterable[_Record], renderer: Renderer) -> Iterator[pa.RecordBatch]:
        """The records' rows in order; `renderer` is that of `model_dir`, for the first of them.

        Raises `DataError` for records that a capture of this kind cannot use at all.
        """
        batches = _batches(records)
        for batch in itertools.islice(batches, _BATCHES_HERE):
            yield self._rows_of(batch, renderer)
        following = next(batches, None)
        if following is None:
            return
        batches = itertools.chain([following], batches)
        if self.processes == 1:
            for batch in batches:
                yield self._rows_of(batch, renderer)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.processes, context, _start_worker, (self,)) as pool:
            # Two a process in flight: none waits, and memory is bounded however fast the records come.
            yield from _in_order((pool.submit(_work, batch) for batch in batches), in_flight=2 * self.processes)

    def _rows_of(self, batch: Sequence[_Record], renderer: Renderer) -> pa.RecordBatch:
        make = _samples if self.kind == "samples" else _pairs
        return rows_of(self.kind, make(batch, renderer, self.open_end), tolerant=self.tolerant)


_worker: tuple[Intake, Renderer]


def _start_worker(intake: Intake) -> None:
    global _worker
    # Each process is one of as many as there are cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (intake, Renderer(intake.model_dir))


def _work(batch: Sequence[_Record]) -> pa.RecordBatch:
    intake, renderer = _worker
    return intake._rows_of(batch, renderer)


def _in_order(futures: Iterator["Future[pa.RecordBatch]"], in_flight: int) -> Iterator[pa.RecordBatch]:
    waiting: deque[Future[pa.RecordBatch]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(records: Iterable[_Record]) -> Iterator[list[_Record]]:
    stream = iter(records)
    while batch := list(itertools.islice(stream, _BATCH)):
        yield batch


def _samples(batch: Sequence[_Record], renderer: Renderer, open_end: bool) -> list[Draft]:
    conversations = [record for record in batch if isinstance(record, Conversation)]
    rendered = iter(renderer.render_batch([record.messages for record in conversations], open_end=open_end))
    made = []
    for record in batch:
        if not isinstance(record, Conversation):
            made.append(_bad("samples", record))
            continue
        ids = _checked(record, next(rendered), renderer)
        made.append(
            _unusable("samples", record.where, record.sample_id, str(ids))
            if isinstance(ids, DataError)
            else Draft(
                record.where,
                PlannedSample(
                    sample_id=record.sample_id,
                    task=record.task,
                    source=record.source,
                    split=record.split,
                    messages=record.messages,
                    prompt_ids=ids.prompt_ids,
                    prompt_lengths=ids.prompt_lengths,
                    response_ids=ids.response_ids,
                    response_lengths=ids.response_lengths,
                    images=record.images,
                    image_sha256=(),
                ),
            )
        )
    return made


def _pairs(batch: Sequence[_Record], renderer: Renderer, open_end: bool) -> list[Draft]:
    del open_end  # a pair has both of its answers
    pairs = [record for record in batch if isinstance(record, PreferencePair)]
    turns = [
        [*record.messages, {"role": "assistant", "content": answer}]
        for record in pairs
        for answer in (record.chosen, record.rejected)
    ]
    rendered = iter(renderer.render_batch(turns))
    made = []
    for record in batch:
        if not isinstance(record, PreferencePair):
            made.append(_bad("pairs", record))
            continue
        chosen, rejected = _checked(record, next(rendered), renderer), next(rendered)
        if isinstance(chosen, DataError) or isinstance(rejected, DataError):
            why = chosen if isinstance(chosen, DataError) else rejected
            made.append(_unusable("pairs", record.where, record.pair_id, str(why)))
            continue
        made.append(
            Draft(
                record.where,
                PlannedPair(
                    pair_id=record.pair_id,
                    task=record.task,
                    source=record.source,
                    split=record.split,
                    messages=record.messages,
                    # The history of a conversation is prompt here: a pair is about its last answer.
                    prompt_ids=_history(chosen),
                    chosen_ids=_last(chosen),
                    rejected_ids=_last(rejected),
                    images=record.images,
                    image_sha256=(),
                ),
            )
        )
    return made


def _checked(
    record: Conversation | PreferencePair, rendered: Rendered | DataError, renderer: Renderer
) -> Rendered | DataError:
    """The ids, if the placeholders in them are as many as the record's images and the teacher can see any."""
    if isinstance(rendered, DataError):
        return rendered
    token = renderer.image_token_id
    num_placeholders = 0 if token is None else rendered.prompt_ids.tolist().count(token)
    misplaced = token is not None and token in rendered.response_ids.tolist()
    fault = image_fault(token, len(record.images), num_placeholders, misplaced)
    return rendered if fault is None else DataError(fault)


def image_fault(token: int | None, num_images: int, num_placeholders: int, misplaced: bool) -> str | None:
    """Why a record's images do not fit the placeholders in its ids, or the teacher; `token` is the placeholder."""
    if token is None:
        return (
            f"it has {num_images} images, but the teacher reads text only; use a multimodal one" if num_images else None
        )
    if num_placeholders != num_images:
        return (
            f"the prompt holds {num_placeholders} image placeholders but {num_images} images were given; write "
            "<image> once for each image, in the order of the images"
        )
    return "an image placeholder stands inside a response; only prompts can hold images" if misplaced else None


def _history(rendered: Rendered) -> npt.NDArray[np.int32]:
    ids_S, _ = interleave(
        rendered.prompt_ids, rendered.prompt_lengths, rendered.response_ids, rendered.response_lengths
    )
    return ids_S[: len(ids_S) - int(rendered.response_lengths[-1])].astype(np.int32)


def _last(rendered: Rendered) -> npt.NDArray[np.int32]:
    return rendered.response_ids[len(rendered.response_ids) - int(rendered.response_lengths[-1]) :]


def _bad(kind: CacheKind, record: _Record) -> Draft:
    if not isinstance(record, BadRecord):
        raise DataError(f"{record.where}: a {kind} capture cannot use this source; see `[[data]] type`")
    return _unusable(kind, record.where, record.where, record.reason)


def _unusable(kind: CacheKind, where: str, item_id: str, reason: str) -> Draft:
    problem = UnitError(sample_id=item_id, code=RECORD_INVALID, message=reason)
    sample = PlannedSample(item_id, "", "", "", [], _NO_IDS, _NO_IDS, _NO_IDS, _NO_IDS, (), (), problem)
    pair = PlannedPair(item_id, "", "", "", [], _NO_IDS, _NO_IDS, _NO_IDS, (), (), problem)
    return Draft(where, sample if kind == "samples" else pair)
