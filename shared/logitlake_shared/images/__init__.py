"""Images under guard: loaded from where they may come, checked, decoded where a fault costs one image only.

loading         `ImageLoader`: encoded bytes from files, object stores and allowed hosts, several at a time
pool            `DecoderPool`: decoding in disposable processes with caps on memory and time
records         `DecodedImage`, and an image's row in the lake

A teacher's images go through the pool, because anybody may have made them; a student decodes in its own process
(`decode_image`) what a lake holds, which went through the pool before. What a model makes of the pixels is
`logitlake_shared.pixels`. Codes of `ImageError`:

    image_missing        no such file or object, or 404
    image_url_refused    an address that is not allowed
    image_fetch_failed   the host or the store answered with an error, or not at all
    image_fetch_timeout  it answered too slowly
    image_format         not one of the formats that are decoded
    image_too_large      more bytes or pixels than allowed, or more memory than a decoder may have
    image_animated       more frames than allowed
    image_decode         damaged, or the decoder died of it
    image_timeout        decoding took too long
"""

from logitlake_shared.image_decoder.decoding import ImageHeader, ImageLimits, decode_image
from logitlake_shared.images.loading import ImageLoader
from logitlake_shared.images.pool import DecoderPool
from logitlake_shared.images.records import DecodedImage, inspect_image

__all__ = [
    "DecodedImage",
    "DecoderPool",
    "ImageHeader",
    "ImageLimits",
    "ImageLoader",
    "decode_image",
    "inspect_image",
]
