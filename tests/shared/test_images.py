"""Images: decoded as they are, or refused with a code; never replaced."""

import io
import struct
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from logitlake_shared import images
from logitlake_shared.errors import ImageError
from logitlake_shared.images import ImageLimits


def _encoded(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def _png_bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_decoding_gives_rgb_of_the_same_pixels(png: Callable[[int], bytes]) -> None:
    """A palette image, a transparent one and a plain one all become RGB of the same size."""
    plain = images.decode_image(png(1))
    assert (plain.mode, plain.size) == ("RGB", (4, 3))
    assert images.decode_image(_encoded(plain.convert("P"), "PNG")).size == (4, 3)
    assert images.decode_image(_encoded(plain.convert("RGBA"), "PNG")).mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    """Orientation 6 turns a 4x3 picture into a 3x4 one, as transformers does when it loads an image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.decode_image(_encoded(Image.new("RGB", (4, 3)), "JPEG", exif=exif)).size == (3, 4)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image_format"),
        (b"not an image", "image_format"),
        (_encoded(Image.new("RGB", (64, 64), "red"), "PNG")[:-40], "image_decode"),
        (_png_bomb(60_000, 60_000), "image_too_large"),
        (_png_bomb(9_000, 9_000), "image_too_large"),
        (
            _encoded(
                Image.new("RGB", (4, 4), "red"),
                "GIF",
                save_all=True,
                append_images=[Image.new("RGB", (4, 4))],
                duration=1,
            ),
            "image_animated",
        ),
    ],
    ids=["empty", "text", "truncated", "bomb", "over the cap", "animated"],
)
def test_what_cannot_be_used_has_a_code(data: bytes, code: str) -> None:
    """Each refusal begins with its code; a bomb is refused from its header."""
    with pytest.raises(ImageError, match=f"^{code}: "):
        images.decode_image(data)


def test_header_row_of_an_image(png: Callable[[int], bytes]) -> None:
    """The lake's row says format and size and keeps the bytes."""
    row = images.inspect_image(png(2))
    assert (row.format, row.width, row.height, row.data) == ("PNG", 4, 3, png(2))


def test_more_frames_may_be_allowed_and_the_first_is_taken() -> None:
    """Three frames pass a cap of three, with the first one's pixels, and not a cap of two."""
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "lime")]
    for name in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if name == "WEBP" else {}
        data = _encoded(frames[0], name, save_all=True, append_images=frames[1:], duration=40, **options)
        image = images.decode_image(data, ImageLimits(max_frames=3))
        assert image.getpixel((0, 0)) == (255, 0, 0), name
        with pytest.raises(ImageError, match="image_animated: 3 frames, expected at most 2"):
            images.decode_image(data, ImageLimits(max_frames=2))
