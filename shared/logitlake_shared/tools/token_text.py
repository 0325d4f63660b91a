"""The text of a cache's token ids, by the teacher's own tokenizer or not at all.

The ids of a cache mean something only under the token map in its spec. So a tokenizer is used when the sha256 of its
map is that one, refused when it was named and is another, and where none is found the ids stand alone, with a
sentence that says why. `tokenizers` reads tokenizer.json by itself: neither transformers nor torch is needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitlake_schemas import CaptureSpec, fingerprint
from logitlake_shared.errors import ConfigError, FingerprintMismatchError

__all__ = ["TokenText", "find_token_text", "token_name", "visible"]

_FILE = "tokenizer.json"
_INSTALL = 'the package `tokenizers` is not installed: pip install "logitlake[inspect]"'


@dataclass(frozen=True)
class TokenText:
    """A tokenizer that turns one id into its text."""

    source: Path
    tokenizer: Any

    def __call__(self, token_id: int) -> str:
        """The token's text, special tokens by their names."""
        text = str(self.tokenizer.decode([token_id], skip_special_tokens=False))
        # A part of a character decodes to nothing one can read; the token's own spelling says more.
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else str(self.tokenizer.id_to_token(token_id))


def find_token_text(spec: CaptureSpec, given: Path | None) -> tuple[TokenText | None, str]:
    """The tokenizer in the folder `given`, else in a folder named as the teacher is; and a sentence about it.

    Raises `ConfigError` when `given` holds none that can be read, `FingerprintMismatchError` when it is another one.
    """
    if given is not None:
        text = _load(given)
        if _token_map(text) != spec.tokenizer.token_map_sha256:
            raise FingerprintMismatchError(
                f"{given}: its token map has sha256 {_token_map(text)}, the cache was captured with "
                f"{spec.tokenizer.token_map_sha256}; name the teacher's own folder, or leave --tokenizer out to see ids"
            )
        return text, f"decoded with {text.source}"
    name = spec.engine.model
    for folder in (Path(name), Path("models") / name):
        if (folder / _FILE).is_file():
            try:
                text = _load(folder)
            except ConfigError as error:
                return None, f"ids only: {error}"
            if _token_map(text) == spec.tokenizer.token_map_sha256:
                return text, f"decoded with {text.source}"
    return None, (
        f"ids only: name the folder of the teacher {name!r} with --tokenizer DIR (or as `tokenizer` of a service) "
        "to see text"
    )


def token_name(token_id: int, text: str | None) -> str:
    """What a token is called in a table: its text on one line, blanks made visible; the id where there is no text."""
    return f"#{token_id}" if text is None else visible(text).replace(" ", "␣") or '""'


def visible(text: str, newlines: bool = False) -> str:
    """Control characters written out: what a model answered moves no cursor and turns no line around."""
    return "".join(
        sign if sign.isprintable() or (newlines and sign == "\n") else sign.encode("unicode_escape").decode()
        for sign in text
    )


def _load(folder: Path) -> TokenText:
    path = folder if folder.is_file() else folder / _FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: there is no {_FILE}; name the teacher's model folder")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(_INSTALL) from None
    try:
        return TokenText(path, Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{path}: cannot be read as a tokenizer: {error}") from None


def _token_map(text: TokenText) -> str:
    return fingerprint(text.tokenizer.get_vocab(with_added_tokens=True))
