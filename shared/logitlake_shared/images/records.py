"""An image as a teacher gets it, and the same image as a lake keeps it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from logitlake_schemas import sha256_hex
from logitlake_shared.image_decoder.decoding import ImageHeader, ImageLimits, decode_with_header, open_image
from logitlake_shared.rows import LakeImage

__all__ = ["DecodedImage", "inspect_image"]


@dataclass(frozen=True)
class DecodedImage:
    """One image as a teacher gets it: decoded, upright, RGB."""

    image_sha256: str
    """of the encoded bytes"""
    rgb_HWC: npt.NDArray[np.uint8]
    header: ImageHeader | None = None
    """what the encoded bytes said, where they were seen"""

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return int(self.rgb_HWC.shape[1])

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return int(self.rgb_HWC.shape[0])

    def as_pil(self) -> Image.Image:
        """The same pixels for a library that wants PIL."""
        return Image.fromarray(self.rgb_HWC)

    def lake_row(self, data: bytes) -> LakeImage:
        """The image's row for the lake; `data` are the encoded bytes, which are stored as they are."""
        assert self.header is not None
        return LakeImage(self.image_sha256, self.header.format, self.header.width, self.header.height, data)

    @classmethod
    def of(cls, data: bytes, limits: ImageLimits = ImageLimits.DEFAULT) -> "DecodedImage":
        """Decodes in this process. Raises `ImageError` as `decode_image` does."""
        header, image = decode_with_header(data, limits)
        return cls(sha256_hex(data), np.asarray(image), header)


def inspect_image(data: bytes, limits: ImageLimits = ImageLimits.DEFAULT) -> LakeImage:
    """The image's row for the lake, from its header. Raises `ImageError` as `decode_image` does."""
    image, header = open_image(data, limits)
    image.close()
    return LakeImage(sha256_hex(data), header.format, header.width, header.height, data)
