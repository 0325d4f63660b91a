"""Where the data comes from: one `[[data]]` table a source, a union on `type`.

Each source reads itself: `read()` is the stream of its records, cut to what its own keys want. Bad records come along
as `BadRecord`; what becomes of them is `on_bad_record`, and the planner's to do, which sees all sources.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from logitlake_shared.config import StrictModel
from logitlake_shared.data_formats import (
    BadRecord,
    Conversation,
    HfColumns,
    InputLog,
    PreferencePair,
    ReadOptions,
    Selection,
    hf_dataset_records,
    llava_records,
    made_up_records,
    openai_records,
    rlaif_v_records,
    selected,
)

if TYPE_CHECKING:
    from logitlake_shared.data_formats.tokens import TokenBatch

__all__ = [
    "ConversationSource",
    "FakeSource",
    "HfDatasetSource",
    "LlavaSource",
    "OpenAiSource",
    "RlaifVSource",
    "Source",
    "TextSource",
    "TokensSource",
]

# A folder or an address: a `Path` would make `s3:/bucket` of `s3://bucket`.
Place = Annotated[str, BeforeValidator(str)]


class _Source(StrictModel):
    source: str | None = None
    """name of the source in the lake; default: the file's name"""
    task: str = "chat"
    """task of records that name none"""
    split: str = "train"
    """split of records that name none"""
    limit: int | None = Field(default=None, gt=0)
    """take this many of the wanted records, then stop reading; default: all"""
    tasks: tuple[str, ...] | None = Field(default=None, min_length=1)
    """take records of these tasks only; default: of all"""
    min_images: int = Field(default=0, ge=0)
    """take records with at least this many images"""
    max_images: int | None = Field(default=None, ge=0)
    """take records with at most this many images; 0 is text alone"""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """a record that cannot be used ends the command, or is left out and counted"""

    @model_validator(mode="after")
    def _some_record_can_be_wanted(self) -> Self:
        if self.max_images is not None and self.max_images < self.min_images:
            raise ValueError(
                f"max_images is {self.max_images} and min_images {self.min_images}, which no record can be; raise "
                "max_images"
            )
        return self


class _Turns(_Source):
    max_turns: int | None = Field(default=None, gt=0)
    """take conversations with at most this many answers"""

    def _wanted(self) -> Selection:
        return Selection(self.tasks, self.max_turns, self.min_images, self.max_images, self.limit)


class _Conversations(_Turns):
    def read(self, log: InputLog | None = None) -> Iterator[Conversation | BadRecord]:
        """The records that are wanted, and every bad one; `log` learns the files as they are read.

        Raises `DataError` for a file that cannot be read on.
        """
        return selected(self._all(log), self._wanted())

    def _all(self, log: InputLog | None) -> Iterator[Conversation | BadRecord]:
        raise NotImplementedError


class _Files(_Turns):
    image_root: Place = "."
    """folder, or s3://, gs://, az:// address, that the records' image names are relative to"""

    def _options(self) -> ReadOptions:
        # Absolute, because whoever loads the image may have another working directory. Whether the last word must be
        # the assistant's depends on what is captured, which the renderer checks.
        root = self.image_root if "://" in self.image_root else Path(self.image_root).absolute()
        return ReadOptions(root, self.source, self.task, self.split, needs_response=False)


class _ConversationFiles(_Files, _Conversations):
    pass


class LlavaSource(_ConversationFiles):
    """Conversations in LLaVA's JSON."""

    type: Literal["llava"] = "llava"
    path: Path
    """a .json list or .jsonl file, a folder of them, or a pattern such as `data/*.jsonl`"""

    def _all(self, log: InputLog | None) -> Iterator[Conversation | BadRecord]:
        return llava_records(self.path, self._options(), log)


class OpenAiSource(_ConversationFiles):
    """Conversations in OpenAI's form: `messages` JSONL, or the file of the Batch API."""

    type: Literal["openai"] = "openai"
    path: Path
    """a .jsonl file or .json list, a folder of them, or a pattern such as `data/*.jsonl`"""

    def _all(self, log: InputLog | None) -> Iterator[Conversation | BadRecord]:
        return openai_records(self.path, self._options(), log)


class HfDatasetSource(_ConversationFiles):
    """Conversations in a folder of Hugging Face `datasets`, or in plain Parquet or Arrow files."""

    type: Literal["hf_dataset"] = "hf_dataset"
    path: Path
    """what `save_to_disk` wrote (one dataset or all splits), a Parquet or Arrow file, a folder of them, a pattern"""
    messages_column: str | None = None
    """column of the turns; default: `messages`, else `conversations`"""
    images_column: str | None = None
    """column of the images; default: `images`, else `image`, else none"""
    id_column: str = "id"
    """column of the ids, if it is there"""
    task_column: str = "task"
    """column of the tasks, if it is there"""

    def _all(self, log: InputLog | None) -> Iterator[Conversation | BadRecord]:
        columns = HfColumns(self.messages_column, self.images_column, self.id_column, self.task_column)
        return hf_dataset_records(self.path, columns, self._options(), log)


class TokensSource(_Files):
    """Conversations that are token ids already, in Parquet or Arrow files: a plan of them needs no template."""

    type: Literal["tokens"] = "tokens"
    path: Path
    """a Parquet or Arrow file with the columns of a lake's samples, a folder of them, or a pattern"""

    def read(self, log: InputLog | None = None) -> "Iterator[TokenBatch]":
        """As the conversations' `read`, of columns: bad rows are rows with a problem."""
        # Here, because it needs pyarrow, whose import a `--help` should not wait for.
        from logitlake_shared.data_formats.tokens import selected_tokens, token_batches

        return selected_tokens(token_batches(self.path, self._options(), log), self._wanted())


class FakeSource(_Conversations):
    """Seeded conversations that are made up: a capture that needs no data."""

    type: Literal["fake"] = "fake"
    num_samples: int = Field(default=1000, ge=0)
    """conversations, of one question and one answer"""
    prompt_words: int = Field(default=8, gt=0)
    """words of a question"""
    response_words: int = Field(default=16, gt=0)
    """words of an answer"""
    images: bool = False
    """each question is about an image, one of 64"""
    seed: int = 0
    """another seed is other words and other images"""

    def _all(self, log: InputLog | None) -> Iterator[Conversation | BadRecord]:
        del log  # there is no file
        return made_up_records(
            self.num_samples,
            prompt_words=self.prompt_words,
            response_words=self.response_words,
            images=self.images,
            seed=self.seed,
            task=self.task,
            source=self.source or "fake",
            split=self.split,
        )


class RlaifVSource(_Source):
    """Preference pairs in the form of RLAIF-V."""

    type: Literal["rlaif_v"] = "rlaif_v"
    path: Path
    """a Parquet or Arrow file with the images inside, a folder of them, a pattern, or what `save_to_disk` wrote"""
    task: str = "preference"
    """task of rows whose `origin_split` names none"""

    def read(self, log: InputLog | None = None) -> Iterator[PreferencePair | BadRecord]:
        """As the conversations' `read`, of pairs."""
        options = ReadOptions(source=self.source, task=self.task, split=self.split)
        wanted = Selection(self.tasks, None, self.min_images, self.max_images, self.limit)
        return selected(rlaif_v_records(self.path, options, log), wanted)


ConversationSource = Annotated[
    LlavaSource | OpenAiSource | HfDatasetSource | TokensSource | FakeSource, Field(discriminator="type")
]
TextSource = LlavaSource | OpenAiSource | HfDatasetSource | FakeSource | RlaifVSource
Source = TextSource | TokensSource
