"""`logitlake ls`, `sql`, `gc` and `rebuild` as a user, a pipe and a script meet them."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from logitlake_shared.cli import cli
from logitlake_shared.cli_output import plain, show_records, show_table, to_json
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset

TASKS = "SELECT task, count(*) AS n FROM samples GROUP BY task ORDER BY task"
TOKENS = "SELECT * FROM tokens ORDER BY sample_id, position"
# Every kind of value that an answer may hold.
EVERYTHING = (
    "SELECT NULL AS nothing, '' AS empty, 'a,\"b\nc' AS text, 'NaN'::DOUBLE AS nan, '-inf'::FLOAT AS minus_infinity, "
    "1.5 AS half, 12345678901234567890::HUGEINT AS huge, [1, NULL, 3] AS list, '\\x00ab'::BLOB AS blob, true AS yes, "
    "DATE '2024-02-29' AS day, {'a': 1} AS struct"
)


def test_formats_hold_the_same_rows(small_lake: Path, tmp_path: Path) -> None:
    """json, csv, parquet and arrow of one question agree with each other, on stdout and in a file."""
    wanted = [{"task": "caption", "n": 3}, {"task": "reading", "n": 3}]
    assert [json.loads(line) for line in _bytes(small_lake, TASKS, "-o", "json").splitlines()] == wanted
    assert _bytes(small_lake, TASKS, "-o", "csv").decode().splitlines() == ["task,n", "caption,3", "reading,3"]
    assert pq.read_table(io.BytesIO(_bytes(small_lake, TASKS, "-o", "parquet"))).to_pylist() == wanted
    assert pa.ipc.open_stream(_bytes(small_lake, TASKS, "-o", "arrow")).read_all().to_pylist() == wanted
    for suffix in ("json", "csv", "parquet", "arrow"):
        path = tmp_path / f"answer.{suffix}"
        assert _bytes(small_lake, TASKS, "--to", str(path)) == b""
        assert path.read_bytes() == _bytes(small_lake, TASKS, "-o", suffix)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_arrow_is_a_stream_that_another_process_reads(small_lake: Path) -> None:
    """What a pipe carries is Arrow's own stream format, equal to the answer in this process."""
    command = [sys.executable, "-c", "from logitlake_shared.cli import main; main()", "sql", str(small_lake), TOKENS]
    done = subprocess.run([*command, "-o", "arrow"], capture_output=True, check=True)
    table = pa.ipc.open_stream(done.stdout).read_all()
    dataset = LakeDataset(small_lake, "main")
    labels = [token for i in range(len(dataset)) for token in dataset[i].response_ids.tolist()]
    assert table.column("token_id").to_pylist() == labels
    assert done.stderr == b""  # the count of rows is for terminals


@pytest.mark.parametrize("output", ["arrow", "parquet"])
def test_bytes_are_refused_on_a_terminal(small_lake: Path, output: str) -> None:
    """A terminal gets a sentence that says what to do, and exit code 2."""
    code, shown = _on_terminal(["sql", str(small_lake), TASKS, "-o", output])
    assert code == 2
    assert f"{output} is binary and this is a terminal; pipe it on, or name a file with --to FILE" in shown


def test_a_terminal_sees_some_rows_and_how_many_there_are(small_lake: Path) -> None:
    """The table is cut at --rows with a sentence; 0 shows all; rows and time follow on stderr."""
    _, shown = _on_terminal(["sql", str(small_lake), TOKENS, "--rows", "5"])
    assert "5 of 24 rows; --rows 0 shows all" in shown
    assert re.search(r"24 rows in \d+\.\d\d s", shown)
    _, shown = _on_terminal(["sql", str(small_lake), TASKS, "--rows", "0"])
    assert " of " not in shown
    assert "2 rows in" in shown


def test_a_pipe_gets_every_row(small_lake: Path) -> None:
    """A table that goes elsewhere than to a terminal is not cut, whatever --rows says."""
    lines = _bytes(small_lake, TOKENS, "--rows", "5").decode().splitlines()
    assert len(lines) == 2 + 24


def test_json_and_csv_lose_nothing(small_lake: Path) -> None:
    """NULL and the empty text differ, NaN and infinities have names, bytes are base64, big integers are exact."""
    (line,) = _bytes(small_lake, EVERYTHING, "-o", "json").splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "nothing": None,
        "empty": "",
        "text": 'a,"b\nc',
        "nan": "NaN",
        "minus_infinity": "-Infinity",
        "half": 1.5,
        "huge": 12345678901234567890,
        "list": [1, None, 3],
        "blob": "AGFi",
        "yes": True,
        "day": "2024-02-29",
        "struct": {"a": 1},
    }
    read = pyarrow.csv.read_csv(
        io.BytesIO(_bytes(small_lake, EVERYTHING, "-o", "csv")),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            strings_can_be_null=True, quoted_strings_can_be_null=False, null_values=[""]
        ),
    ).to_pylist()[0]
    assert (read["nothing"], read["empty"], read["text"], read["blob"]) == (None, "", 'a,"b\nc', "AGFi")
    assert read["list"] == "[1, null, 3]"


def test_a_table_shows_every_kind_of_value(small_lake: Path) -> None:
    """NULL, NaN, lists and bytes are told from text, and a line break in a cell breaks no line."""
    lines = _bytes(small_lake, EVERYTHING).decode().splitlines()
    assert len(lines) == 3
    for shown in ("NULL", "NaN", "-inf", "[1, NULL, 3]", "<3 bytes>", 'a,"b\\nc', "12345678901234567890", "true"):
        assert shown in lines[2]


def test_two_columns_of_one_name_are_refused_as_json(small_lake: Path) -> None:
    """An object cannot hold both; a table can."""
    result = _run("sql", str(small_lake), "SELECT 1 AS a, 2 AS a", "-o", "json")
    assert "two columns of one name" in str(result.exception)
    assert _bytes(small_lake, "SELECT 1 AS a, 2 AS a", "-o", "csv") == b"a,a\n1,2\n"


def test_no_cell_steers_the_terminal() -> None:
    """Control characters are written out, and brackets are not taken for markup."""
    shown = _printed(pa.table({"text": ["\x1b[31mred\x07", "[bold]plain[/bold]"]}), width=80)
    assert "\x1b[31m" not in shown
    assert "\\x1b[31mred\\x07" in shown
    assert "[bold]plain[/bold]" in shown


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_wide_table_stays_within_the_terminal(width: int) -> None:
    """No line is longer than the terminal is wide; every value is there, numbers unbroken."""
    table = pa.table(
        {
            **{f"number_{place}": [12345678.0 + place] for place in range(4)},
            **{f"text_{place}": [f"{place}" * 30] for place in range(4)},
        }
    )
    shown = _printed(table, width)
    assert max(len(line) for line in shown.splitlines()) <= width
    for place in range(4):
        assert f"{12345678.0 + place:.6g}" in shown
    assert shown.count("3") >= 30


def test_records_that_do_not_fit_go_under_each_other() -> None:
    """Each record keeps its heading and its values, on a terminal of any width."""
    table = pa.table({"cache": [f"cache-{n}" for n in range(9)], "tokens": [n * 1000 for n in range(9)]})
    console = Console(width=40, force_terminal=True, color_system=None, file=io.StringIO())
    show_records(table, console)
    shown = _output_of(console)
    assert max(len(line) for line in shown.splitlines()) <= 40
    for number in range(9):
        assert f"cache-{number}" in shown


def test_wrong_questions_are_explained_with_the_views_there_are(small_lake: Path) -> None:
    """DuckDB's own explanation, the views, and exit code 2."""
    done = _process("sql", str(small_lake), "SELECT nothing FROM sampels")
    assert done.returncode == 2
    assert 'Did you mean "samples"' in done.stderr
    assert "The views are samples, tokens, topk, pairs, images" in done.stderr
    columns = _bytes(small_lake, "DESCRIBE tokens", "-o", "csv").decode()
    assert "label_logprob" in columns


def test_the_query_may_come_from_standard_input(small_lake: Path) -> None:
    """`-` reads it."""
    result = CliRunner().invoke(cli, ["sql", str(small_lake), "-", "-o", "csv"], input=TASKS)
    assert result.stdout.splitlines()[0] == "task,n"


def test_a_file_that_cannot_be_written_is_named(small_lake: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    result = _run("sql", str(small_lake), TASKS, "--to", str(tmp_path / "nowhere" / "a.csv"))
    assert "there is no folder" in str(result.exception)


def test_ls_shows_every_cache(small_lake: Path) -> None:
    """As a table and as JSON, one object a cache."""
    shown = _run("ls", str(small_lake)).stdout
    assert "main" in shown
    assert "pairs" in shown
    records = [json.loads(line) for line in _run("ls", str(small_lake), "-o", "json").stdout.splitlines()]
    assert [(record["cache"], record["rows"]) for record in records] == [("main", 6), ("pairs", 2)]


def test_gc_lists_and_deletes_only_what_nothing_names(small_lake: Path, make_unit: Callable[..., UnitResult]) -> None:
    """A shard without a record is listed, deleted with --yes and gone; the lake still verifies."""
    orphan = small_lake / "caches/main/shards/000009-test-0123456789abcdef.parquet"
    orphan.write_bytes(b"half a shard")
    listed = _run("gc", str(small_lake), "--grace", "0s").stdout
    assert orphan.name in listed
    assert "--yes deletes them" in listed
    assert orphan.exists()
    assert "nothing to collect" in _run("gc", str(small_lake), "--grace", "1h").stdout
    assert "1 file deleted" in _run("gc", str(small_lake), "--grace", "0s", "--yes").stdout
    assert not orphan.exists()
    assert "no problem found" in _run("verify", str(small_lake)).stdout
    assert "expected a time" in _run("gc", str(small_lake), "--grace", "soon").output


def test_rebuild_publishes_a_catalog(small_lake: Path) -> None:
    """The answers stay the same; the catalog is a file of the lake."""
    before = _bytes(small_lake, TOKENS, "-o", "json")
    assert "catalog 1 published" in _run("rebuild", str(small_lake)).stdout
    assert list(small_lake.glob("catalog/*.duckdb"))
    assert _bytes(small_lake, TOKENS, "-o", "json") == before


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help_has_an_example(command: str) -> None:
    """Each command's help says what it is for and shows a line to copy."""
    assert f"logitlake {command} " in _run(command, "--help").output.split("Options:")[0].split("\n", 2)[2]


def test_the_page_about_the_command_shows_every_command() -> None:
    """docs/lake.md has a line to copy for each of them."""
    page = (Path(__file__).parents[2] / "docs" / "lake.md").read_text(encoding="utf-8")
    assert [name for name in cli.commands if f"logitlake {name} runs/demo/lake" not in page] == []


def test_json_helper_has_no_nan() -> None:
    """Nested values too."""
    assert json.loads(to_json({"a": [float("nan"), {"b": float("-inf")}]})) == {"a": ["NaN", {"b": "-Infinity"}]}
    assert plain((1, 2)) == [1, 2]


def test_an_empty_lake_says_what_to_do(tmp_path: Path) -> None:
    """A lake without a snapshot is no error of SQL."""
    Lake.create(tmp_path / "lake")
    done = _process("sql", str(tmp_path / "lake"), "SELECT 1")
    assert done.returncode == 2
    assert "let a capture finish first" in done.stderr


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def _bytes(lake: Path, query: str, *options: str) -> bytes:
    result = CliRunner().invoke(cli, ["sql", str(lake), query, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout_bytes


def _process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from logitlake_shared.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _on_terminal(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and what a pseudo-terminal of 100 columns shows."""
    script = "import os, sys; os.environ['COLUMNS'] = '100'; from logitlake_shared.cli import main; main()"
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdin=slave, stdout=slave, stderr=slave) as child:
        os.close(slave)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the child closed its side
                break
            if not chunk:
                break
            shown += chunk
    os.close(master)
    return child.returncode, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


def _printed(table: pa.Table, width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    show_table(table, console)
    return _output_of(console)


def _output_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
