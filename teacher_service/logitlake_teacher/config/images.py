"""`[images]`: which images may be loaded from where, and what loading and decoding one may cost at most."""

import re
from typing import Literal

from pydantic import Field, field_validator

from logitlake_shared.config import StrictModel
from logitlake_shared.fetch import FetchPolicy
from logitlake_shared.images import DecoderPool, ImageLimits, ImageLoader

__all__ = ["ImagesConfig"]

_HOST = re.compile(r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_STORE = re.compile(r"(s3|gs|az)://[^/\s]+(/\S*)?")

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


class ImagesConfig(StrictModel):
    """Images: allowed places, and caps."""

    allow_hosts: tuple[str, ...] = ()
    """hosts that images are fetched from by https, e.g. `images.example.org` or `*.example.org`; default: none"""
    allow_stores: tuple[str, ...] = ()
    """object stores that images are loaded from, e.g. `s3://bucket/photos/`; with this machine's credentials; default:
    none"""
    formats: tuple[Format, ...] = Field(default=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"), min_length=1)
    """formats that are decoded; every other one is `image_format`"""
    max_bytes: int = Field(default=ImageLimits.max_bytes, gt=0)
    """encoded bytes of an image, at most"""
    max_pixels: int = Field(default=ImageLimits.max_pixels, gt=0)
    """width times height, at most; checked before anything is decoded"""
    max_frames: int = Field(default=ImageLimits.max_frames, gt=0)
    """frames of an image, at most; of more than one the first is taken, so 1 refuses animations"""
    decode_processes: int = Field(default=2, gt=0)
    """processes that decode, for each engine"""
    decode_memory_mib: int = Field(default=2048, ge=256)
    """address space of such a process"""
    decode_timeout_s: float = Field(default=20.0, gt=0)
    """seconds that decoding an image may take; then its process is replaced"""
    load_threads: int = Field(default=8, gt=0)
    """images that are read or fetched at the same time, for each engine"""
    fetch_timeout_s: float = Field(default=FetchPolicy.timeout_s, gt=0)
    """seconds that fetching an image may take, all attempts together"""
    fetch_min_bytes_per_s: int = Field(default=FetchPolicy.min_bytes_per_s, ge=0)
    """a slower answer is given up"""
    fetch_attempts: int = Field(default=FetchPolicy.attempts, gt=0)
    """attempts at an image, when the host is busy or the connection breaks"""
    fetch_redirects: int = Field(default=FetchPolicy.max_redirects, ge=0)
    """redirects that are followed, each to an allowed host; default: none"""

    @field_validator("allow_hosts")
    @classmethod
    def _hosts_are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"{host!r} is not the name of a host: lower-case ASCII without scheme, port or path, a country's "
                    "letters as xn--…, never an address of numbers"
                )
        return hosts

    @field_validator("allow_stores")
    @classmethod
    def _stores_are_addresses(cls, stores: tuple[str, ...]) -> tuple[str, ...]:
        for store in stores:
            if not _STORE.fullmatch(store):
                raise ValueError(f"{store!r} is not s3://, gs:// or az:// with a bucket, and a prefix if need be")
        return stores

    def limits(self) -> ImageLimits:
        """What one image may be."""
        return ImageLimits(self.formats, self.max_bytes, self.max_pixels, self.max_frames)

    def open_loader(self) -> ImageLoader:
        """Loads encoded images from wherever they may come; to be closed."""
        policy = FetchPolicy(
            allow_hosts=frozenset(self.allow_hosts),
            max_bytes=self.max_bytes,
            timeout_s=self.fetch_timeout_s,
            min_bytes_per_s=self.fetch_min_bytes_per_s,
            attempts=self.fetch_attempts,
            max_redirects=self.fetch_redirects,
        )
        return ImageLoader(policy, self.allow_stores, self.max_bytes, self.load_threads)

    def open_decoder(self) -> DecoderPool:
        """Decodes images in processes of their own; to be closed."""
        return DecoderPool(
            self.limits(),
            num_processes=self.decode_processes,
            memory_mib=self.decode_memory_mib,
            timeout_s=self.decode_timeout_s,
        )
