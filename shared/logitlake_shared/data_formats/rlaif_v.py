"""Preference pairs as RLAIF-V publishes them: rows with question, chosen, rejected, and the image's bytes.

One Parquet or Arrow file, a folder of them, or a folder that `datasets` saved.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from logitlake_shared.data_formats.files import InputFile, InputLog
from logitlake_shared.data_formats.image_refs import ImageRef
from logitlake_shared.data_formats.records import (
    BadRecord,
    PreferencePair,
    ReadOptions,
    RecordError,
    as_text,
    check_text,
    good_records,
    record_id,
)
from logitlake_shared.data_formats.tables import TableRow, table_files, table_rows

__all__ = ["read_rlaif_v", "rlaif_v_records"]

_REQUIRED = ("chosen", "image", "question", "rejected")
_COLUMNS = (*_REQUIRED, "ds_name", "idx", "origin_split")


def rlaif_v_records(
    path: Path, options: ReadOptions, log: InputLog | None = None
) -> Iterator[PreferencePair | BadRecord]:
    """The pairs, in the order of files and rows. Raises `DataError` for a file that cannot be read."""
    for table in table_files(path):
        for row in table_rows(table.file, _REQUIRED, log, _COLUMNS):
            try:
                yield _pair(row, table.file, options, table.split or options.split)
            except (RecordError, ValueError) as fault:
                yield BadRecord(row.where, str(fault))


def read_rlaif_v(path: Path, *, source: str | None = None) -> Iterator[PreferencePair]:
    """`rlaif_v_records` for callers that need every row. Raises `DataError`."""
    return good_records(rlaif_v_records(path, ReadOptions(source=source, task="preference")))


def _pair(row: TableRow, file: InputFile, options: ReadOptions, split: str) -> PreferencePair:
    values = row.values
    texts = {key: _required_text(values[key], key) for key in ("question", "chosen", "rejected")}
    image = (values["image"] or {}).get("bytes")
    if not image:
        raise RecordError("`image.bytes` is empty; RLAIF-V rows carry their image")
    if texts["chosen"] == texts["rejected"]:
        raise RecordError("chosen and rejected are the same text; drop the row")
    return PreferencePair(
        pair_id=record_id(values.get("idx"), file, row.number),
        task=_task(values.get("origin_split"), options.task),
        source=options.source or as_text(values.get("ds_name"), "ds_name", file.stem),
        split=split,
        messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": texts["question"]}]}],
        images=(ImageRef(data=image),),
        chosen=texts["chosen"],
        rejected=texts["rejected"],
        where=row.where,
    )


def _required_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"`{name}` must be a non-empty string, got {value!r:.120}")
    return check_text(value, name)


def _task(origin_split: Any, default: str) -> str:
    """RLAIF-V writes where a question comes from as JSON text, e.g. `{"type": "detailed_description", …}`."""
    text = as_text(origin_split, "origin_split", "")
    try:
        origin = json.loads(text)
    except (ValueError, RecursionError):
        return text or default
    return as_text(origin.get("type"), "origin_split.type", default) if isinstance(origin, dict) else default
