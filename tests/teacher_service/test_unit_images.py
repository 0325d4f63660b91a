"""The images of a unit: each once, proved, byte for byte; what is wrong with one costs the items that need it."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from logitlake_schemas import UnitError, sha256_hex
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.errors import DataError, ImageError
from logitlake_shared.images import ImageLoader
from logitlake_shared.lake import Lake
from logitlake_teacher.config import ImagesConfig
from logitlake_teacher.items import PlannedSample
from logitlake_teacher.unit_images import GuardedImages, LoadImages, load_images

NO_IDS = np.zeros(0, np.int32)
CONFIG = ImagesConfig(decode_processes=2, load_threads=4)


def sample(name: str, *images: tuple[ImageRef, bytes], problem: UnitError | None = None) -> PlannedSample:
    """A planned sample of these images; each comes with the bytes that it had when it was planned."""
    return PlannedSample(
        sample_id=name,
        task="",
        source="",
        split="",
        messages=[],
        prompt_ids=NO_IDS,
        prompt_lengths=NO_IDS,
        response_ids=NO_IDS,
        response_lengths=NO_IDS,
        images=tuple(reference for reference, _ in images),
        image_sha256=tuple(sha256_hex(data) for _, data in images),
        problem=problem,
    )


@pytest.fixture(scope="module")
def guarded() -> Iterator[GuardedImages]:
    """Images by the configuration, with processes."""
    made = GuardedImages(CONFIG)
    yield made
    made.close()


@pytest.fixture(params=["guarded", "here"])
def load(request: pytest.FixtureRequest, guarded: GuardedImages) -> LoadImages:
    """Both ways of loading a unit's images: every law holds for either."""
    return guarded if request.param == "guarded" else load_images


def test_images_are_those_of_the_files_byte_for_byte(
    tmp_path: Path, load: LoadImages, png: Callable[[int], bytes]
) -> None:
    """The lake gets the bytes with all their metadata, the teacher the upright pixels; header and digest agree."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), "red").save(buffer, "JPEG", exif=exif, comment=b"kept")
    jpeg = buffer.getvalue()
    (tmp_path / "a.jpg").write_bytes(jpeg)
    images = load([sample("a", (ImageRef(path=tmp_path / "a.jpg"), jpeg), (ImageRef(data=png(1)), png(1)))])
    assert not images.errors
    stored, seen = images.encoded[sha256_hex(jpeg)], images.decoded[sha256_hex(jpeg)]
    assert stored.data == jpeg
    assert (stored.format, stored.width, stored.height) == ("JPEG", 5, 3)
    assert (seen.width, seen.height) == (3, 5)
    assert list(images.decoded) == [sha256_hex(jpeg), sha256_hex(png(1))]


def test_a_bad_image_costs_the_items_that_need_it(
    tmp_path: Path, load: LoadImages, png: Callable[[int], bytes]
) -> None:
    """Missing, damaged, animated: the code of the first that fails; every other item has its own pixels."""
    cut = png(1)[: len(png(1)) // 2 + 8]
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=40)
    good = (ImageRef(data=png(2)), png(2))
    missing = (ImageRef(path=tmp_path / "none.png"), b"it was there")
    planned = UnitError(sample_id="planned", code="prompt_too_long", message="planning said so")
    items = [
        sample("good", good),
        sample("missing", good, missing),
        sample("cut", (ImageRef(data=cut), cut), missing),
        sample("animated", (ImageRef(data=buffer.getvalue()), buffer.getvalue())),
        sample("planned", missing, problem=planned),
        sample("text"),
    ]
    images = load(items)
    assert {name: error.code for name, error in images.errors.items()} == {
        "planned": "prompt_too_long",
        "missing": "image_missing",
        "cut": "image_decode",
        "animated": "image_animated",
    }
    assert list(images.decoded) == [sha256_hex(png(2))]
    expected = np.asarray(Image.open(io.BytesIO(png(2))))
    np.testing.assert_array_equal(images.decoded[sha256_hex(png(2))].rgb_HWC, expected)


def test_an_image_that_is_not_the_planned_one_ends_the_capture(
    tmp_path: Path, load: LoadImages, png: Callable[[int], bytes]
) -> None:
    """`input_changed`, with the file and both digests."""
    (tmp_path / "a.png").write_bytes(png(2))
    with pytest.raises(DataError, match=rf"input_changed: .*a\.png.*{sha256_hex(png(2))}.*{sha256_hex(png(1))}"):
        load([sample("a", (ImageRef(path=tmp_path / "a.png"), png(1)))])


def test_an_image_in_two_places_is_had_from_either(
    tmp_path: Path, load: LoadImages, png: Callable[[int], bytes]
) -> None:
    """Two items name the same image at two paths; one of the files is gone, and both items have their image."""
    (tmp_path / "b.png").write_bytes(png(1))
    items = [sample(name, (ImageRef(path=tmp_path / f"{name}.png"), png(1))) for name in "ab"]
    for order in (items, items[::-1]):
        images = load(order)
        assert not images.errors
        assert list(images.decoded) == [sha256_hex(png(1))]


def test_each_image_is_loaded_once(monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]) -> None:
    """Twenty samples of two images ask for two images."""
    asked: list[ImageRef] = []

    class Counting(ImageLoader):
        def load(self, image: ImageRef) -> bytes:
            asked.append(image)
            return super().load(image)

    monkeypatch.setattr("logitlake_teacher.config.images.ImageLoader", Counting)
    images = GuardedImages(CONFIG)
    try:
        pairs = [(ImageRef(data=png(number)), png(number)) for number in (1, 2)]
        assert len(images([sample(str(number), *pairs) for number in range(20)]).decoded) == 2
    finally:
        images.close()
    assert len(asked) == len(set(asked)) == 2


def test_addresses_go_by_the_configuration(png: Callable[[int], bytes]) -> None:
    """A host that is not allowed is a code of the sample, not an error of the capture."""
    images = GuardedImages(CONFIG)
    try:
        found = images([sample("a", (ImageRef(uri="https://h.example/a.png?sig=canary"), png(1)))])
    finally:
        images.close()
    assert found.errors["a"].code == "image_url_refused"
    assert "canary" not in found.errors["a"].message


def test_closing_leaves_no_process_behind(png: Callable[[int], bytes]) -> None:
    """Decoder processes end with their worker."""
    before = {child.pid for child in psutil.Process().children()}
    images = GuardedImages(CONFIG)
    images([sample("a", (ImageRef(data=png(1)), png(1)))])
    assert len({child.pid for child in psutil.Process().children()} - before) == CONFIG.decode_processes
    images.close()
    images.close()
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_capture_of_bad_images_says_why_and_stores_the_others(
    teacher_world: Any, teacher_command: Callable[..., Any], records: Callable[[], list[dict[str, Any]]]
) -> None:
    """Through the command: one picture is damaged and one gone; their samples are error rows, the rest is captured."""
    (teacher_world.folder / "images" / "0.png").write_bytes(b"<html>not found</html>")
    (teacher_world.folder / "images" / "1.png").unlink()
    done = teacher_command("capture", _tolerant(teacher_world))
    assert done.code == 0, done.err
    bad = {record["id"] for record in records() if record["image"] in ("images/0.png", "images/1.png")}
    snapshot = Lake.open(teacher_world.lake).cache("capture").open_snapshot()
    errors = {error.sample_id: error.code for commit in snapshot.commits for error in commit.errors}
    assert set(errors) == bad
    assert set(errors.values()) == {"image_format", "image_missing"}


def _tolerant(world: Any) -> Path:
    """The world's configuration, with bad records counted and not fatal."""
    path: Path = world.config()
    text = path.read_text(encoding="utf-8").replace("[[data]]\n", '[[data]]\non_bad_record = "skip"\n')
    path.write_text(f"max_error_rate = 0.5\n{text}", encoding="utf-8")
    return path


def test_the_configuration_refuses_what_is_no_host_and_no_store() -> None:
    """Addresses of numbers, ports, schemes and capitals are not names of hosts."""
    for host in (
        "127.0.0.1",
        "h.example:443",
        "https://h.example",
        "H.example",
        "*",
        "*.",
        "h.example/a",
        "2130706433",
    ):
        with pytest.raises(ValueError, match="is not the name of a host"):
            ImagesConfig(allow_hosts=(host,))
    for store in ("bucket", "s3:/bucket", "file:///etc", "https://h.example", "s3://"):
        with pytest.raises(ValueError, match="is not s3://"):
            ImagesConfig(allow_stores=(store,))
    ImagesConfig(
        allow_hosts=("h.example", "*.h.example", "xn--bcher-kva.example"), allow_stores=("s3://b", "gs://b/p/")
    )


def test_every_key_of_the_configuration_reaches_what_it_is_for(png: Callable[[int], bytes]) -> None:
    """Formats, bytes, pixels and frames of the section are the decoder's limits; bytes are the loader's, too."""
    config = ImagesConfig(formats=("JPEG",), max_bytes=len(png(1)), max_pixels=11, max_frames=3, decode_processes=1)
    limits = config.limits()
    assert (limits.formats, limits.max_bytes, limits.max_pixels, limits.max_frames) == (("JPEG",), len(png(1)), 11, 3)
    with config.open_decoder() as decoder, config.open_loader() as loader:
        (answer,) = decoder.decode_all([png(1)])
        assert str(answer).startswith("image_format: not one of JPEG")
        assert loader.load(ImageRef(data=png(1))) == png(1)
        with pytest.raises(ImageError, match="image_too_large"):
            loader.load(ImageRef(data=png(1) + b"x"))
