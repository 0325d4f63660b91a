"""The state of the files that a source's records are in: a plan is used again while it is the same."""

from typing import assert_never

from logitlake_shared.data_formats import input_files
from logitlake_shared.data_formats.files import JSON_SUFFIXES, InputFile
from logitlake_shared.data_formats.tables import table_files
from logitlake_teacher.config import (
    FakeSource,
    HfDatasetSource,
    LlavaSource,
    OpenAiSource,
    RlaifVSource,
    Source,
    TokensSource,
)

__all__ = ["file_stamps"]


def file_stamps(source: Source) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change (ns) of every data file of the source, in order.

    Raises `DataError` where there is no file.
    """
    stamps = []
    for file in _files(source):
        status = file.path.stat()
        stamps.append((str(file.path.resolve()), status.st_size, status.st_mtime_ns))
    return stamps


def _files(source: Source) -> list[InputFile]:
    match source:
        case FakeSource():
            return []
        case LlavaSource() | OpenAiSource():
            return input_files(source.path, JSON_SUFFIXES)
        case HfDatasetSource() | TokensSource() | RlaifVSource():
            return [table.file for table in table_files(source.path)]
        case _:
            assert_never(source)
