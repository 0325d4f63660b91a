"""The same answer in every format: values, names, what was cut, and what no format has a number for."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.shared.sql_service.conftest import VISIBLE

from logitlake_shared.errors import QueryError
from logitlake_shared.sql_service import SqlPool, SqlRequest
from logitlake_shared.sql_service.formats import FORMATS, encode


@dataclass
class _Answer:
    """An answer that is there already: batches, and how they ended."""

    batches: list[pa.RecordBatch]
    schema: pa.Schema
    truncated: str = ""
    query_id: str = "qry_1"
    snapshot: dict[str, int] = field(default_factory=lambda: {"main": 2})
    rows: int = 0
    milliseconds: float = 1.5

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self.batches:
            self.rows += batch.num_rows
            yield batch


def _answer(table: pa.Table, truncated: str = "", rows: int = 2) -> _Answer:
    return _Answer(table.to_batches(max_chunksize=rows), table.schema, truncated)


def _bytes(answer: Any, name: str, **options: Any) -> bytes:
    return b"".join(encode(answer, name, **options))


def _objects(data: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of an NDJSON, and its end."""
    lines = [json.loads(line) for line in data.decode().splitlines()]
    assert list(lines[-1]) == ["$end"]
    return lines[:-1], lines[-1]["$end"]


_PLAIN = pa.table(
    {"n": [1, 2, None, 4, 5], "t": ["a", "", None, 'd"e', "f,g\nh"], "b": [True, False, None, True, True]}
)


def test_a_plain_answer_is_the_same_in_all() -> None:
    """Five rows in three batches come out as they went in."""
    rows = _PLAIN.to_pylist()
    document = json.loads(_bytes(_answer(_PLAIN), "json"))
    assert [column["name"] for column in document["columns"]] == ["n", "t", "b"]
    assert [dict(zip("ntb", row, strict=True)) for row in document["rows"]] == rows
    assert (document["num_rows"], document["truncated"], document["snapshot"]) == (5, None, {"main": 2})
    objects, end = _objects(_bytes(_answer(_PLAIN), "ndjson"))
    assert objects == rows
    assert end["num_rows"] == 5
    assert pq.read_table(io.BytesIO(_bytes(_answer(_PLAIN), "parquet"))).to_pylist() == rows
    assert pa.ipc.open_stream(_bytes(_answer(_PLAIN), "arrow")).read_all().to_pylist() == rows
    text = _bytes(_answer(_PLAIN), "csv").decode()
    assert text == 'n,t,b\n1,a,true\n2,"",false\n,,\n4,"d""e",true\n5,"f,g\nh",true\n'
    assert len(list(csv.reader(io.StringIO(text)))) == 6


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_cut_is_said_inside(name: str) -> None:
    """The body itself tells that rows are missing, and by which limit."""
    data = _bytes(_answer(_PLAIN, "rows"), name)
    match name:
        case "json":
            said = json.loads(data)["truncated"]
        case "ndjson":
            said = _objects(data)[1]["truncated"]
        case "csv":
            assert data.decode().endswith("\n# truncated by the limit of rows after 5 rows\n")
            return
        case "parquet":
            said = pq.read_metadata(io.BytesIO(data)).metadata[b"logitlake.truncated"].decode()
        case _:
            reader = pa.ipc.open_stream(data)
            assert reader.schema.metadata[b"logitlake.query_id"] == b"qry_1"
            batches = [reader.read_next_batch_with_custom_metadata() for _ in range(4)]
            assert batches[-1].batch.num_rows == 0
            said = batches[-1].custom_metadata[b"logitlake.truncated"].decode()
    assert said == "rows"


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_without_rows_is_one(name: str) -> None:
    """No row, and still columns and an end."""
    data = _bytes(_answer(_PLAIN.slice(0, 0)), name)
    match name:
        case "json":
            assert json.loads(data)["rows"] == []
        case "ndjson":
            assert _objects(data)[0] == []
        case "csv":
            assert data == b"n,t,b\n"
        case "parquet":
            assert pq.read_table(io.BytesIO(data)).schema.names == ["n", "t", "b"]
        case _:
            assert pa.ipc.open_stream(data).read_all().num_rows == 0


def test_numbers_that_json_has_not() -> None:
    """NaN and the infinities are null, also inside lists and structs, and counted; decimals are exact strings."""
    table = pa.table(
        {
            "d": pa.array([float("nan"), 1.5, None]),
            "f": pa.array([float("inf"), -0.0, 0.5], pa.float32()),
            "l": [[1.0, float("nan")], None, []],
            "s": [{"x": float("-inf")}, {"x": 2.0}, None],
            "h": pa.array([Decimal(10) ** 37, Decimal(-3), None], pa.decimal128(38, 0)),
            "m": pa.array([Decimal("1.50"), None, Decimal("-0.01")], pa.decimal128(6, 2)),
        }
    )
    document = json.loads(_bytes(_answer(table), "json"))
    assert document["rows"] == [
        [None, None, [1.0, None], {"x": None}, str(10**37), "1.50"],
        [1.5, -0.0, None, {"x": 2.0}, "-3", None],
        [None, 0.5, [], None, None, "-0.01"],
    ]
    assert document["warnings"] == ["4 numbers that are not finite (NaN, Infinity) are null here"]
    assert _bytes(_answer(table.select(["d"])), "csv") == b"d\n\n1.5\n\n"


def test_names_may_repeat() -> None:
    """JSON, CSV and Arrow keep the names; where a name is a key each has its own, and no value is lost."""
    table = pa.table([[1], [2], [3]], names=["a", "a", "a_1"])
    document = json.loads(_bytes(_answer(table), "json"))
    assert [column["name"] for column in document["columns"]] == ["a", "a", "a_1"]
    assert document["rows"] == [[1, 2, 3]]
    assert _bytes(_answer(table), "csv") == b"a,a,a_1\n1,2,3\n"
    assert pa.ipc.open_stream(_bytes(_answer(table), "arrow")).read_all().schema.names == ["a", "a", "a_1"]
    (row,), _ = _objects(_bytes(_answer(table), "ndjson"))
    assert sorted(row.values()) == [1, 2, 3]
    assert sorted(pq.read_table(io.BytesIO(_bytes(_answer(table), "parquet"))).to_pylist()[0].values()) == [1, 2, 3]


def test_a_spreadsheet_computes_nothing() -> None:
    """With `csv_safe` texts that look like formulas are texts; numbers stay numbers; without it nothing changes."""
    table = pa.table({"=x": ["=1+1", "+2", "-3", "@SUM(A1)", "\tx", "a=b", None], "n": [-1, 2, -3, 4, 5, 6, 7]})
    safe = list(csv.reader(io.StringIO(_bytes(_answer(table), "csv", csv_safe=True).decode())))
    assert [row[0] for row in safe] == ["'=x", "'=1+1", "'+2", "'-3", "'@SUM(A1)", "'\tx", "a=b", ""]
    assert [row[1] for row in safe[1:]] == ["-1", "2", "-3", "4", "5", "6", "7"]
    plain = list(csv.reader(io.StringIO(_bytes(_answer(table), "csv").decode())))
    assert [row[0] for row in plain][:3] == ["=x", "=1+1", "+2"]


def test_every_type_of_the_engine_has_a_text(pool: SqlPool) -> None:
    """Blobs, times, maps, unions, enums, intervals and nested ones come through all formats, row by row."""
    sql = """
        SELECT 'ab'::BLOB AS bl, DATE '2026-11-26' AS d, TIME '10:11:12.5' AS t, TIMESTAMP '2026-11-26 10:00:00' AS ts,
            TIMESTAMPTZ '2026-11-26 10:00:00+00' AS tz, INTERVAL '1 month 2 days 3.5 seconds' AS iv,
            'a'::ENUM('a', 'b') AS e, {'a': 1, 'b': [NULL, 'x']} AS s, map {'k': 1.5::DECIMAL(3, 1)} AS m,
            map {1: 'x', 2: NULL} AS n, [[1, 2], [], NULL] AS l, [1, 2]::INT[2] AS f, union_value(x := 1) AS u,
            '{"j": 1}'::JSON AS j, NULL AS z, 18446744073709551615::UBIGINT AS ub, 3::HUGEINT AS h, true AS b
        UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
            NULL, NULL, NULL
    """
    expected = {
        "bl": "YWI=",
        "d": "2026-11-26",
        "t": "10:11:12.500000",
        "ts": "2026-11-26 10:00:00.000000",
        "tz": "2026-11-26 10:00:00.000000Z",
        "iv": "P1M2DT3.5S",
        "e": "a",
        "s": {"a": 1, "b": [None, "x"]},
        "m": {"k": "1.5"},
        "n": [[1, "x"], [2, None]],
        "l": [[1, 2], [], None],
        "f": [1, 2],
        "u": 1,
        "j": '{"j": 1}',
        "z": None,
        "ub": 2**64 - 1,
        "h": "3",
        "b": True,
    }
    rows, _ = _objects(_bytes(pool.run(SqlRequest(sql, VISIBLE)), "ndjson"))
    assert rows == [expected, dict.fromkeys(expected)]
    document = json.loads(_bytes(pool.run(SqlRequest(sql, VISIBLE)), "json"))
    assert document["rows"] == [list(row.values()) for row in rows]
    lines = list(csv.reader(io.StringIO(_bytes(pool.run(SqlRequest(sql, VISIBLE)), "csv").decode())))
    assert lines[1][:3] == ["YWI=", "2026-11-26", "10:11:12.500000"]
    assert json.loads(lines[1][7]) == expected["s"]
    assert lines[2] == [""] * len(expected)
    table = pq.read_table(io.BytesIO(_bytes(pool.run(SqlRequest(sql, VISIBLE)), "parquet")))
    assert table.column("iv").to_pylist() == ["P1M2DT3.5S", None]
    assert table.column("bl").to_pylist() == [b"ab", None]
    arrow = pa.ipc.open_stream(_bytes(pool.run(SqlRequest(sql, VISIBLE)), "arrow")).read_all()
    assert arrow.num_rows == 2


def test_batches_of_a_cut_stream_are_whole() -> None:
    """A slice of a batch, as a limit leaves it, is encoded from its own rows: lists, maps, structs, dictionaries."""
    table = pa.table(
        {
            "l": [[1], [2, 2], None, [4]],
            "m": pa.array([[("a", 1)], None, [("c", 3), ("d", 4)], []], pa.map_(pa.string(), pa.int64())),
            "s": [{"x": 1}, {"x": 2}, None, {"x": 4}],
            "e": pa.array(["p", "q", None, "p"]).dictionary_encode(),
        }
    )
    whole, _ = _objects(_bytes(_answer(table, rows=10), "ndjson"))
    for start in range(4):
        (batch,) = table.slice(start, 2).combine_chunks().to_batches()
        sliced = table.to_batches()[0].slice(start, 2)
        for one in (batch, sliced):
            rows, _ = _objects(_bytes(_Answer([one], table.schema), "ndjson"))
            assert rows == whole[start : start + 2]


def test_an_unknown_format_is_refused() -> None:
    """The message lists what there is, and media types are the registered ones."""
    with pytest.raises(QueryError, match="arrow, json, ndjson, csv, parquet"):
        encode(_answer(_PLAIN), "xml")
    assert FORMATS["arrow"].media_type == "application/vnd.apache.arrow.stream"


def test_answers_stream() -> None:
    """No piece waits for a batch that comes after it."""
    for name in ("arrow", "json", "ndjson", "csv"):
        answer = _answer(_PLAIN)
        pieces = encode(answer, name)
        for number in (1, 2):
            assert next(pieces)
            assert answer.rows <= 2 * number, name
