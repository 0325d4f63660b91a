"""Seeded conversations without any file, for dry runs and for scale.

Record i is a function of the seed and i alone. Questions are numbered, so that no two records are equal; the words of
questions and answers are a few thousand slices of one seeded text, and images a few dozen seeded PNGs, all made once
and shared by the records. That makes hundreds of thousands of records a second.
"""

import struct
import zlib
from collections.abc import Iterator
from random import Random

from logitlake_shared.data_formats.image_refs import ImageRef
from logitlake_shared.data_formats.records import Conversation

__all__ = ["NUM_MADE_UP_IMAGES", "made_up_records"]

NUM_MADE_UP_IMAGES = 64
"""distinct images; record i has image i % 64"""
_IMAGE_SIDE = 32
_WORD = 6
"""characters of a word, the blank behind it included: slices need no search"""
_VOCABULARY = 256
_NUM_TEXTS = 4096
"""distinct questions, their numbers left out, and distinct answers"""
_NOTHING: dict[str, object] = {}
_IMAGE_PART = {"type": "image"}


def made_up_records(
    num_samples: int,
    *,
    prompt_words: int = 8,
    response_words: int = 16,
    images: bool = False,
    seed: int = 0,
    task: str = "made-up",
    source: str = "fake",
    split: str = "train",
) -> Iterator[Conversation]:
    """`num_samples` conversations of one question and one answer."""
    random = Random(seed)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=_WORD - 1)) + " " for _ in range(_VOCABULARY)]
    text = "".join(random.choices(words, k=_NUM_TEXTS + prompt_words + response_words))
    questions = [text[start * _WORD : (start + prompt_words) * _WORD - 1] for start in range(_NUM_TEXTS)]
    answers = [
        {"role": "assistant", "content": text[start * _WORD : (start + response_words) * _WORD - 1]}
        for start in range(prompt_words, prompt_words + _NUM_TEXTS)
    ]
    pictures = [(ImageRef(data=_png(seed, number)),) for number in range(NUM_MADE_UP_IMAGES)] if images else [()]
    for number in range(num_samples):
        choice = number % _NUM_TEXTS
        question = {"type": "text", "text": f"{number}: {questions[choice]}"}
        sample_id = f"{source}-{number}"
        yield Conversation(
            sample_id,
            task,
            source,
            split,
            [{"role": "user", "content": [_IMAGE_PART, question] if images else [question]}, answers[choice]],
            pictures[number % len(pictures)],
            _NOTHING,
            sample_id,
        )


def _png(seed: int, number: int) -> bytes:
    """A small picture of seeded noise. Written here, so that making records up needs neither PIL nor numpy."""
    random = Random(f"{seed}/{number}")
    row = 1 + 3 * _IMAGE_SIDE
    pixels = bytearray(random.randbytes(_IMAGE_SIDE * row))
    pixels[::row] = bytes(_IMAGE_SIDE)  # each row begins with its filter: none
    header = struct.pack(">IIBBBBB", _IMAGE_SIDE, _IMAGE_SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(pixels), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
