"""The pictures of the demo world: real handwritten digits, coloured and set into a two-by-two grid.

The digits are the 1,797 UCI images that ship inside scikit-learn, so nothing is downloaded. They are split by
image, once and for every seed, into digits that may appear in training and digits that may appear in tests: a
model can know a test scene's words but never its strokes. A scene is drawn by its random generator alone:
same seed, same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "CELL",
    "COLOURS",
    "DIGITS",
    "PLACES",
    "SIDE",
    "Placed",
    "Scene",
    "Split",
    "digit_pool",
    "draw_layout",
    "draw_scene",
]

Split = Literal["train", "test"]

SIDE = 32
"""Width and height of a scene in pixels."""
CELL = SIDE // 2
"""Width and height of one of the four cells in pixels."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (50, 195, 70),
    "blue": (70, 105, 245),
    "yellow": (230, 205, 50),
    "purple": (180, 70, 215),
}

_SPLIT_SEED = 1797
"""Fixed apart from any world's seed: the committed weights must never have seen a test digit."""
_NUM_TRAIN_DIGITS = 1400
_NUM_OBJECTS_CHANCES = (0.2, 0.3, 0.3, 0.2)
_DIGIT_SIDES = (12, 16)
"""Smallest and largest drawn side of a digit in pixels, both included; what is left of the cell is jitter."""
_NOISE_SIGMA = 12.0


@dataclass(frozen=True)
class Placed:
    """One digit in a scene: which, in what colour, in which cell (0-3 in reading order)."""

    digit: str
    colour: str
    cell: int

    @property
    def phrase(self) -> str:
        """The two words that name the object everywhere in this world, such as "red seven"."""
        return f"{self.colour} {self.digit}"

    @property
    def place(self) -> str:
        """The cell in words."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """What is in a picture (objects in reading order, no phrase twice) and the picture itself."""

    objects: tuple[Placed, ...]
    pixels_HWC: NDArray[np.uint8]
    digit_indices: tuple[int, ...]
    """The scikit-learn image behind each object, so that a leak between splits can be looked for."""


@cache
def _all_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    # 0..16 grey levels -> 0..255 opacity.
    opacity_NHW = np.clip(digits.images * (255 / 16), 0, 255).astype(np.uint8)
    return opacity_NHW, digits.target.astype(np.int64)


@cache
def digit_pool(split: Split) -> tuple[NDArray[np.int64], ...]:
    """Indices into scikit-learn's digits that this split may draw, one array for each of the ten digits."""
    _, targets_N = _all_digits()
    order_N = np.random.default_rng(_SPLIT_SEED).permutation(len(targets_N))
    chosen_N = np.sort(order_N[:_NUM_TRAIN_DIGITS] if split == "train" else order_N[_NUM_TRAIN_DIGITS:])
    return tuple(chosen_N[targets_N[chosen_N] == digit] for digit in range(len(DIGITS)))


def draw_layout(rng: np.random.Generator) -> tuple[Placed, ...]:
    """One to four objects in distinct cells, no two alike in both colour and digit, in reading order."""
    num_objects = 1 + int(rng.choice(len(_NUM_OBJECTS_CHANCES), p=_NUM_OBJECTS_CHANCES))
    cells = sorted(int(cell) for cell in rng.choice(len(PLACES), size=num_objects, replace=False))
    kinds = rng.choice(len(DIGITS) * len(COLOURS), size=num_objects, replace=False)
    colours = tuple(COLOURS)
    return tuple(
        Placed(digit=DIGITS[int(kind) % len(DIGITS)], colour=colours[int(kind) // len(DIGITS)], cell=cell)
        for kind, cell in zip(kinds, cells, strict=True)
    )


def draw_scene(split: Split, rng: np.random.Generator, objects: tuple[Placed, ...] | None = None) -> Scene:
    """A scene of this split's digits, of given objects or of some; pixels are uint8, 32 x 32 x RGB."""
    opacity_NHW, _ = _all_digits()
    pool = digit_pool(split)
    objects = draw_layout(rng) if objects is None else objects
    canvas_HWC = np.full((SIDE, SIDE, 3), rng.uniform(10, 60), dtype=np.float32)
    indices = []
    for placed in objects:
        candidates = pool[DIGITS.index(placed.digit)]
        index = int(candidates[rng.integers(len(candidates))])
        indices.append(index)
        side = int(rng.integers(_DIGIT_SIDES[0], _DIGIT_SIDES[1] + 1))
        top, left = (int(rng.integers(CELL - side + 1)) for _ in range(2))
        glyph = Image.fromarray(opacity_NHW[index]).resize((side, side), Image.Resampling.BILINEAR)
        alpha_HW1 = np.asarray(glyph, dtype=np.float32)[:, :, None] / 255
        tint_C = np.asarray(COLOURS[placed.colour], dtype=np.float32) * rng.uniform(0.8, 1.0)
        row, column = divmod(placed.cell, 2)
        y, x = row * CELL + top, column * CELL + left
        spot_HWC = canvas_HWC[y : y + side, x : x + side]  # a view: the next line draws on the canvas
        spot_HWC += alpha_HW1 * (tint_C - spot_HWC)
    canvas_HWC += rng.normal(0, _NOISE_SIGMA, size=canvas_HWC.shape).astype(np.float32)
    return Scene(objects, np.clip(np.rint(canvas_HWC), 0, 255).astype(np.uint8), tuple(indices))
