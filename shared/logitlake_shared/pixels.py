"""Pixels exactly as the checkpoint's own processor makes them.

Teacher and student take what their vision towers read from `PixelLoader`, which runs the image processor saved with
the checkpoint on its PIL path: no torchvision needed, and one resampling for everybody. A processor returns more than
pixels where images keep their shape (Qwen-VL's `image_grid_thw`); `model_inputs` hands all of it on by name, one image
at a time, so that a batch of images is a concatenation along the first axis.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from logitlake_schemas import fingerprint
from logitlake_shared.errors import ConfigError
from logitlake_shared.images import decode_image

__all__ = ["PixelLoader", "image_processor_sha256", "load_image_processor", "load_pixels"]

# Where transformers looks for an image processor's configuration, newest name first.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class PixelLoader:
    """Images to what a model's vision tower reads, by the image processor saved with a checkpoint."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, images: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """`pixel_values_NCHW` of encoded images that all become one size.

        Raises `ImageError` as `logitlake_shared.images.decode_image` does.
        """
        decoded = [decode_image(data) for data in images]
        pixels: npt.NDArray[np.float32] = self._processor(decoded, return_tensors="np")["pixel_values"]
        return np.asarray(pixels, np.float32)

    def model_inputs(self, image: Image.Image) -> dict[str, npt.NDArray[Any]]:
        """Everything that the model wants to know of one decoded image, by the name of its argument.

        The first axis counts images, or patches: arrays of several images are concatenated along it.
        """
        return {name: np.asarray(value) for name, value in self._processor([image], return_tensors="np").items()}


def load_pixels(model_dir: Path) -> PixelLoader:
    """The pixel loader of a checkpoint. Raises `ConfigError` when it has no image processor."""
    return PixelLoader(load_image_processor(model_dir))


def load_image_processor(model_dir: Path) -> Any:
    """The image processor of a checkpoint, on its PIL path. Raises `ConfigError` when there is none."""
    from transformers import AutoImageProcessor

    if image_processor_sha256(model_dir) is None:
        raise ConfigError(
            f"{model_dir}: no image processor: expected one of {', '.join(_PROCESSOR_FILES)}; copy it from the "
            "checkpoint the vision tower came from"
        )
    return AutoImageProcessor.from_pretrained(model_dir, backend="pil", trust_remote_code=False)


def image_processor_sha256(model_dir: Path) -> str | None:
    """Digest of the checkpoint's image processor configuration; None for a text-only checkpoint."""
    for name in _PROCESSOR_FILES:
        if (model_dir / name).is_file():
            document = json.loads((model_dir / name).read_text(encoding="utf-8"))
            return fingerprint(document.get("image_processor", document))
    return None
