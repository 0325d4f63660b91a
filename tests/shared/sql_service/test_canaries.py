"""What the gate relies on in DuckDB, one behaviour a test.

Another release of DuckDB must make these fail or pass knowingly: read what failed, look at what the release changed,
mend `grammar` and `gate`, and only then raise `ENGINE_VERSION`.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import pytest
from tests.shared.sql_service.questions import QUESTIONS

from logitlake_shared.errors import ConfigError
from logitlake_shared.sql_service.gate import ENGINE_VERSION, Gate
from logitlake_shared.sql_service.grammar import FUNCTIONS, NODES, RELATIONS, SPECIAL_NAMES, TABLE_FUNCTIONS, TYPES

# Kinds of nodes that no question of an analyst has needed so far.
_MORE = [
    "SELECT 1 COLLATE nocase",
    "SELECT a.x, #1 FROM (SELECT 1 AS x) a ORDER BY ALL LIMIT 50%",
    "SELECT * FROM (VALUES (1, DEFAULT)) t",
    "SELECT ? BETWEEN $2 AND 3",
    "SELECT DISTINCT ON (a) a FROM t ORDER BY a DESC, b ASC",
]
_HARMLESS_THOUGH_VOLATILE = {"random", "uuid", "uuidv4", "uuidv7", "gen_random_uuid"}
# The first of the sha256 over the sorted names of all functions, and how many there are.
_ALL_FUNCTIONS = ("8abad1c808a7373b", 1161)


@pytest.fixture
def engine() -> Iterator[duckdb.DuckDBPyConnection]:
    """An engine as it comes."""
    with duckdb.connect(":memory:") as connection:
        yield connection


def _tree(engine: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    (text,) = engine.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0]
    tree: dict[str, Any] = json.loads(text)
    return tree


def test_the_release_is_the_one() -> None:
    """The pin of the gate, of the constraints and of this environment is one release."""
    assert duckdb.__version__ == ENGINE_VERSION == "2.0.0"
    constraints = Path(__file__).parents[3] / "constraints.txt"
    assert f"duckdb=={ENGINE_VERSION}" in constraints.read_text().split()


def test_another_release_opens_no_gate(engine: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate does not guess."""
    monkeypatch.setattr(duckdb, "__version__", "2.0.1")
    with pytest.raises(ConfigError, match=r"made for DuckDB 2\.0\.0, and this is 2\.0\.1"):
        Gate(engine)


def test_every_node_has_the_fields_that_the_gate_knows(engine: duckdb.DuckDBPyConnection) -> None:
    """The tree shows of each kind exactly these fields, and every kind that the gate lets through is met here."""
    seen: dict[str, set[str]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, list):
            for part in value:
                walk(part)
        elif isinstance(value, dict):
            kind = value.get("class", value.get("type"))
            if isinstance(kind, str):
                if kind == "SUBQUERY" and "class" not in value:
                    kind = "TABLE SUBQUERY"
                seen.setdefault(kind, set()).update(value)
            for part in value.values():
                walk(part)

    for sql in [*QUESTIONS, *_MORE]:
        tree = _tree(engine, sql)
        assert not tree["error"], sql
        walk(tree["statements"])
    assert {kind: sorted(fields) for kind, fields in seen.items()} == {
        kind: sorted(fields) for kind, fields in NODES.items()
    }


def test_what_may_be_called_is_there(engine: duckdb.DuckDBPyConnection) -> None:
    """Every function and type of the lists exists: a name without a function would be a hole for a macro."""
    rows = engine.execute("SELECT function_name, has_side_effects, stability FROM duckdb_functions()").fetchall()
    names = {name.lower() for name, _, _ in rows}
    assert FUNCTIONS - names == set()
    assert TABLE_FUNCTIONS - names == set()
    types = {name.lower() for (name,) in engine.execute("SELECT type_name FROM duckdb_types()").fetchall()}
    assert TYPES - types == set()
    volatile = {name.lower() for name, side_effects, stability in rows if side_effects or stability == "VOLATILE"}
    assert FUNCTIONS & volatile == _HARMLESS_THOUGH_VOLATILE


def test_no_function_is_new(engine: duckdb.DuckDBPyConnection) -> None:
    """The functions of the engine are those that somebody looked through when the lists were made."""
    names = sorted({name for (name,) in engine.execute("SELECT function_name FROM duckdb_functions()").fetchall()})
    assert (hashlib.sha256("\n".join(names).encode()).hexdigest()[:16], len(names)) == _ALL_FUNCTIONS


def test_a_select_may_copy(engine: duckdb.DuckDBPyConnection) -> None:
    """Why the type of a statement is no guard: a COPY in a CTE is a SELECT, and the tree shows it."""
    sql = "WITH x AS (COPY (SELECT 1) TO 'a.csv') SELECT * FROM x"
    (statement,) = engine.extract_statements(sql)
    assert statement.type == duckdb.StatementType.SELECT
    cte = _tree(engine, sql)["statements"][0]["node"]["cte_map"]["map"][0]
    assert cte["value"]["query_node"]["type"] == "COPY_QUERY_NODE"


def test_other_statements_have_no_tree(engine: duckdb.DuckDBPyConnection) -> None:
    """What is not a SELECT is not serialised, and said to be an error."""
    for sql in ("CREATE TABLE t (a INT)", "COPY (SELECT 1) TO 'a.csv'", "SET threads = 1", "ATTACH 'x'"):
        assert _tree(engine, sql)["error"], sql


def test_a_file_looks_like_a_relation(engine: duckdb.DuckDBPyConnection) -> None:
    """Why names are compared with what is published: a file in FROM is a table of that name."""
    table = _tree(engine, "SELECT * FROM 'a.parquet'")["statements"][0]["node"]["from_table"]
    assert (table["type"], table["table_name"], table["catalog_name"]) == ("BASE_TABLE", "a.parquet", "")


def test_a_name_out_of_scope_is_a_table(engine: duckdb.DuckDBPyConnection) -> None:
    """Why scopes are followed: a CTE of the same name elsewhere in the text does not stand before a table."""
    engine.execute("CREATE TABLE secret AS SELECT 42 AS x")
    outside = "SELECT * FROM secret UNION ALL (WITH secret AS (SELECT 1) SELECT * FROM secret) ORDER BY 1"
    assert engine.execute(outside).fetchall() == [(1,), (42,)]
    inside = "WITH secret AS (SELECT 1 AS x) SELECT * FROM secret UNION ALL SELECT (SELECT x FROM SECRET)"
    assert engine.execute(inside).fetchall() == [(1,), (1,)]
    itself = "WITH secret AS (SELECT x + 1 FROM secret) SELECT * FROM secret"
    assert engine.execute(itself).fetchall() == [(43,)]
    earlier = "WITH a AS (SELECT * FROM secret), secret AS (SELECT 1) SELECT * FROM a"
    assert engine.execute(earlier).fetchall() == [(42,)]


def test_letters_outside_ascii_keep_their_case(engine: duckdb.DuckDBPyConnection) -> None:
    """Names are compared by the small letters of ASCII: a Kelvin sign is no k for the engine."""
    engine.execute("CREATE TABLE kept AS SELECT 42 AS x")
    assert engine.execute("SELECT * FROM KEPT").fetchall() == [(42,)]
    with pytest.raises(duckdb.CatalogException):
        engine.execute('SELECT * FROM "\N{KELVIN SIGN}ept"')


def test_names_of_columns_may_be_functions(engine: duckdb.DuckDBPyConnection) -> None:
    """Why some names of columns are refused: without such a column they are functions, and look like columns."""
    (column,) = _tree(engine, "SELECT current_user")["statements"][0]["node"]["select_list"]
    assert column["class"] == "COLUMN_REF"
    assert engine.execute("SELECT current_user").fetchall() == [("duckdb",)]


def test_no_other_name_is_a_function(engine: duckdb.DuckDBPyConnection) -> None:
    """A column's name alone calls nothing but what is refused, and the time."""
    names = {name for (name,) in engine.execute("SELECT function_name FROM duckdb_functions()").fetchall()}
    answered = set()
    for name in (*sorted(names), "localtime", "localtimestamp", "current_time", "system_user"):
        if name.isidentifier():
            with suppress(duckdb.Error):
                engine.execute(f"SELECT {name}")
                answered.add(name)
    assert answered - SPECIAL_NAMES == {"current_date", "current_time", "localtime", "localtimestamp"}


def test_a_function_of_a_column_has_a_schema(engine: duckdb.DuckDBPyConnection) -> None:
    """Why one qualifier before a function is let through: `task.upper()` reads as a function of the schema `task`."""
    (call,) = _tree(engine, "SELECT task.upper()")["statements"][0]["node"]["select_list"]
    assert (call["schema"], call["function_name"], call["catalog"]) == ("task", "upper", "")


def test_a_locked_engine_stays_locked(engine: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    """External access cannot be had back, nor a setting changed, after the lock."""
    (tmp_path / "a.csv").write_text("x\n1\n")
    engine.execute("SET enable_external_access = false")
    engine.execute("SET lock_configuration = true")
    for sql in (
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "SET threads = 1",
        f"SELECT * FROM read_csv('{tmp_path}/a.csv')",
        f"COPY (SELECT 1) TO '{tmp_path}/b.csv'",
        f"WITH x AS (COPY (SELECT 1) TO '{tmp_path}/b.csv') SELECT * FROM x",
        f"ATTACH '{tmp_path}/c.duckdb'",
        "INSTALL httpfs",
    ):
        with pytest.raises(duckdb.Error):
            engine.execute(sql).fetchall()
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_an_engine_of_one_thread_starts_none() -> None:
    """Why Landlock binds a worker as a whole: its engine has no thread before the sandbox is entered."""
    before = len(list(Path("/proc/self/task").iterdir()))
    with duckdb.connect(":memory:", config={"threads": 1, "async_threads": 0}) as connection:
        connection.execute("SELECT json_serialize_sql('SELECT 1')").fetchall()
        assert len(list(Path("/proc/self/task").iterdir())) <= before


def test_the_relations_are_the_catalogs() -> None:
    """The gate publishes what `docs/lake.md` lists."""
    listed = (Path(__file__).parents[3] / "docs" / "lake.md").read_text()
    assert all(f"`{relation}`" in listed for relation in RELATIONS)
