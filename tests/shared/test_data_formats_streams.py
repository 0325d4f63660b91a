"""Streams of records: what they select, what they note about their files, and how little they hold."""

import hashlib
import json
import os
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitlake_shared.data_formats import (
    Conversation,
    HfColumns,
    InputLog,
    PreferencePair,
    ReadOptions,
    Selection,
    check_unchanged,
    hf_dataset_records,
    llava_records,
    made_up_records,
    rlaif_v_records,
    selected,
)
from logitlake_shared.errors import DataError

TURNS = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
TEXT = {"id": "t", "conversations": TURNS}
SEEN = {
    "id": "seen",
    "image": "a.png",
    "task": "reading",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A seven."}, *TURNS],
}
ROWS = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(n)}]} for n in range(5)]
OPTIONS = ReadOptions()


def write_lines(path: Path, *records: object) -> Path:
    """A file of lines; text goes in as it is, anything else as JSON."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# ---- selection ----


def test_a_selection_takes_what_is_wanted_and_hides_no_bad_record(tmp_path: Path) -> None:
    """By task, turns and images; bad records pass every filter and count for no limit."""
    two = SEEN | {"id": "two"}
    caption = TEXT | {"id": "caption", "task": "caption"}
    file = write_lines(tmp_path / "d.jsonl", two, "{", caption, TEXT, TEXT | {"id": "u"})

    def ids(selection: Selection) -> list[str]:
        reads = selected(llava_records(file, OPTIONS), selection)
        return [read.sample_id if isinstance(read, Conversation) else "bad" for read in reads]

    assert ids(Selection()) == ["two", "bad", "caption", "t", "u"]
    assert ids(Selection(tasks=("caption", "reading"))) == ["two", "bad", "caption"]
    assert ids(Selection(max_turns=1)) == ["bad", "caption", "t", "u"]
    assert ids(Selection(min_images=1)) == ["two", "bad"]
    assert ids(Selection(max_images=0)) == ["bad", "caption", "t", "u"]
    assert ids(Selection(max_images=0, limit=2)) == ["bad", "caption", "t"]
    assert ids(Selection(limit=1)) == ["two"]


def test_a_limit_stops_reading(tmp_path: Path) -> None:
    """What comes after the last wanted record is not even parsed."""
    (tmp_path / "d.json").write_text(f"[{json.dumps(TEXT)}, this is not JSON")
    (record,) = selected(llava_records(tmp_path / "d.json", OPTIONS), Selection(limit=1))
    assert isinstance(record, Conversation)


# ---- what was read, and whether it still is ----


def test_text_is_hashed_while_it_is_read(tmp_path: Path) -> None:
    """One pass gives the digest of every byte, blank lines and byte order mark included; tables give size and time."""
    file = write_lines(tmp_path / "a.jsonl", TEXT, "", "")
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps([TEXT] * 50, indent=1) + "\n \n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    log = InputLog()
    list(llava_records(file, OPTIONS, log))
    list(llava_records(tmp_path / "b.json", OPTIONS, log))
    list(hf_dataset_records(tmp_path / "c.parquet", HfColumns(), OPTIONS, log))
    assert [state.sha256 for state in log.files] == [
        hashlib.sha256(file.read_bytes()).hexdigest(),
        hashlib.sha256((tmp_path / "b.json").read_bytes()).hexdigest(),
        None,
    ]
    assert [state.num_bytes for state in log.files] == [state.path.stat().st_size for state in log.files]
    check_unchanged(log.files)


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    """Other bytes, another length, gone; a file that was only touched has its digest, a table has none."""
    file = write_lines(tmp_path / "a.jsonl", TEXT)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    log = InputLog()
    list(llava_records(file, OPTIONS, log))
    list(hf_dataset_records(tmp_path / "c.parquet", HfColumns(), OPTIONS, log))
    text, table = log.files
    now = file.read_bytes()
    _touch(file)
    check_unchanged([text])
    file.write_bytes(now.replace(b"Yes", b"No!"))
    with pytest.raises(DataError, match=r"input_changed: .*a\.jsonl"):
        check_unchanged([text])
    file.unlink()
    with pytest.raises(DataError, match=r"input_changed: .* is gone"):
        check_unchanged([text])
    _touch(tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"input_changed: .*c\.parquet"):
        check_unchanged([table])


def _touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


# ---- memory ----

# Buffers of one megabyte for the file and its digest, and what a parser keeps for itself; the longer files have more.
MAX_PEAK = 3 * 2**20


def _write_json(path: Path, num_records: int) -> None:
    with path.open("w") as out:
        out.write("[")
        for number in range(num_records):
            out.write(("," if number else "") + json.dumps(SEEN | {"id": number, "pad": "x" * 5000}))
        out.write("]")


def _write_lines(path: Path, num_records: int) -> None:
    write_lines(path, *(SEEN | {"id": number, "pad": "x" * 5000} for number in range(num_records)))


@pytest.mark.parametrize(("name", "write"), [("d.json", _write_json), ("d.jsonl", _write_lines)])
def test_text_is_streamed(tmp_path: Path, name: str, write: Callable[[Path, int], None]) -> None:
    """The peak of Python's memory is the same for 400 records (2 MB of text) and for 2000."""
    peaks = []
    for num_records in (400, 2000):
        write(tmp_path / name, num_records)
        tracemalloc.start()
        assert sum(1 for _ in llava_records(tmp_path / name, OPTIONS)) == num_records
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < MAX_PEAK
    assert peaks[1] < 1.5 * peaks[0]


def test_tables_are_streamed(tmp_path: Path) -> None:
    """256 MB of images in row groups of 4 MB, and as an Arrow stream: reading both costs less than 64 MB."""
    rows, size = 1024, 2**18
    table = pa.table(
        {
            "question": ["Q"] * rows,
            "chosen": ["a"] * rows,
            "rejected": ["b"] * rows,
            "image": [{"bytes": number.to_bytes(4, "big") * (size // 4), "path": "x"} for number in range(rows)],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False, row_group_size=16)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    del table
    sum(1 for _ in rlaif_v_records(tmp_path / "a.parquet", OPTIONS))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for read in rlaif_v_records(tmp_path, OPTIONS) if isinstance(read, PreferencePair)) == 2 * rows
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 64 * 2**10


def test_made_up_records_are_streamed() -> None:
    """A hundred thousand records hold what a hundred do."""
    peaks = []
    for num_samples in (100, 20_000):
        tracemalloc.start()
        assert sum(1 for _ in made_up_records(num_samples, images=True)) == num_samples
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
