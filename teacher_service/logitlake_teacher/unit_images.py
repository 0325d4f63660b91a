"""The images of one unit: loaded, proved to be those that were planned, decoded; each once.

Loading and decoding are done by whoever is given: a `GuardedImages`, which a worker makes once, loads several at a time
from wherever the configuration allows and decodes in processes of their own; `load_images` does the same in this
process, for files and bytes at hand, with nothing to start or to close. What cannot be used becomes an error of every
item that needs it; the others go on.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from logitlake_schemas import UnitError, sha256_hex
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.errors import DataError, ImageError
from logitlake_shared.images import DecodedImage
from logitlake_shared.rows import LakeImage
from logitlake_teacher.config import ImagesConfig
from logitlake_teacher.items import Item

__all__ = ["GuardedImages", "LoadImages", "UnitImages", "load_images"]


@dataclass(frozen=True)
class UnitImages:
    """The images of a unit by sha256, and why some of its items cannot be captured."""

    encoded: dict[str, LakeImage] = field(default_factory=dict)
    """as they go into the lake, byte for byte what was loaded"""
    decoded: dict[str, DecodedImage] = field(default_factory=dict)
    """as the teacher sees them"""
    errors: dict[str, UnitError] = field(default_factory=dict)
    """by item id: images that cannot be used, and problems that planning found"""


LoadImages = Callable[[Sequence[Item]], UnitImages]
"""Loads and decodes every image of the items once.

Raises `DataError` (`input_changed`) if an image is not the one that was planned: the plan is then not the plan of this
data, and what would be written is not what the fingerprint says.
"""


class GuardedImages:
    """`LoadImages` by a configuration; may be used from several threads, and is to be closed."""

    def __init__(self, config: ImagesConfig) -> None:
        self._loader = config.open_loader()
        self._decoder = config.open_decoder()

    def __call__(self, items: Sequence[Item]) -> UnitImages:
        """See `LoadImages`."""
        return _load(items, self._loader.load_all, self._decoder.decode_all)

    def close(self) -> None:
        """Ends threads and processes. Calling it twice is fine."""
        self._loader.close()
        self._decoder.close()


def load_images(items: Sequence[Item]) -> UnitImages:
    """See `LoadImages`: one image after the other in this process, no addresses."""
    return _load(items, _each(ImageRef.load), _each(DecodedImage.of))


Argument = TypeVar("Argument")
Result = TypeVar("Result")


def _load(
    items: Sequence[Item],
    load_all: Callable[[Sequence[ImageRef]], list[bytes | ImageError]],
    decode_all: Callable[[Sequence[bytes]], list[DecodedImage | ImageError]],
) -> UnitImages:
    images = UnitImages(errors={item.item_id: item.problem for item in items if item.problem is not None})
    sound = [item for item in items if item.problem is None]
    failed: dict[str, ImageError] = {}
    loaded = _loaded(sound, load_all, failed)
    for (sha256, data), decoded in zip(loaded.items(), decode_all(list(loaded.values())), strict=True):
        if isinstance(decoded, ImageError):
            failed[sha256] = decoded
        else:
            images.encoded[sha256] = decoded.lake_row(data)
            images.decoded[sha256] = decoded
    for item in sound:
        error = next((failed[sha256] for sha256 in item.image_sha256 if sha256 in failed), None)
        if error is not None:
            code, _, message = str(error).partition(": ")
            images.errors[item.item_id] = UnitError(sample_id=item.item_id, code=code, message=message)
    return images


def _loaded(
    items: Iterable[Item],
    load_all: Callable[[Sequence[ImageRef]], list[bytes | ImageError]],
    failed: dict[str, ImageError],
) -> dict[str, bytes]:
    """The bytes by sha256. An image that lies in several places is had from the first that gives it."""
    places: dict[str, list[ImageRef]] = {}
    for item in items:
        for reference, planned in zip(item.images, item.image_sha256, strict=True):
            if reference not in (known := places.setdefault(planned, [])):
                known.append(reference)
    loaded: dict[str, bytes] = {}
    while places:
        wanted = {planned: known.pop(0) for planned, known in places.items()}
        for (planned, reference), data in zip(wanted.items(), load_all(list(wanted.values())), strict=True):
            if isinstance(data, ImageError):
                failed[planned] = data
                continue
            failed.pop(planned, None)
            if (sha256 := sha256_hex(data)) != planned:
                raise DataError(
                    f"input_changed: image {reference.path or reference.key} has sha256 {sha256}, it was {planned} "
                    "when the plan was made; restore it, or capture into a new cache"
                )
            loaded[planned] = data
        places = {planned: known for planned, known in places.items() if known and planned not in loaded}
    return loaded


def _each(one: Callable[[Argument], Result]) -> Callable[[Sequence[Argument]], list[Result | ImageError]]:
    """The function over a sequence, errors in their places."""

    def all_of(arguments: Sequence[Argument]) -> list[Result | ImageError]:
        results: list[Result | ImageError] = []
        for argument in arguments:
            try:
                results.append(one(argument))
            except ImageError as error:
                results.append(error)
        return results

    return all_of
