"""Where an image is, before anybody needs its bytes.

A plan holds millions of these, so that they are small and say nothing of the machine: `key` is what the record says.
Loading knows three ways: a local file, bytes at hand, and an address. An address is loaded only by a loader that was
told which hosts and which object stores are allowed (`logitlake_shared.images.ImageLoader`); without one it is
refused. No message and no `repr` shows the query of an address, which may hold a signature.
"""

import base64
import binascii
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from logitlake_schemas import sha256_hex
from logitlake_shared.errors import ImageError

__all__ = ["MAX_IMAGE_BYTES", "ImageRef", "LoadUri", "image_ref", "public_address"]

MAX_IMAGE_BYTES = 32 * 2**20
"""Encoded bytes of one image, unless a configuration says otherwise."""
_MAX_ADDRESS = 8192
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NOT_IN_NAMES = re.compile(r"[\x00-\x1f\ud800-\udfff]")
_QUERY_DIGITS = 16

LoadUri = Callable[[str], bytes]
"""Loads an address. Raises `ImageError`."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an image's encoded bytes are: in a file, at hand, or at an address. Exactly one of the three is set."""

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    uri: str | None = field(default=None, repr=False)
    """`https://…`, `s3://…`, `gs://…`, `az://…`"""
    name: str | None = None
    """what the record calls the file, where that is not the whole path"""

    @property
    def key(self) -> str:
        """The image's name, the same on every machine: the record's own word, or the sha256 of bytes at hand."""
        if self.name is not None:
            return self.name
        if self.uri is not None:
            return public_address(self.uri)
        return str(self.path) if self.data is None else sha256_hex(self.data)

    def load(self, load_uri: LoadUri | None = None, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """The encoded bytes, addresses by `load_uri`.

        Raises `ImageError`: `image_missing`, `image_too_large`, `image_url_refused`, and what `load_uri` raises.
        """
        if self.uri is not None:
            if load_uri is None:
                raise ImageError(
                    f"image_url_refused: {self.key} is an address, and no host or store is allowed here; set "
                    "images.allow_hosts or images.allow_stores, or download the images first"
                )
            return load_uri(self.uri)
        data = self.data if self.data is not None else self._read(max_bytes)
        if len(data) > max_bytes:
            raise ImageError(f"image_too_large: {self.key} has more than {max_bytes} bytes, which are the most read")
        return data

    def _read(self, max_bytes: int) -> bytes:
        path = self.path or Path()
        try:
            # Not blocking: a name that is a pipe must not hold up the capture for ever.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as file:
                return file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            # By its own name: the message may end in a lake, which should be the same wherever it was captured.
            raise ImageError(f"image_missing: {self.key}: {getattr(error, 'strerror', None) or error}") from error


def image_ref(name: str, image_root: Path | str) -> ImageRef:
    """The image that a record calls `name`: an address, a data URI, or a name below `image_root`.

    Raises `ValueError` for a name that cannot be one, or that leads out of `image_root`.
    """
    if name.startswith("data:"):
        return ImageRef(data=_data_uri(name))
    if len(name) > _MAX_ADDRESS or _NOT_IN_NAMES.search(name):
        raise ValueError(f"image {name[:80]!r}: not the name of an image")
    scheme = _SCHEME.match(name)
    if scheme:
        if scheme[1].lower() in ("https", "http", "s3", "gs", "az"):
            return ImageRef(uri=name)
        raise ValueError(f"image {name[:80]!r}: {scheme[1]}:// is no address that images are loaded from")
    if isinstance(image_root, str):
        if _SCHEME.match(image_root):
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise ValueError(f"image {name[:80]!r}: leads out of image_root {image_root}")
            return ImageRef(uri=f"{image_root.rstrip('/')}/{name}", name=name)
        image_root = Path(image_root)
    # Without a closer look: a plan of ten million samples passes here.
    if not name.startswith("/") and ".." not in name:
        return ImageRef(path=image_root / name, name=name)
    root = os.path.normpath(image_root.absolute())
    whole = os.path.normpath(image_root.absolute() / name)
    if os.path.commonpath([whole, root]) != root:
        raise ValueError(f"image {name[:80]!r}: leads out of image_root {root}; set image_root to a folder above it")
    return ImageRef(path=Path(whole), name=os.path.relpath(whole, root))


def public_address(uri: str) -> str:
    """The address without what may be secret: no user, no fragment, and the query as a digest."""
    head, mark, query = uri.partition("#")[0].partition("?")
    scheme, _, rest = head.partition("://")
    host, slash, path = rest.partition("/")
    digest = f"?{sha256_hex(query.encode())[:_QUERY_DIGITS]}" if mark else ""
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{digest}"


def _data_uri(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"image {head[:40]!r}…: expected data:image/<type>;base64,<data>")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image {head[:40]!r}…: not valid base64: {error}") from None
