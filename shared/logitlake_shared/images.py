"""Guarded image decoding.

An image is checked before it is decoded (bytes, format, pixels, frames), so that a decompression bomb costs nothing;
what cannot be used raises `ImageError` with a code. There is no fallback: never a black image, never another one.
What a model makes of the decoded pixels is `logitlake_shared.pixels`.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from logitlake_schemas import sha256_hex
from logitlake_shared.errors import ImageError
from logitlake_shared.rows import LakeImage

__all__ = ["DecodedImage", "decode_image", "inspect_image"]

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64 * 10**6
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class DecodedImage:
    """One image as a teacher gets it: decoded, upright, RGB."""

    image_sha256: str
    """of the encoded bytes"""
    rgb_HWC: npt.NDArray[np.uint8]

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

    @classmethod
    def of(cls, data: bytes) -> "DecodedImage":
        """Decodes in this process. Raises `ImageError` as `decode_image` does."""
        return cls(sha256_hex(data), np.asarray(decode_image(data)))


def decode_image(data: bytes) -> Image.Image:
    """The image as RGB, rotated as its EXIF orientation says (transformers' `load_image` does the same).

    Raises `ImageError`: `image_too_large`, `image_format`, `image_animated`, `image_decode`.
    """
    try:
        with _open(data) as image:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, … on broken files
        raise ImageError(f"image_decode: {error}") from error


def inspect_image(data: bytes) -> LakeImage:
    """The image's row for the lake, from its header. Raises `ImageError` as `decode_image` does."""
    with _open(data) as image:
        return LakeImage(sha256_hex(data), str(image.format), image.width, image.height, data)


def _open(data: bytes) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise ImageError(f"image_too_large: {len(data)} bytes, at most {MAX_BYTES} are read")
    try:
        with warnings.catch_warnings():
            # Our own cap below is the tighter one, and it is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"image_too_large: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"image_format: not one of {', '.join(FORMATS)}, or damaged at its start") from error
    except Exception as error:  # a broken header raises whatever its plugin raises
        raise ImageError(f"image_decode: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"image_too_large: {image.width}x{image.height} pixels, at most {MAX_PIXELS} are decoded")
    if getattr(image, "n_frames", 1) != 1:
        raise ImageError(f"image_animated: {getattr(image, 'n_frames', 1)} frames, expected a single image")
    return image
