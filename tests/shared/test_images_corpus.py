"""A corpus of images as people and attackers have them: each has its code, or exactly transformers' pixels.

Every image goes through the decoder processes with a sound neighbour on either side, which must come back unharmed.
"""

import gzip
import io
import resource
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageCms

from logitlake_shared.errors import ImageError
from logitlake_shared.image_decoder.decoding import ImageLimits
from logitlake_shared.images import DecodedImage, DecoderPool, decode_image

# No legal image here has more than 4 million pixels, and no sentence of a refusal needs to decode any.
LIMITS = ImageLimits(max_bytes=2**20, max_pixels=4 * 10**6)
MEMORY_MIB = 512
# What this process may grow by over the whole corpus: a few answers of at most 12 MB, never a bomb (2.7 GB).
MAX_GROWTH_KIB = 128 * 2**10

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def pixels(width: int = 32, height: int = 24, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise, so that a wrong pixel shows."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    """The image in a format of PIL's."""
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_claiming(width: int, height: int, *, idat: bytes = b"", colour_type: int = 2) -> bytes:
    """A PNG whose header says a size, whatever is in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def after_header(png: bytes, extra: bytes) -> bytes:
    """The PNG with a chunk put in behind its header."""
    end = len(SIGNATURE) + 25
    return png[:end] + extra + png[end:]


def flipped(data: bytes, place: int) -> bytes:
    """One byte turned over."""
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def with_exif(orientation: int) -> bytes:
    """A JPEG that asks to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, "JPEG", exif=exif)


def mpo() -> bytes:
    """Two JPEGs in one file, as telephones write them."""
    return encoded(RGB, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 12), "blue")])


def webp_claiming(width: int, height: int) -> bytes:
    """A WebP whose canvas is larger than its picture."""
    lossy = encoded(RGB, "WEBP")
    canvas = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas + lossy[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_claiming(width: int, height: int) -> bytes:
    """A JPEG whose frame header says another size than its data has."""
    data = bytearray(JPEG)
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def fits() -> bytes:
    """The head of a FITS file, whose plugin once inflated without a cap."""
    cards = ("SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2")
    return "".join(card.ljust(80) for card in cards).encode().ljust(2880)


def gd2(width: int, height: int) -> bytes:
    """The head of a GD file, whose plugin once had no cap."""
    return struct.pack(">HHHB", 65534, width, height, 1) + b"\0" * 2048


FRAMES = [Image.fromarray(pixels(seed=seed)) for seed in (1, 2, 3)]
RGB = Image.fromarray(pixels())
PNG, JPEG, WEBP = encoded(RGB, "PNG"), encoded(RGB, "JPEG"), encoded(RGB, "WEBP", lossless=True)
BOMB = b"a\0\0" + zlib.compress(bytes(2**26))
ANIMATED = {"save_all": True, "append_images": FRAMES, "duration": 40}
WIDE = Image.fromarray((np.arange(32 * 24, dtype=np.uint32).reshape(24, 32) * 85).astype(np.uint16))
PALETTE = Image.fromarray(pixels(), "RGB").quantize(16)


@dataclass(frozen=True)
class Case:
    """An image and what must come of it: a code, several where libraries differ in what they notice, or pixels."""

    name: str
    data: bytes
    codes: tuple[str, ...] = ()


def corpus() -> Iterator[Case]:
    """All cases, made by code."""
    decode, format_, large, animated = ("image_decode",), ("image_format",), ("image_too_large",), ("image_animated",)
    either = ("image_decode", "image_format")
    yield Case("empty", b"", format_)
    yield Case("one byte", b"\x89", format_)
    yield Case("text", b"an image, honestly", format_)
    yield Case("HTML of a login page", b"<!DOCTYPE html><html><body>Sign in</body></html>", format_)
    yield Case("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>', format_)
    yield Case("PDF", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF", format_)
    yield Case("EPS, which runs Ghostscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", format_)
    yield Case("FITS bomb", fits(), format_)
    yield Case("GD", gd2(4, 4), format_)
    yield Case("PSD", b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + b"\0" * 64, format_)
    yield Case("ICO", encoded(RGB, "ICO", sizes=[(16, 16)]), format_)
    yield Case("TGA", encoded(RGB, "TGA"), format_)
    yield Case("JPEG 2000", encoded(RGB, "JPEG2000"), format_)
    yield Case("gzip of a PNG", gzip.compress(PNG), format_)
    yield Case("zip of nothing", b"PK\5\6" + b"\0" * 18, format_)
    for kind, whole in (("PNG", PNG), ("JPEG", JPEG), ("WEBP", WEBP)):
        yield Case(f"{kind} cut in its signature", whole[:4], format_)
        yield Case(f"{kind} cut in its header", whole[:20], either)
        yield Case(f"{kind} cut at half", whole[: len(whole) // 2], either)
        yield Case(f"{kind} without its last bytes", whole[:-30], decode)
    yield Case("PNG of 30000x30000 without data", png_claiming(30_000, 30_000), large)
    yield Case("PNG of 30000x30000, compressed", png_claiming(30_000, 30_000, idat=zlib.compress(bytes(10**6))), large)
    yield Case("PNG of 65535x65535", png_claiming(65_535, 65_535), large)
    yield Case("PNG of 2^31-1 columns", png_claiming(2**31 - 1, 1), large)
    yield Case("PNG of no columns", png_claiming(0, 5), either)
    yield Case("PNG over the cap by one row", png_claiming(2000, 2001), large)
    yield Case("WebP with a canvas of 16383x16383", webp_claiming(16_383, 16_383), large)
    yield Case("WebP with a canvas of another size", webp_claiming(100, 100), either)
    yield Case("JPEG of 65500x65500 by its header", jpeg_claiming(65_500, 65_500), large)
    yield Case("more bytes than allowed", PNG + bytes(2**20), large)
    yield Case("animated GIF", encoded(FRAMES[0], "GIF", **ANIMATED), animated)
    yield Case("animated WebP", encoded(FRAMES[0], "WEBP", **ANIMATED), animated)
    yield Case("APNG", encoded(FRAMES[0], "PNG", **ANIMATED), animated)
    yield Case("TIFF of three pages", encoded(FRAMES[0], "TIFF", **ANIMATED), animated)
    yield Case("PNG with a broken header checksum", flipped(PNG, len(SIGNATURE) + 22), either)
    yield Case("PNG with a byte of its data turned", flipped(PNG, len(PNG) // 2), decode)
    yield Case("PNG of an unknown colour type", png_claiming(4, 4, colour_type=9), either)
    yield Case("text chunk that inflates to 64 MB", after_header(PNG, chunk(b"zTXt", BOMB)), decode)
    yield Case("colour profile that inflates to 64 MB", after_header(PNG, chunk(b"iCCP", BOMB)), decode)
    yield Case("JPEG without its tables", JPEG[:2] + JPEG[JPEG.index(b"\xff\xc0") :], decode)
    yield Case("JPEG with an unknown marker", JPEG[:2] + b"\xff\x02\x00\x04ab" + JPEG[2:], either)
    yield Case("TIFF with a directory that names itself", b"II*\0" + struct.pack("<I", 4) + bytes(32), either)
    # What is legal, if unusual, has the pixels that transformers gives it.
    yield Case("a plain PNG", PNG)
    yield Case("a plain JPEG", JPEG)
    yield Case("a plain WebP", WEBP)
    yield Case("a WebP that libwebp decodes in two threads", encoded(Image.fromarray(pixels(1024, 768)), "WEBP"))
    yield Case("PNG called .jpg", PNG)
    yield Case("a still GIF", encoded(PALETTE, "GIF"))
    yield Case("BMP", encoded(RGB, "BMP"))
    yield Case("TIFF", encoded(RGB, "TIFF"))
    yield Case("TIFF with LZW", encoded(RGB, "TIFF", compression="tiff_lzw"))
    yield Case("CMYK JPEG", encoded(RGB.convert("CMYK"), "JPEG"))
    yield Case("grey JPEG", encoded(RGB.convert("L"), "JPEG"))
    yield Case("progressive JPEG", encoded(RGB, "JPEG", progressive=True))
    yield Case("JPEG with a second picture (MPO)", mpo())
    yield Case("JPEG with bytes behind its end", JPEG + b"trailing")
    yield Case("16-bit PNG", encoded(WIDE, "PNG"))
    yield Case("1-bit PNG", encoded(RGB.convert("1"), "PNG"))
    yield Case("palette PNG", encoded(PALETTE, "PNG"))
    yield Case("palette PNG with transparency", encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))))
    yield Case("PNG with transparency", encoded(Image.fromarray(pixels(channels=4)), "PNG"))
    yield Case("grey PNG with transparency", encoded(Image.fromarray(pixels(channels=2), "LA"), "PNG"))
    yield Case("1x1", encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"))
    yield Case("1x3000", encoded(Image.new("RGB", (3000, 1), (1, 2, 3)), "PNG"))
    yield Case("PNG with a real colour profile", encoded(RGB, "PNG", icc_profile=_SRGB))
    yield Case("PNG with junk for a colour profile", encoded(RGB, "PNG", icc_profile=b"junk" * 99))
    yield Case("JPEG with junk for EXIF", encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"))
    # A stream that ends too soon, but in due form, is filled up by the libraries in silence: for everybody alike.
    yield Case("PNG with too few rows", png_claiming(100, 100, idat=zlib.compress(bytes(301))))
    yield Case("JPEG taller than its data", jpeg_claiming(32, 2000))
    for orientation in range(1, 9):
        yield Case(f"EXIF orientation {orientation}", with_exif(orientation))
    yield Case("EXIF orientation 42", with_exif(42))


_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CORPUS = list(corpus())
REFUSALS = ("image_format", "image_decode", "image_too_large", "image_animated")
GOOD = encoded(Image.fromarray(pixels(seed=9)), "PNG")


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    """Two decoder processes with tight limits."""
    with DecoderPool(LIMITS, num_processes=2, memory_mib=MEMORY_MIB, timeout_s=20.0) as made:
        yield made


def test_the_corpus_is_large_enough() -> None:
    """At least thirty images that must be refused, no two of one name."""
    assert sum(bool(case.codes) for case in CORPUS) >= 30
    assert len({case.name for case in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_each_has_its_code_or_transformers_pixels(case: Case, pool: DecoderPool) -> None:
    """A refusal begins with its code and harms neither neighbour; a legal image equals `load_image`, bit for bit."""
    before, answer, after = pool.decode_all([GOOD, case.data, GOOD])
    for neighbour in (before, after):
        assert isinstance(neighbour, DecodedImage)
        np.testing.assert_array_equal(neighbour.rgb_HWC, pixels(seed=9))
    if case.codes:
        assert isinstance(answer, ImageError), case.name
        assert str(answer).partition(": ")[0] in case.codes, str(answer)
        # PIL warns of some of what it then refuses.
        with warnings.catch_warnings(action="ignore"), pytest.raises(ImageError) as here:
            decode_image(case.data, LIMITS)
        assert str(here.value) == str(answer)
    else:
        assert isinstance(answer, DecodedImage), str(answer)
        np.testing.assert_array_equal(answer.rgb_HWC, _as_transformers_loads(case.data))


def _as_transformers_loads(data: bytes) -> np.ndarray:
    from transformers.image_utils import load_image

    with warnings.catch_warnings(action="ignore"):  # PIL's, about palettes
        return np.asarray(load_image(Image.open(io.BytesIO(data))))


def test_the_whole_corpus_leaves_memory_as_it_was(pool: DecoderPool) -> None:
    """Ten times the corpus in one call: this process grows by the answers at most, never by a bomb."""
    pool.decode_all([case.data for case in CORPUS])
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        answers = pool.decode_all([case.data for case in CORPUS])
        assert [isinstance(answer, ImageError) for answer in answers] == [bool(case.codes) for case in CORPUS]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < MAX_GROWTH_KIB


def test_seeded_damage_gives_a_code_or_transformers_pixels(pool: DecoderPool) -> None:
    """Five hundred images with bytes turned, cut out or doubled: no decoder is lost, and no answer is a third thing."""
    rng = np.random.default_rng(0)
    kinds = [PNG, JPEG, WEBP, encoded(RGB, "WEBP"), encoded(PALETTE, "GIF"), encoded(RGB, "TIFF", compression="jpeg")]
    damaged = []
    for number in range(500):
        data = bytearray(kinds[number % len(kinds)])
        for _ in range(int(rng.integers(1, 6))):
            place = int(rng.integers(len(data) - 8))
            match int(rng.integers(3)):
                case 0:
                    data[place] ^= int(rng.integers(1, 256))
                case 1:
                    del data[place : place + int(rng.integers(1, 9))]
                case _:
                    data[place:place] = data[place : place + 8]
            damaged.append(bytes(data))
    answers = pool.decode_all(damaged)
    decoded = 0
    for data, answer in zip(damaged, answers, strict=True):
        if isinstance(answer, DecodedImage):
            decoded += 1
            np.testing.assert_array_equal(answer.rgb_HWC, _as_transformers_loads(data))
        else:
            assert str(answer).partition(": ")[0] in REFUSALS, str(answer)
            assert "decoder was ended" not in str(answer)
    assert 0 < decoded < len(damaged)
