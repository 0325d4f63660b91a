"""How a conversation becomes token ids, for teacher and student alike.

The prompt is the chat template's text up to and including the generation prompt. A response is tokenised alone and
closed by EOS: its ids do not depend on what stands before it, so the same ids can be forced on the teacher and
learned by the student, and a generated answer has the ids that a cached one has. The rule has a name and a version
(`RENDERER`), which is part of a capture's fingerprint together with the token map and the template.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from logitlake_schemas import TokenizerIdentity, fingerprint, sha256_hex
from logitlake_shared.alignment import interleave
from logitlake_shared.errors import ConfigError, DataError
from logitlake_shared.messages import Messages

__all__ = ["RENDERER", "Rendered", "Renderer", "without_images"]

RENDERER = "template-prompt+lone-response+eos/1"

Int32 = npt.NDArray[np.int32]
_UNASKED = "an assistant turn must follow a user turn"
_Segment = tuple[str, str | None]
"""a prompt segment, and the response behind it; None for one that is still to come"""


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
        self._eos = str(self._tokenizer.eos_token)
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
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
        asked = [_answered_turns(messages, open_end) for messages in conversations]
        histories = [
            messages[:end]
            for messages, ends in zip(conversations, asked, strict=True)
            if not isinstance(ends, DataError)
            for end in ends
        ]
        prompts = iter(self._prompt_texts(histories))
        segments = [
            ends
            if isinstance(ends, DataError)
            else self._segments(messages, ends, list(itertools.islice(prompts, len(ends))))
            for messages, ends in zip(conversations, asked, strict=True)
        ]
        texts = [
            text
            for turns in segments
            if not isinstance(turns, DataError)
            for prompt, response in turns
            for text in (prompt, response or "")
        ]
        return self._rendered(segments, iter(self._ids(texts)))

    def render_prompt(self, messages: Messages) -> Int32:
        """The ids of a conversation that waits for the assistant: history and generation prompt."""
        if not _asks(messages):
            raise DataError(_UNASKED)
        (text,) = self._prompt_texts([messages])
        if isinstance(text, DataError):
            raise text
        return np.array(self._ids([text])[0], np.int32)

    def render_response(self, text: str) -> Int32:
        """The ids of one response, EOS included."""
        return np.array([*self._ids([text])[0], self.eos_id], np.int32)

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

    def _segments(
        self, messages: Messages, ends: Sequence[int], prompts: Sequence[str | DataError]
    ) -> list[_Segment] | DataError:
        """Prompt segment and response text of each turn that ends before `ends`; `prompts` are the histories' texts."""
        segments: list[_Segment] = []
        text_so_far = ""
        for end, text in zip(ends, prompts, strict=True):
            if isinstance(text, DataError):
                return text
            if not text.startswith(text_so_far):
                return DataError(
                    "the chat template does not write a finished assistant turn as its text and EOS, so that turn "
                    f"{end} cannot follow; expected the prompt to begin with {text_so_far[-40:]!r}"
                )
            response = _text(messages[end]["content"]) if end < len(messages) else None
            segments.append((text[len(text_so_far) :], response))
            text_so_far = f"{text}{response}{self._eos}"
        return segments

    def _prompt_texts(self, histories: Sequence[Messages]) -> list[str | DataError]:
        """Each history and the generation prompt as text, in one call of the template where it refuses none."""
        as_read = [[self._as_the_template_reads(message) for message in messages] for messages in histories]
        try:
            return list(self._templated(as_read)) if as_read else []
        except jinja2.TemplateError:
            return [self._text_or_refusal(messages) for messages in as_read]

    def _text_or_refusal(self, messages: list[dict[str, Any]]) -> str | DataError:
        try:
            return self._templated([messages])[0]
        except jinja2.TemplateError as error:
            return DataError(f"the chat template refuses the conversation: {error}")

    def _templated(self, conversations: list[list[dict[str, Any]]]) -> list[str]:
        texts: list[str] = self._tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True
        )
        return texts

    def _as_the_template_reads(self, message: Mapping[str, Any]) -> dict[str, Any]:
        # Templates of text-only models add the content to a string; those of multimodal ones walk over its parts.
        content = message["content"]
        if self.image_token_id is None and not any(part["type"] == "image" for part in _content_parts(content)):
            return {**message, "content": _text(content)}
        return dict(message)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            return ids
        # What the call above does, without the masks and offsets that nobody asked for.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _rendered(
        self, segments: Sequence[list[_Segment] | DataError], ids: Iterator[list[int]]
    ) -> list[Rendered | DataError]:
        """The segments in ids: `ids` holds those of each prompt and response in turn. Arrays are views of a few."""
        prompts: list[int] = []
        responses: list[int] = []
        lengths: list[tuple[int, int]] = []
        stops: list[tuple[int, int, int]] = []
        for turns in segments:
            for _, response in () if isinstance(turns, DataError) else turns:
                prompt, answer = next(ids), next(ids)
                if response is not None:
                    answer.append(self.eos_id)
                prompts += prompt
                responses += answer
                lengths.append((len(prompt), len(answer)))
            stops.append((len(prompts), len(lengths), len(responses)))
        prompt_ids, response_ids = np.array(prompts, np.int32), np.array(responses, np.int32)
        prompt_lengths, response_lengths = np.array(lengths, np.int32).reshape(-1, 2).T.copy()
        rendered: list[Rendered | DataError] = []
        for turns, start, stop in zip(segments, [(0, 0, 0), *stops[:-1]], stops, strict=True):
            rendered.append(
                turns
                if isinstance(turns, DataError)
                else Rendered(
                    prompt_ids[start[0] : stop[0]],
                    prompt_lengths[start[1] : stop[1]],
                    response_ids[start[2] : stop[2]],
                    response_lengths[start[1] : stop[1]],
                )
            )
        return rendered


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

    return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)


def _answered_turns(messages: Messages, open_end: bool) -> list[int] | DataError:
    """The place of each assistant turn; with `open_end` a turn that is still to come counts."""
    ends = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends or ends[-1] != len(messages) - 1:
        if not open_end:
            return DataError("the conversation does not end with an assistant turn; there is nothing to learn from it")
        ends.append(len(messages))
    return ends if all(_asks(messages[:end]) for end in ends) else DataError(_UNASKED)


def _asks(history: Messages) -> bool:
    return bool(history) and history[-1]["role"] == "user"


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
