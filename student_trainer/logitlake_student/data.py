"""Rows of the lake to tensors. The only place where the student's batches are made.

A batch holds the student's own positions: placeholders are expanded to the number of tokens that *its* vision tower
makes of an image, and the rows that predict response tokens are asked of `logitlake_shared.alignment`. The teacher's
rows come from the lake's codec. Before the first step, the lake and the student are checked to belong together.

Axes: B samples, S positions, R response rows of the batch, K cached entries, P pairs.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitlake_schemas import CaptureSpec, Codec, Temperature, sha256_hex
from logitlake_shared.alignment import expand_images, interleave, predicting_rows
from logitlake_shared.errors import FingerprintMismatchError, TrainingError
from logitlake_shared.pixels import PixelLoader
from logitlake_shared.reader import LakeDataset
from logitlake_shared.reader.order import Layout, epoch_order
from logitlake_shared.rendering import Renderer
from logitlake_shared.rows import LakePair, LakeSample
from logitlake_shared.topk import decode, tail_bound
from logitlake_student.config.targets import EntropyWeights, TokenWeights, VisualAdvantage
from logitlake_student.model_inputs import tokens_per_image

__all__ = [
    "EpochOrder",
    "PairCollator",
    "SampleCollator",
    "Sequences",
    "StudentInputs",
    "check_student_fits",
    "tokens_per_image",
]

Batch = dict[str, Tensor]

# Preprocessed images kept in memory, in bytes. Small pictures are then decoded once, large ones as they come.
_PIXEL_CACHE_BYTES = 512 * 2**20
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

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    rows_R: Tensor
    label_ids_R: Tensor
    sequence_R: Tensor
    """which of the B sequences a row belongs to"""


class StudentInputs:
    """Makes what the student's forward pass takes.

    `load_pixels` is None for a text-only student; `context_length` is the number of positions that the student was
    made for, None where it does not say.
    """

    def __init__(
        self,
        *,
        pad_id: int,
        image_token_id: int | None,
        tokens_per_image: int,
        load_pixels: PixelLoader | None,
        context_length: int | None = None,
    ) -> None:
        self._context_length = context_length
        self._pad_id, self._image_token_id, self._tokens_per_image = pad_id, image_token_id, tokens_per_image
        self._load_pixels = load_pixels
        self._pixels: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def sequences(self, conversations: Sequence[tuple[Any, Any, Any, Any, int]]) -> Sequences:
        """Each conversation is (prompt_ids, prompt_lengths, response_ids, response_lengths, number of images)."""
        ids, rows, labels = [], [], []
        for *segments, num_images in conversations:
            ids_S, mask_S = expand_images(
                *interleave(*segments), self._image_token_id, [self._tokens_per_image] * num_images
            )
            rows_R = predicting_rows(mask_S)
            ids.append(ids_S)
            rows.append(rows_R)
            labels.append(ids_S[mask_S])
        longest = max(len(ids_S) for ids_S in ids)
        input_ids_BS = np.full((len(ids), longest), self._pad_id, np.int64)
        attention_mask_BS = np.zeros((len(ids), longest), np.int64)
        for place, ids_S in enumerate(ids):
            input_ids_BS[place, : len(ids_S)] = ids_S
            attention_mask_BS[place, : len(ids_S)] = 1
        return Sequences(
            input_ids_BS=torch.from_numpy(input_ids_BS),
            attention_mask_BS=torch.from_numpy(attention_mask_BS),
            rows_R=torch.from_numpy(np.concatenate([place * longest + rows_R for place, rows_R in enumerate(rows)])),
            label_ids_R=torch.from_numpy(np.concatenate(labels)),
            sequence_R=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(rows_R) for rows_R in rows])),
        )

    def check_length(self, sequences: Sequences, names: Sequence[str]) -> None:
        """Raises `TrainingError` naming the first sequence that is longer than the student's context."""
        for name, length in zip(names, sequences.attention_mask_BS.sum(dim=1).tolist(), strict=True):
            if self._context_length is not None and length > self._context_length:
                raise TrainingError(
                    f"{name}: {length} positions with its images expanded, the student was made for "
                    f"{self._context_length}; leave its task out by `tasks`, or capture without it"
                )

    def pixels(self, images: Sequence[bytes]) -> Tensor | None:
        """`pixel_values_NCHW` float32 of encoded images in order; None where there are none."""
        if not images:
            return None
        return torch.from_numpy(np.stack([self._one_image(data) for data in images]))

    def _one_image(self, data: bytes) -> npt.NDArray[np.float32]:
        if self._load_pixels is None:
            raise TrainingError("the batch holds an image but the student has no vision tower; filter it by `tasks`")
        key = sha256_hex(data)
        pixels = self._pixels.get(key)
        if pixels is None:
            pixels = self._load_pixels([data])[0]
            self._pixels[key] = pixels
            while len(self._pixels) * pixels.nbytes > _PIXEL_CACHE_BYTES:
                self._pixels.popitem(last=False)
        return pixels


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
        """`input_ids_BS`, `attention_mask_BS`, `rows_R`, `label_ids_R`, `topk_ids_RK`, `topk_logprobs_RK`,
        `log_tail_mass_R`, `log_bound_R`, `weight_R`, and `pixel_values` where there are images. K is the largest k of
        the batch.
        """
        sequences = self.inputs.sequences(
            [(s.prompt_ids, s.prompt_lengths, s.response_ids, s.response_lengths, len(s.images)) for s in samples]
        )
        self.inputs.check_length(sequences, [f"sample {sample.sample_id}" for sample in samples])
        batch = _as_batch(sequences, self.inputs.pixels([image for sample in samples for image in sample.images]))
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
    """Preference pairs to a batch: the P chosen conversations, then the P rejected ones, on the same images."""

    inputs: StudentInputs

    def __call__(self, pairs: Sequence[LakePair]) -> Batch:
        """As a sample batch with B = 2P, plus `sequence_R` and the teacher's `reference_logp_B`, `length_B`."""
        conversations = [
            (pair.prompt_ids, [len(pair.prompt_ids)], response_ids, [len(response_ids)], len(pair.images))
            for response in _RESPONSES
            for pair in pairs
            for response_ids in (response(pair)[0],)
        ]
        sequences = self.inputs.sequences(conversations)
        self.inputs.check_length(sequences, [f"pair {pair.pair_id}" for pair in (*pairs, *pairs)])
        batch = _as_batch(sequences, self.inputs.pixels([image for pair in (*pairs, *pairs) for image in pair.images]))
        logprobs = [response(pair)[1] for response in _RESPONSES for pair in pairs]
        batch["sequence_R"] = sequences.sequence_R
        batch["reference_logp_B"] = torch.tensor([float(lp.sum(dtype=np.float64)) for lp in logprobs])
        batch["length_B"] = torch.tensor([float(len(lp)) for lp in logprobs])
        return batch


_RESPONSES: tuple[Callable[[LakePair], tuple[Any, Any]], ...] = (
    lambda pair: (pair.chosen_ids, pair.chosen_logprobs),
    lambda pair: (pair.rejected_ids, pair.rejected_logprobs),
)


def _as_batch(sequences: Sequences, pixels_NCHW: Tensor | None) -> Batch:
    batch = {
        "input_ids_BS": sequences.input_ids_BS,
        "attention_mask_BS": sequences.attention_mask_BS,
        "rows_R": sequences.rows_R,
        "label_ids_R": sequences.label_ids_R,
    }
    if pixels_NCHW is not None:
        batch["pixel_values"] = pixels_NCHW
    return batch
