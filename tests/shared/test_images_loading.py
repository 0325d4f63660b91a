"""Loading encoded bytes: from where they may come, with a code from where they may not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from logitlake_shared.data_formats import ImageRef
from logitlake_shared.data_formats.image_refs import image_ref, public_address
from logitlake_shared.errors import ImageError
from logitlake_shared.fetch import Fetcher, FetchPolicy
from logitlake_shared.images import ImageLoader
from logitlake_shared.store import ObjectStore, memory_store


def said(answer: object) -> str:
    """The sentence of an error; fails on bytes."""
    assert isinstance(answer, ImageError)
    return str(answer)


def test_files_and_bytes_come_in_order_each_fault_in_its_place(tmp_path: Path, png: Callable[[int], bytes]) -> None:
    """A missing file, a folder, a pipe, too many bytes: a code each, and the others are loaded."""
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "large").write_bytes(bytes(2001))
    os.mkfifo(tmp_path / "pipe")
    names = ("a.png", "none.png", ".", "large", "pipe", "x" * 300)
    references = [ImageRef(path=tmp_path / name, name=name) for name in names]
    with ImageLoader(max_bytes=2000) as loader:
        answers = loader.load_all([*references, ImageRef(data=png(2)), ImageRef(data=bytes(2001))])
    assert answers[0] == png(1)
    assert [said(answer).partition(": ")[0] for answer in answers[1:4]] == ["image_missing"] * 2 + ["image_too_large"]
    assert answers[4] == b""  # a pipe that nobody writes to is not waited for; nothing decodes its no bytes
    assert said(answers[5]).startswith("image_missing: ")
    assert answers[6] == png(2)
    assert said(answers[7]).startswith("image_too_large: ")


def test_addresses_are_refused_until_they_are_allowed() -> None:
    """Without hosts and stores nothing leaves this machine, by a loader or without one."""
    with ImageLoader() as loader:
        for uri in ("https://h.example/a.png", "s3://bucket/a.png", "gs://bucket/a.png", "az://box/a.png", "ftp://h/a"):
            assert said(loader.load_all([ImageRef(uri=uri)])[0]).startswith("image_url_refused: ")
            with pytest.raises(ImageError, match=r"^image_url_refused: .*images\.allow_hosts"):
                ImageRef(uri=uri).load()


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> dict[str, ObjectStore]:
    """`s3://photos`, in memory; opening any other store is an error of the test."""
    known = {"s3://photos": memory_store()}
    monkeypatch.setattr("logitlake_shared.images.loading.open_store", known.__getitem__)
    return known


def test_objects_come_from_allowed_stores_alone(stores: dict[str, ObjectStore], png: Callable[[int], bytes]) -> None:
    """An allowed prefix allows what is below it: not its neighbour, not another bucket, not the way out of it."""
    stores["s3://photos"].put_new("2024/a.png", png(1))
    stores["s3://photos"].put_new("2024/large", bytes(2001))
    stores["s3://photos"].put_new("2024-private/b.png", png(2))
    names = ("2024/a.png", "2024/none.png", "2024/large", "2024-private/b.png", "2024/../2024-private/b.png")
    uris = [*(f"s3://photos/{name}" for name in names), "s3://photos-of-others/2024/a.png", "s3://other/2024/a.png"]
    with ImageLoader(allow_stores=("s3://photos/2024",), max_bytes=2000) as loader:
        answers = loader.load_all([ImageRef(uri=uri) for uri in uris])
    assert answers[0] == png(1)
    assert [said(answer).partition(": ")[0] for answer in answers[1:]] == [
        "image_missing",
        "image_too_large",
        *["image_url_refused"] * 4,
    ]


def test_an_image_root_may_be_an_object_store(stores: dict[str, ObjectStore], png: Callable[[int], bytes]) -> None:
    """Names below it become objects, keys stay the names, and no name leads out of it."""
    stores["s3://photos"].put_new("set/a/b.png", png(1))
    reference = image_ref("a/b.png", "s3://photos/set/")
    assert (reference.uri, reference.key) == ("s3://photos/set/a/b.png", "a/b.png")
    with ImageLoader(allow_stores=("s3://photos/",)) as loader:
        assert loader.load(reference) == png(1)
    for name in ("../c.png", "/c.png", "a/../../c.png"):
        with pytest.raises(ValueError, match="leads out of image_root"):
            image_ref(name, "s3://photos/set")


def test_a_key_is_the_records_own_word_on_every_machine(tmp_path: Path, png: Callable[[int], bytes]) -> None:
    """Names relative to image_root, whatever that is; digests of bytes; addresses without what may be secret."""
    (tmp_path / "x").mkdir()
    assert image_ref("x/a.png", tmp_path).key == image_ref("x/a.png", "/elsewhere").key == "x/a.png"
    assert image_ref(str(tmp_path / "x" / "a.png"), tmp_path).key == "x/a.png"
    assert image_ref("x/../b.png", tmp_path).path == tmp_path / "b.png"
    assert ImageRef(data=png(1)).key == ImageRef(data=png(1)).key != ImageRef(data=png(2)).key
    one, two = (image_ref(f"https://u:p@h.example/a?sig={value}#f", ".") for value in ("canary1", "canary2"))
    assert one.key != two.key
    assert one.key.startswith("https://h.example/a?")
    assert "canary" not in one.key + repr(one)
    assert public_address("https://h.example/a") == "https://h.example/a"


def test_references_are_small_frozen_and_hashable(png: Callable[[int], bytes]) -> None:
    """Equal references are one key of a dictionary, and their bytes are in no `repr`."""
    reference = ImageRef(path=Path("a.png"), name="a.png")
    assert len({reference, ImageRef(path=Path("a.png"), name="a.png"), ImageRef(data=png(1))}) == 2
    assert "PNG" not in repr(ImageRef(data=png(1)))
    assert not hasattr(reference, "__dict__")
    with pytest.raises(AttributeError):
        reference.path = Path("b.png")  # type: ignore[misc]  # that it is refused is the law


def test_an_allowed_host_is_fetched_from_by_the_policy() -> None:
    """A loader asks its fetcher for every https and http address, and for nothing else."""
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["10.0.0.1"]

    fetcher = Fetcher(FetchPolicy(allow_hosts=frozenset(("h.example",)), attempts=1), resolve=resolve)
    uris = ("https://h.example/a", "http://h.example/a", "https://i.example/a", "s3://h.example/a")
    with ImageLoader(fetcher=fetcher) as loader:
        answers = loader.load_all([ImageRef(uri=uri) for uri in uris])
    assert "which is not an address of the public internet" in said(answers[0])
    assert all(said(answer).startswith("image_url_refused: ") for answer in answers)
    assert asked == ["h.example"]
