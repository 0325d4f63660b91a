"""How a conversation becomes token ids, for teacher and student alike.

The prompt is the chat template's text up to and including the generation prompt. A response is tokenised alone and
closed by EOS: its ids do not depend on what stands before it, so the same ids can be forced on the teacher and
learned by the student, and a generated answer has the ids that a cached one has. The rule has a name and a version
(`RENDERER`), which is part of a capture's fingerprint together with the token map and the template.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitlake_schemas import TokenizerIdentity, fingerprint, sha256_hex
from logitlake_shared.alignment import interleave
from logitlake_shared.errors import ConfigError, DataError

__all__ = ["RENDERER", "Rendered", "Renderer", "without_images"]

RENDERER = "template-prompt+lone-response+eos/1"

Int32 = npt.NDArray[np.int32]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids: prompt segments and responses, alternating, with one placeholder an image."""

    prompt_ids: Int32
    prompt_lengths: Int32
    response_ids: Int32
    response_lengths: Int32

    def with_history_as_prompt(self) -> "Rendered":
        """One prompt segment and one response: the answers before the last are part of the prompt."""
        ids_S, _ = interleave(self.prompt_ids, self.prompt_lengths, self.response_ids, self.response_lengths)
        prompt_length = len(ids_S) - int(self.response_lengths[-1])
        return Rendered(
            prompt_ids=ids_S[:prompt_length].astype(np.int32),
            prompt_lengths=np.array([prompt_length], np.int32),
            response_ids=ids_S[prompt_length:].astype(np.int32),
            response_lengths=self.response_lengths[-1:],
        )


class Renderer:
    """Renders with the tokenizer and chat template saved in `model_dir`. Raises `ConfigError` when they are missing."""

    def __init__(self, model_dir: Path) -> None:
        if not model_dir.is_dir():
            raise ConfigError(f"{model_dir}: no such model folder")
        if not any(model_dir.glob("tokenizer*")):
            raise ConfigError(f"{model_dir}: no tokenizer there (expected tokenizer.json); name a checkpoint's folder")
        try:
            self._tokenizer = _load_tokenizer(model_dir)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{model_dir}: no tokenizer that transformers can load: {error}") from error
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{model_dir}: the tokenizer has no chat template; add chat_template.jinja")
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(f"{model_dir}: the tokenizer names no EOS token, which closes every response")
        self.model_dir = model_dir
        self.eos_id = int(self._tokenizer.eos_token_id)
        pad_id = self._tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad_id is None else int(pad_id)
        self.vocab_size = len(self._tokenizer)
        self.image_token_id = _image_token_id(model_dir)

    def render(self, messages: Messages) -> Rendered:
        """The whole conversation. Raises `DataError` unless it ends with an assistant turn and turns alternate."""
        (rendered,) = self.render_batch([messages])
        if isinstance(rendered, DataError):
            raise rendered
        return rendered

    def render_batch(self, conversations: Sequence[Messages], *, open_end: bool = False) -> list[Rendered | DataError]:
        """Many conversations, several times faster than one by one; for each its ids, or why there are none.

        With `open_end` a conversation may end with a user turn: its last response is then empty, without EOS.
        """
        segments: list[list[tuple[str, str | None]] | DataError] = []
        for messages in conversations:
            try:
                segments.append(self._segments(messages, open_end))
            except DataError as error:
                segments.append(error)
        texts = [
            text
            for turns in segments
            if not isinstance(turns, DataError)
            for prompt, response in turns
            for text in (prompt, response or "")
        ]
        ids = iter(self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        rendered: list[Rendered | DataError] = []
        for turns in segments:
            if isinstance(turns, DataError):
                rendered.append(turns)
                continue
            prompts, responses = [], []
            for _, response in turns:
                prompts.append(next(ids))
                responses.append([*next(ids), *([] if response is None else [self.eos_id])])
            rendered.append(
                Rendered(
                    prompt_ids=np.array([token for own in prompts for token in own], np.int32),
                    prompt_lengths=np.array([len(own) for own in prompts], np.int32),
                    response_ids=np.array([token for own in responses for token in own], np.int32),
                    response_lengths=np.array([len(own) for own in responses], np.int32),
                )
            )
        return rendered

    def render_prompt(self, messages: Messages) -> Int32:
        """The ids of a conversation that waits for the assistant: history and generation prompt."""
        text = self._prompt_text(messages)
        return np.array(self._ids(text), np.int32)

    def render_response(self, text: str) -> Int32:
        """The ids of one response, EOS included."""
        return np.array([*self._ids(text), self.eos_id], np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of response ids, special tokens left out, surrounding blanks stripped."""
        text: str = self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)
        return text.strip()

    def token(self, token_id: int) -> str:
        """The text of one token, special tokens shown by name."""
        text: str = self._tokenizer.decode([token_id])
        return text

    def identity(self) -> TokenizerIdentity:
        """What a lake's fingerprint holds of this tokenizer."""
        return TokenizerIdentity(
            token_map_sha256=fingerprint(self._tokenizer.get_vocab()),
            chat_template_sha256=sha256_hex(str(self._tokenizer.chat_template).encode()),
            renderer=RENDERER,
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            image_token_id=self.image_token_id,
        )

    def _segments(self, messages: Messages, open_end: bool) -> list[tuple[str, str | None]]:
        """Prompt segment and response text of each assistant turn; None for a response that is still open."""
        turns: list[tuple[str, str | None]] = []
        text_so_far = ""
        for end, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            text = self._continued(messages[:end], text_so_far)
            response = _text(message["content"])
            turns.append((text.removeprefix(text_so_far), response))
            text_so_far = text + response + str(self._tokenizer.eos_token)
        if not messages or messages[-1]["role"] != "assistant":
            if not open_end:
                raise DataError(
                    "the conversation does not end with an assistant turn; there is nothing to learn from it"
                )
            turns.append((self._continued(messages, text_so_far).removeprefix(text_so_far), None))
        return turns

    def _continued(self, messages: Messages, text_so_far: str) -> str:
        text = self._prompt_text(messages)
        if not text.startswith(text_so_far):
            raise DataError(
                "the chat template does not write a finished assistant turn as its text and EOS, so that turn "
                f"{len(messages)} cannot follow; expected the prompt to begin with {text_so_far[-40:]!r}"
            )
        return text

    def _prompt_text(self, messages: Messages) -> str:
        if not messages or messages[-1]["role"] != "user":
            raise DataError("an assistant turn must follow a user turn")
        text: str = self._tokenizer.apply_chat_template(
            [self._as_the_template_reads(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return text

    def _as_the_template_reads(self, message: Mapping[str, Any]) -> dict[str, Any]:
        # Templates of text-only models add the content to a string; those of multimodal ones walk over its parts.
        content = message["content"]
        if self.image_token_id is None and not any(part["type"] == "image" for part in _content_parts(content)):
            return {**message, "content": _text(content)}
        return dict(message)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def without_images(messages: Messages) -> list[dict[str, Any]]:
    """The same conversation, its image parts left out: what the teacher is asked to learn what the images add."""
    return [
        {**message, "content": [part for part in _content_parts(message["content"]) if part["type"] != "image"]}
        if not isinstance(message["content"], str)
        else dict(message)
        for message in messages
    ]


def _load_tokenizer(model_dir: Path) -> Any:
    # tokenizer.json is the whole tokenizer. Read as such it needs no torch, whose import takes seconds: a finished
    # capture is recognised in one.
    if (model_dir / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(model_dir)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def _content_parts(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return ({"type": "text", "text": content},) if isinstance(content, str) else content


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in _content_parts(content) if part["type"] == "text")


def _image_token_id(model_dir: Path) -> int | None:
    path = model_dir / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    token = config.get("image_token_id", config.get("image_token_index"))
    return None if token is None else int(token)
