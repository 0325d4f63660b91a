"""Rows of the lake to tensors. The only place where the student's batches are made.

A batch holds the student's own positions: placeholders are expanded to the number of tokens that *its* vision tower
makes of an image (`model_inputs`), and the rows that predict response tokens are asked of
`logitlake_shared.alignment`. The teacher's rows come from the lake's codec. Before the first step, the lake and the
student are checked to belong together.

Axes: B samples, S positions, R response rows of the batch, K cached entries, P pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitlake_schemas import CaptureSpec, Codec, Temperature
from logitlake_shared.alignment import interleave, predicting_rows
from logitlake_shared.errors import DataError, FingerprintMismatchError, LakeCorruptError, TrainingError
from logitlake_shared.reader import LakeDataset
from logitlake_shared.reader.order import Layout, epoch_order
from logitlake_shared.rendering import Renderer, without_images
from logitlake_shared.rows import LakePair, LakeSample
from logitlake_shared.topk import decode, tail_bound
from logitlake_student.config.targets import EntropyWeights, TokenWeights, VisualAdvantage
from logitlake_student.model_inputs import Expanded, ModelInputs

__all__ = [
    "EpochOrder",
    "PairCollator",
    "ReadableItems",
    "SampleCollator",
    "Sequences",
    "StudentInputs",
    "check_student_fits",
]

Batch = dict[str, Tensor]
Conversation = tuple[Any, Any, Any, Any, Sequence[bytes]]
"""prompt_ids, prompt_lengths, response_ids, response_lengths, encoded images"""

# Samples whose ids are rendered again before the first step.
_NUM_RENDERED_AGAIN = 8


def check_student_fits(spec: CaptureSpec, dataset: LakeDataset, renderer: Renderer) -> None:
    """Raises `FingerprintMismatchError` naming the field in which student and lake differ."""
    there, here = spec.tokenizer.model_dump(), renderer.identity().model_dump()
    differing = [
        f"{key}: {there[key]} in the lake, {here[key]} in the student" for key in there if there[key] != here[key]
    ]
    if differing:
        raise FingerprintMismatchError(
            f"the student does not belong to this lake: {'; '.join(differing)}. Its tokenizer must be the teacher's: "
            "same token ids, same chat template"
        )
    for position in range(min(_NUM_RENDERED_AGAIN, len(dataset))):
        sample = dataset[position]
        if not sample.messages:
            continue  # captured from token ids alone: there is no text to compare them with
        rendered = renderer.render(sample.messages)
        names = ["prompt_ids", "prompt_lengths", "response_ids", "response_lengths"]
        if sample.finish_reason != "given":
            # The tokens that a teacher writes need not be those that its text is cut into; what they say must agree.
            rendered, names = rendered.with_history_as_prompt(), ["prompt_ids", "prompt_lengths"]
            if renderer.decode(sample.response_ids) != sample.messages[-1]["content"]:
                names.append("response_ids")
        for name in names:
            if not np.array_equal(getattr(rendered, name), getattr(sample, name)):
                raise FingerprintMismatchError(
                    f"sample {sample.sample_id}: the student renders other {name} than the lake holds; its tokenizer "
                    "normalises or splits text differently from the teacher's"
                )


class ReadableItems:
    """A dataset of which damaged shards may take a part away: what cannot be read is left out and counted.

    `tell` gets the reason, once for each row group. Raises `LakeCorruptError` for the item that is one too many.
    """

    def __init__(self, dataset: Any, max_unreadable: float, tell: Callable[[str], None]) -> None:
        self._dataset, self._max_unreadable, self._tell = dataset, max_unreadable, tell
        self._told: set[str] = set()
        self.unreadable: set[int] = set()
        """positions, so far"""
        self.layout: Layout = dataset.layout

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Any:
        return self._dataset[position]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """Those at `positions` that can be read, in that order; see torch's DataLoader."""
        try:
            items: list[Any] = self._dataset.__getitems__(positions)
        except LakeCorruptError:
            items = [item for position in positions for item in self._readable(position)]
        return items

    def _readable(self, position: int) -> list[Any]:
        try:
            return [self._dataset[position]]
        except LakeCorruptError as error:
            self.unreadable.add(position)
            if len(self.unreadable) > self._max_unreadable * len(self):
                raise LakeCorruptError(
                    f"{error}; {len(self.unreadable)} of {len(self)} items cannot be read, `data.max_unreadable` is "
                    f"{self._max_unreadable}. Mend the lake with `logitlake verify --repair`, or raise it"
                ) from error
            if str(error) not in self._told:
                self._told.add(str(error))
                self._tell(f"left out: {error}")
            return []


class EpochOrder(torch.utils.data.Sampler[int]):
    """Positions of the samples for a whole stage: one epoch of `logitlake_shared.reader.order` after the other.

    The order is a function of the lake's snapshot, the seed and the epoch; it does not depend on workers or ranks, and
    step n of a resumed stage sees what step n of an uninterrupted one sees.
    """

    def __init__(self, layout: Layout, num_drawn: int, seed: int) -> None:
        self._layout, self._num_drawn, self._seed = layout, num_drawn, seed

    def __len__(self) -> int:
        return self._num_drawn

    def __iter__(self) -> Iterator[int]:
        drawn, epoch = 0, 0
        while drawn < self._num_drawn:
            order = epoch_order(self._layout, self._seed, epoch)
            yield from order[: self._num_drawn - drawn].tolist()
            drawn, epoch = drawn + len(order), epoch + 1


@dataclass(frozen=True)
class Sequences:
    """Token sequences of a batch, padded on the right, and their response rows as flat positions in [B·S]."""

    inputs: dict[str, Tensor]
    """the model's arguments by their names"""
    rows_R: Tensor
    label_ids_R: Tensor
    sequence_R: Tensor
    """which of the B sequences a row belongs to"""


class StudentInputs:
    """Makes what the student's forward pass takes.

    `context_length` is the number of positions that the student was made for, None where it does not say.
    """

    def __init__(self, model_inputs: ModelInputs, *, pad_id: int, context_length: int | None = None) -> None:
        self._model_inputs, self._pad_id, self._context_length = model_inputs, pad_id, context_length

    def sequences(self, conversations: Sequence[Conversation], names: Sequence[str]) -> Sequences:
        """Raises `TrainingError` naming the first conversation that is longer than the student's context, or shows
        images to a student that has no eyes."""
        if not conversations:
            raise TrainingError(
                "no sample of a micro-batch can be read; mend the lake with `logitlake verify --repair`, or raise "
                "`micro_batch_size`"
            )
        sequences = [
            self._expanded(conversation, name) for conversation, name in zip(conversations, names, strict=True)
        ]
        inputs = self._model_inputs.padded(sequences, pad_id=self._pad_id, side="right")
        longest = inputs["input_ids"].shape[1]
        rows = [predicting_rows(sequence.is_response_S) for sequence in sequences]
        labels = [sequence.ids_S[sequence.is_response_S] for sequence in sequences]
        return Sequences(
            inputs=inputs,
            rows_R=torch.from_numpy(np.concatenate([place * longest + rows_R for place, rows_R in enumerate(rows)])),
            label_ids_R=torch.from_numpy(np.concatenate(labels)),
            sequence_R=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(rows_R) for rows_R in rows])),
        )

    def _expanded(self, conversation: Conversation, name: str) -> Expanded:
        *segments, images = conversation
        try:
            sequence = self._model_inputs.expand(*interleave(*segments), images)
        except DataError as error:
            raise TrainingError(f"{name}: {error}; leave its task out by `tasks`") from None
        length = len(sequence.ids_S)
        if self._context_length is not None and length > self._context_length:
            raise TrainingError(
                f"{name}: {length} positions with its images expanded, the student was made for "
                f"{self._context_length}; leave its task out by `tasks`, or capture without it"
            )
        return sequence


@dataclass(frozen=True)
class SampleCollator:
    """Captured samples to a batch: inputs, response rows, labels, and the teacher's cached rows."""

    inputs: StudentInputs
    codec: Codec
    """of the lake that the samples come from"""
    temperature: Literal[1] | Temperature = 1
    """of the teacher's rows"""
    token_weights: TokenWeights | None = None
    """which tokens count more; None: none"""

    def __call__(self, samples: Sequence[LakeSample]) -> Batch:
        """The model's arguments, `rows_R`, `label_ids_R`, `topk_ids_RK`, `topk_logprobs_RK`, `log_tail_mass_R`,
        `log_bound_R` and `weight_R`. K is the largest k of the batch.
        """
        sequences = self.inputs.sequences(
            [(s.prompt_ids, s.prompt_lengths, s.response_ids, s.response_lengths, s.images) for s in samples],
            [f"sample {sample.sample_id}" for sample in samples],
        )
        batch = _as_batch(sequences)
        ids_RK, logprobs_RK, log_tail_R = decode([sample.rows for sample in samples], self.temperature)
        batch["topk_ids_RK"] = torch.from_numpy(ids_RK).long()
        batch["topk_logprobs_RK"] = torch.from_numpy(logprobs_RK)
        batch["log_bound_R"] = torch.from_numpy(
            np.concatenate([tail_bound(sample.rows, self.codec, self.temperature) for sample in samples])
        )
        batch["weight_R"] = torch.from_numpy(
            np.concatenate([token_weights(sample, self.token_weights) for sample in samples])
        )
        batch["log_tail_mass_R"] = torch.from_numpy(log_tail_R)
        return batch


def token_weights(sample: LakeSample, weights: TokenWeights | None) -> npt.NDArray[np.float32]:
    """How much each response token of a sample counts, float32. Raises `TrainingError` where the lake cannot tell."""
    weight_T = np.ones(len(sample.response_ids), np.float32)
    if isinstance(weights, EntropyWeights):
        weight_T += weights.strength * sample.rows.entropy_T
    # A question without an image has no advantage from it.
    if isinstance(weights, VisualAdvantage) and sample.image_sha256:
        if sample.label_logprob_no_image_T is None:
            raise TrainingError(
                f"sample {sample.sample_id}: expected the teacher's logprobs without the image for `visual_advantage`, "
                "the row holds none; capture with no_image_pass=true"
            )
        advantage_T = sample.rows.label_logprob_T - sample.label_logprob_no_image_T
        weight_T += weights.strength * np.clip(advantage_T, 0, weights.max_advantage)
    return weight_T


@dataclass(frozen=True)
class PairCollator:
    """Preference pairs to a batch: the P chosen conversations, then the P rejected ones, on the same images.

    With a `blind` renderer the P chosen ones follow once more, their prompts written without the images.
    """

    inputs: StudentInputs
    blind: Renderer | None = None

    def __call__(self, pairs: Sequence[LakePair]) -> Batch:
        """As a sample batch with B = 2P or 3P, plus `sequence_R`, the teacher's `reference_logp_B`, `length_B`, and
        `has_image_P`. Raises `TrainingError` where the teacher did not score a pair without its images."""
        sides = [
            [(p.prompt_ids, p.chosen_ids, p.chosen_logprobs, p.images) for p in pairs],
            [(p.prompt_ids, p.rejected_ids, p.rejected_logprobs, p.images) for p in pairs],
        ]
        if self.blind is not None:
            sides.append([_without_images(pair, self.blind) for pair in pairs])
        responses = [response for side in sides for response in side]
        sequences = self.inputs.sequences(
            [(prompt, [len(prompt)], ids, [len(ids)], images) for prompt, ids, _, images in responses],
            [f"pair {pair.pair_id}" for _ in sides for pair in pairs],
        )
        batch = _as_batch(sequences)
        batch["sequence_R"] = sequences.sequence_R
        batch["reference_logp_B"] = torch.tensor([float(lp.sum(dtype=np.float64)) for _, _, lp, _ in responses])
        batch["length_B"] = torch.tensor([float(len(lp)) for _, _, lp, _ in responses])
        batch["has_image_P"] = torch.tensor([float(bool(pair.image_sha256)) for pair in pairs])
        return batch


def _without_images(pair: LakePair, renderer: Renderer) -> tuple[Any, Any, Any, tuple[bytes, ...]]:
    """Prompt, response, the teacher's logprobs of it and images, of the chosen response to a prompt without images."""
    if not pair.image_sha256:
        return pair.prompt_ids, pair.chosen_ids, pair.chosen_logprobs, ()
    if pair.chosen_logprobs_no_image is None:
        raise TrainingError(
            f"pair {pair.pair_id}: expected the teacher's logprobs without the images for `image_weight`, the row "
            "holds none; score the pairs with no_image_pass=true"
        )
    prompt_ids = renderer.render_prompt(without_images(pair.messages))
    return prompt_ids, pair.chosen_ids, pair.chosen_logprobs_no_image, ()


def _as_batch(sequences: Sequences) -> Batch:
    return {**sequences.inputs, "rows_R": sequences.rows_R, "label_ids_R": sequences.label_ids_R}
