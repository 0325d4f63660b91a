"""A sample of a service as a person wants to see it: the `SampleView` that the service made of its own lake.

What is shown is what `logitlake inspect LAKE` shows there. Texts come from the service's tokenizer where it has one,
else, or where one is named, from one of this machine, by the same rule: the token map must be the cache's.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from logitlake_schemas import CaptureSpec
from logitlake_shared.errors import DataError, ServiceError
from logitlake_shared.tools.inspect_sample import Alternative, SampleView, TokenView, save_image
from logitlake_shared.tools.token_text import TokenText, find_token_text

if TYPE_CHECKING:
    from logitlake_shared.client import Client

__all__ = ["find_served", "view_of_document", "view_served"]

_VIEW = TypeAdapter(SampleView)


def find_served(client: "Client", server: str, sample_id: str) -> list[str]:
    """The caches that hold the sample or pair, by name. Raises `DataError` where none does, `ServiceError`."""
    caches = client.caches_of(sample_id)
    if not caches:
        known = client.sql("SELECT DISTINCT sample_id FROM sample_index LIMIT 3").rows()
        raise DataError(
            f"{server}: no sample or pair {sample_id!r} in any cache; ids look like "
            f"{', '.join(row['sample_id'] for row in known)}; list them with: "
            f'logitlake sql --server {server} "SELECT * FROM sample_index"'
        )
    return caches


def view_served(
    client: "Client",
    cache: str,
    sample_id: str,
    tokenizer: Path | None,
    *,
    top: int = 5,
    save_to: Path | None = None,
    student: str | None = None,
) -> SampleView:
    """The sample, its images saved into the folder `save_to` where one is named; beside a student of the service's.

    Raises `ServiceError`, `ConfigError` and `FingerprintMismatchError` for a tokenizer that is not the cache's.
    """
    view = view_of_document(client.sample(cache, sample_id, top, student))
    has_texts = any(token.text is not None for response in view.responses for token in response.tokens)
    if tokenizer is not None or not has_texts:
        spec = CaptureSpec.model_validate(client.cache(cache)["spec"])
        view = _with_texts(view, *find_token_text(spec, tokenizer))
    if save_to is not None:
        saved = (
            save_image(save_to, image.sha256, image.format, client.image(cache, sample_id, image.sha256))
            for image in view.images
        )
        images = (replace(image, saved_to=path) for image, path in zip(view.images, saved, strict=True))
        view = replace(view, images=tuple(images))
    return view


def view_of_document(document: Mapping[str, Any]) -> SampleView:
    """The view that a service's document of a sample was made of. Raises `ServiceError` for what is none."""
    try:
        images = [{**image, "saved_to": None} for image in document["images"]]
        return _VIEW.validate_python({**document, "images": images})
    except (KeyError, TypeError, ValidationError) as error:
        raise ServiceError(
            f"the service's document is no sample of this release: {error}; use the service's release of logitlake"
        ) from error


def _with_texts(view: SampleView, decode: TokenText | None, note: str) -> SampleView:
    def text(token_id: int) -> str | None:
        return None if decode is None else decode(token_id)

    def texts(alternatives: tuple[Alternative, ...]) -> tuple[Alternative, ...]:
        return tuple(replace(other, text=text(other.token_id)) for other in alternatives)

    def token_text(token: TokenView) -> TokenView:
        student = token.student
        return replace(
            token,
            text=text(token.token_id),
            alternatives=texts(token.alternatives),
            student=None if student is None else replace(student, alternatives=texts(student.alternatives)),
        )

    responses = tuple(replace(response, tokens=tuple(map(token_text, response.tokens))) for response in view.responses)
    return replace(view, responses=responses, tokenizer=note)
