"""Encoded bytes of images from everywhere they may be, several at a time.

Files and bytes at hand are read as they are. Addresses are the data's word, so they are loaded only from hosts and
object stores that the configuration allows: a record must not choose what this machine's credentials open.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from logitlake_shared.data_formats import ImageRef
from logitlake_shared.data_formats.image_refs import MAX_IMAGE_BYTES, public_address
from logitlake_shared.errors import ImageError, LakeError
from logitlake_shared.fetch import Fetcher, FetchPolicy
from logitlake_shared.store import ObjectStore, open_store

__all__ = ["ImageLoader"]


class ImageLoader:
    """Loads images; may be used from several threads. `fetcher` is for tests: it takes the place of the policy."""

    def __init__(
        self,
        policy: FetchPolicy = FetchPolicy(),  # noqa: B008 (frozen)
        allow_stores: Sequence[str] = (),
        max_bytes: int = MAX_IMAGE_BYTES,
        num_threads: int = 8,
        *,
        fetcher: Fetcher | None = None,
    ) -> None:
        self._fetch = fetcher or Fetcher(policy)
        # With the slash, because `s3://photos` must not allow `s3://photos-of-others`.
        self._allow_stores = tuple(f"{prefix.rstrip('/')}/" for prefix in allow_stores)
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="image-loader")
        self._stores: dict[str, ObjectStore] = {}
        self._stores_lock = threading.Lock()

    def load(self, image: ImageRef) -> bytes:
        """The encoded bytes. Raises `ImageError`: see `logitlake_shared.images`."""
        return image.load(self._load_uri, self._max_bytes)

    def load_all(self, images: Sequence[ImageRef]) -> list[bytes | ImageError]:
        """For each image its bytes or why there are none, in order."""
        return list(self._threads.map(self._load_or_error, images))

    def close(self) -> None:
        """Ends the threads. Calling it twice is fine."""
        self._threads.shutdown()

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load_or_error(self, image: ImageRef) -> bytes | ImageError:
        try:
            return self.load(image)
        except ImageError as error:
            return error

    def _load_uri(self, uri: str) -> bytes:
        scheme = uri.partition("://")[0].lower()
        if scheme in ("https", "http"):
            return self._fetch(uri)
        where = public_address(uri)
        bucket, _, name = uri.partition("://")[2].partition("/")
        if ".." in name.split("/") or not uri.startswith(self._allow_stores):
            raise ImageError(
                f"image_url_refused: {where}: not in images.allow_stores; add its bucket there, or a prefix in it"
            )
        try:
            store = self._store(f"{scheme}://{bucket}")
            size = store.size(name)
            if size is None:
                raise ImageError(f"image_missing: {where}: no such object")
            if size > self._max_bytes:
                raise ImageError(f"image_too_large: {where}: {size} bytes, at most {self._max_bytes} are loaded")
            data = store.get(name)
        except LakeError as error:
            raise ImageError(f"image_fetch_failed: {where}: {error}") from error
        if data is None:
            raise ImageError(f"image_missing: {where}: no such object")
        return data

    def _store(self, address: str) -> ObjectStore:
        with self._stores_lock:
            if address not in self._stores:
                self._stores[address] = open_store(address)
            return self._stores[address]
