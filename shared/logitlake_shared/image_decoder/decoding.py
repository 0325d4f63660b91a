"""One image checked and decoded, in whatever process this runs.

Everything is checked before a pixel is decoded: bytes, format, pixels, frames. So a decompression bomb costs nothing
but its header. Upright and RGB as transformers' `load_image` makes them, so that teacher, student and anybody's script
see the same pixels. What cannot be used raises `ImageError` with a code; nothing is ever put in its place.

The file imports PIL and little else: it is also the program of the decoder processes (`decoder_process`).
"""

import io
import struct
import threading
import warnings
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image, ImageOps, UnidentifiedImageError

from logitlake_shared.errors import ImageError

__all__ = ["ImageHeader", "ImageLimits", "decode_image", "open_image"]

# The filters of warnings belong to the whole process; headers are read by several threads.
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be."""

    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    """by PIL's names"""
    max_bytes: int = 32 * 2**20
    max_pixels: int = 64 * 10**6
    max_frames: int = 1
    """more than 1 takes the first frame of an image with at most so many"""

    DEFAULT: ClassVar["ImageLimits"]


ImageLimits.DEFAULT = ImageLimits()


@dataclass(frozen=True)
class ImageHeader:
    """What an image says of itself, before any rotation."""

    format: str
    width: int
    height: int


def decode_image(data: bytes, limits: ImageLimits = ImageLimits.DEFAULT) -> Image.Image:
    """The image as RGB, rotated as its EXIF orientation says (transformers' `load_image` does the same).

    Raises `ImageError`: `image_too_large`, `image_format`, `image_animated`, `image_decode`.
    """
    return decode_with_header(data, limits)[1]


def decode_with_header(data: bytes, limits: ImageLimits) -> tuple[ImageHeader, Image.Image]:
    """`decode_image`, and what the header said."""
    try:
        image, header = open_image(data, limits)
        with image:
            image.load()
            return header, ImageOps.exif_transpose(image).convert("RGB")
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("image_too_large: decoding it needs more memory than a decoder may have") from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, … on broken files
        raise ImageError(f"image_decode: {_sentence(error)}") from error


def open_image(data: bytes, limits: ImageLimits = ImageLimits.DEFAULT) -> tuple[Image.Image, ImageHeader]:
    """The image with its header read and checked, its pixels not decoded. Raises as `decode_image` does."""
    if len(data) > limits.max_bytes:
        raise ImageError(f"image_too_large: {len(data)} bytes, at most {limits.max_bytes} are read")
    # libwebp makes room for the whole canvas when it opens a file.
    _check_pixels(_webp_canvas(data), limits)
    try:
        with _WARNINGS, warnings.catch_warnings():
            # PIL warns of many pixels. Our own cap is the tighter one, and it is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=limits.formats)
    except Image.DecompressionBombError as error:
        raise ImageError(f"image_too_large: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"image_format: not one of {', '.join(limits.formats)}, or damaged at its start") from error
    except MemoryError:
        raise
    except Exception as error:  # a broken header raises whatever its plugin raises
        raise ImageError(f"image_decode: {_sentence(error)}") from error
    _check_pixels(image.size, limits)
    # A JPEG with a preview or a depth map behind it, as telephones make them, is one picture; MPO is PIL's name for it.
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    if kind != "JPEG" and getattr(image, "is_animated", False):
        frames = int(getattr(image, "n_frames", 2)) if limits.max_frames > 1 else 2
        if frames > limits.max_frames:
            several = frames if limits.max_frames > 1 else "several"
            raise ImageError(f"image_animated: {several} frames, expected at most {limits.max_frames}")
        image.seek(0)
    return image, ImageHeader(kind, image.width, image.height)


def _check_pixels(size: tuple[int, int] | None, limits: ImageLimits) -> None:
    if size is not None and size[0] * size[1] > limits.max_pixels:
        raise ImageError(f"image_too_large: {size[0]}x{size[1]} pixels, at most {limits.max_pixels} are decoded")


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP by its first chunk; none if this is none."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    chunk, body = data[12:16], data[20:30]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _sentence(error: Exception) -> str:
    """What the library said, without the address of an object in memory."""
    text = str(error).partition(" <")[0].strip()
    return text or type(error).__name__
