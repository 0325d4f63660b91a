"""What a checkpoint's forward pass takes: token ids with every image's placeholders, and what its tower reads.

One place for every family of students: a LLaVA, whose images all become as many tokens as its tower has patches; a
Qwen-VL, whose images keep their shape; a language model that reads text only. Pixels come from the image processor
that lies beside the weights, on its PIL path, as everywhere in LogitLake.

Axes: B sequences, S positions, N images.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitlake_schemas import sha256_hex
from logitlake_shared.alignment import expand_images
from logitlake_shared.errors import DataError
from logitlake_shared.images import decode_image
from logitlake_shared.pixels import PixelLoader, load_pixels

__all__ = ["Expanded", "ModelInputs", "tokens_per_image"]

# Processed images kept, in bytes: small pictures are then decoded once, large ones as they come.
_CACHE_BYTES = 512 * 2**20
_TOWERS_WITH_CLASS_TOKEN = {"clip_vision_model"}

ImageInputs = Mapping[str, npt.NDArray[Any]]
"""what a processor makes of one image, by the name of the model's argument"""


@dataclass(frozen=True)
class Expanded:
    """One sequence as the model sees it."""

    ids_S: npt.NDArray[np.int64]
    is_response_S: npt.NDArray[np.bool_]
    images: tuple[ImageInputs, ...]


def tokens_per_image(config: Any) -> int:
    """Tokens that one image becomes in a LLaVA: the patches of its tower, and its class token if it has one.

    `vision_feature_select_strategy = "default"` drops the first of them, whatever it is.
    """
    vision = config.vision_config
    num_patches = (int(vision.image_size) // int(vision.patch_size)) ** 2
    has_class_token = vision.model_type in _TOWERS_WITH_CLASS_TOKEN
    return num_patches + int(has_class_token) - int(config.vision_feature_select_strategy == "default")


class ModelInputs:
    """Makes a model's inputs.

    `loader` is None for a model that reads text only. `merge_size` is how many patches along each side one token of a
    Qwen-VL is made of; without it every image becomes `tokens_per_image` tokens.
    """

    def __init__(
        self,
        *,
        image_token_id: int | None,
        loader: PixelLoader | None,
        tokens_per_image: int = 0,
        merge_size: int | None = None,
    ) -> None:
        self._placeholder = image_token_id
        self._loader = loader
        # Only a family with images of many shapes needs to be told where they stand.
        self._merge_size = merge_size
        self._num_tokens = tokens_per_image
        self._cached: OrderedDict[str, ImageInputs] = OrderedDict()

    @classmethod
    def of_checkpoint(cls, model_dir: Path, config: Any) -> "ModelInputs":
        """Of the checkpoint in `model_dir`, whose configuration is `config`.

        Raises `ConfigError` for a model that sees and has no image processor.
        """
        if not hasattr(config, "vision_config"):
            return cls(image_token_id=None, loader=None)
        merge_size = getattr(config.vision_config, "spatial_merge_size", None)
        return cls(
            image_token_id=config.image_token_id,
            loader=load_pixels(model_dir),
            tokens_per_image=tokens_per_image(config) if merge_size is None else 0,
            merge_size=merge_size,
        )

    def expand(
        self, ids_S: npt.NDArray[np.integer], is_response_S: npt.NDArray[np.bool_], images: Sequence[bytes]
    ) -> Expanded:
        """A sequence with one placeholder an image, and its encoded images, as the model sees both.

        Raises `DataError` when placeholders are not images, `ImageError` for one that does not decode.
        """
        if images and self._loader is None:
            raise DataError(f"got {len(images)} image(s) for a model without a vision tower; ask it in words alone")
        inputs = tuple(self._image(data) for data in images)
        num_tokens = [self._num_image_tokens(image) for image in inputs]
        return Expanded(
            *expand_images(np.asarray(ids_S, np.int64), is_response_S, self._placeholder, num_tokens), inputs
        )

    def batch(self, sequences: Sequence[Expanded], *, pad_id: int, model: Any) -> dict[str, Tensor]:
        """Arguments of `model` for sequences padded on the left and masked, on its device and in its type."""
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in self.padded(sequences, pad_id=pad_id, side="left").items()
        }

    def padded(
        self, sequences: Sequence[Expanded], *, pad_id: int, side: Literal["left", "right"]
    ) -> dict[str, Tensor]:
        """The model's arguments by their names: `input_ids`, `attention_mask`, and what it reads of the images."""
        longest = max(len(sequence.ids_S) for sequence in sequences)
        ids_BS = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for b, sequence in enumerate(sequences):
            length = len(sequence.ids_S)
            place = slice(longest - length, longest) if side == "left" else slice(length)
            ids_BS[b, place] = torch.from_numpy(sequence.ids_S)
            mask_BS[b, place] = 1
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
        if self._merge_size is not None and self._placeholder is not None:
            inputs["mm_token_type_ids"] = torch.eq(ids_BS, self._placeholder).int() * mask_BS.int()
        images = [image for sequence in sequences for image in sequence.images]
        for name in images[0] if images else ():
            inputs[name] = torch.from_numpy(np.concatenate([image[name] for image in images]))
        return inputs

    def _image(self, data: bytes) -> ImageInputs:
        assert self._loader is not None
        key = sha256_hex(data)
        found = self._cached.get(key)
        if found is None:
            found = self._loader.model_inputs(decode_image(data))
            self._cached[key] = found
            size = sum(array.nbytes for array in found.values())
            while len(self._cached) * size > _CACHE_BYTES:
                self._cached.popitem(last=False)
        return found

    def _num_image_tokens(self, image: ImageInputs) -> int:
        if self._merge_size is None:
            return self._num_tokens
        return int(image["image_grid_thw"].prod()) // self._merge_size**2
