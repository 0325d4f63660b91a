"""Images in a real object store, over its own protocol."""

from collections.abc import Callable

import pytest

from logitlake_shared.data_formats.image_refs import image_ref
from logitlake_shared.errors import ImageError
from logitlake_shared.images import ImageLoader
from logitlake_shared.store import open_store


def test_images_come_from_s3(s3_bucket: str, png: Callable[[int], bytes]) -> None:
    """What lies in an allowed bucket is loaded byte for byte; an object or a bucket that is not there has its code."""
    open_store(f"s3://{s3_bucket}").put_new("set/images/a.png", png(1))
    root = f"s3://{s3_bucket}/set"
    with ImageLoader(allow_stores=(root, "s3://no-such-bucket")) as loader:
        assert loader.load(image_ref("images/a.png", root)) == png(1)
        with pytest.raises(ImageError, match=r"^image_missing: "):
            loader.load(image_ref("images/b.png", root))
        with pytest.raises(ImageError, match=r"^image_(missing|fetch_failed): "):
            loader.load(image_ref("a.png", "s3://no-such-bucket"))
