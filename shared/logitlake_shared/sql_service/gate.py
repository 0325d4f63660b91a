"""The gate: whether a text is one question that may be asked. DuckDB's own parser reads it, an allow-list judges it.

A second parser would be a second grammar, and what the two read differently is the way through. So the text is parsed
by the engine that would run it, and every node of the tree that `json_serialize_sql` shows must be one that the gate
knows, with fields that it knows (`grammar`). "The statement is a SELECT" is no guard: since DuckDB 2.0 the body of a
CTE may be an INSERT, a DELETE or a COPY. A name in FROM must be a relation that a lake publishes or a CTE that is in
scope at that place: a name that is defined somewhere else in the text does not count.

The tree is no contract of DuckDB's, so the gate opens for one exact release, and canaries
(`tests/shared/sql_service/test_canaries.py`) say what of its behaviour the gate relies on. Parsing cannot be
interrupted and may need much memory: the gate runs inside a worker, under its limits.

Promise: what it lets through reads published relations, computes, and changes nothing. How long that takes and how much
memory it needs, it does not say: that is what the worker's limits and the pool's deadline are for.
"""

import json
from typing import Any

import duckdb

from logitlake_shared.errors import ConfigError, QueryError, QueryRefusedError
from logitlake_shared.sql_service.grammar import (
    ANONYMOUS,
    ENGINE_VERSION,
    FUNCTIONS,
    NODES,
    RELATIONS,
    SPECIAL_NAMES,
    TABLE_FUNCTIONS,
    TYPES,
)
from logitlake_shared.sql_service.records import check_text

__all__ = ["ENGINE_VERSION", "Gate"]

# Where DuckDB and the catalog keep what is not published.
_SCHEMAS = frozenset({"cat", "published", "main", "temp", "system", "memory", "pg_catalog", "information_schema"})
_Node = dict[str, Any]
_Scope = frozenset[str]


class Gate:
    """Judges texts with the parser of a connection; no table of it is looked at.

    Raises `ConfigError` for another release of DuckDB than `ENGINE_VERSION`.
    """

    def __init__(self, parser: duckdb.DuckDBPyConnection) -> None:
        if duckdb.__version__ != ENGINE_VERSION:
            raise ConfigError(
                f"the SQL gate was made for DuckDB {ENGINE_VERSION}, and this is {duckdb.__version__}: what it lets "
                f"through is not known there. Install duckdb=={ENGINE_VERSION}"
            )
        self._parser = parser

    def judge(self, sql: str) -> frozenset[str]:
        """The published relations that the question reads.

        Raises `QueryRefusedError` for what may not be asked, `QueryError` for what is not SQL.
        """
        check_text(sql)
        try:
            statements = self._parser.extract_statements(sql)
        except duckdb.Error as error:
            raise QueryError(f"{error}") from error
        if len(statements) != 1:
            raise QueryRefusedError(
                f"expected one SQL statement, got {len(statements)}; ask one question at a time (PIVOT: with IN (…))"
            )
        if statements[0].type != duckdb.StatementType.SELECT:
            raise QueryRefusedError(
                f"a {statements[0].type.name} statement is not answered: expected SELECT (also WITH, FROM, VALUES, "
                "DESCRIBE, SUMMARIZE)"
            )
        judge = _Judge()
        try:
            judge.query(self._tree(sql), frozenset())
        except RecursionError as error:
            raise QueryRefusedError("the question is nested too deeply; write it with fewer levels") from error
        return frozenset(judge.relations)

    def _tree(self, sql: str) -> Any:
        try:
            (text,) = self._parser.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()[0]
        except duckdb.Error as error:
            raise QueryError(f"{error}") from error
        tree = json.loads(text)
        if tree["error"]:
            raise QueryRefusedError(f"the question cannot be judged: {tree.get('error_message')}")
        (statement,) = tree["statements"]
        return statement["node"]


class _Judge:
    """Walks one tree. Every method raises `QueryRefusedError` for what it does not know."""

    def __init__(self) -> None:
        self.relations: set[str] = set()

    def query(self, node: Any, scope: _Scope) -> None:
        """A query node: its CTEs are in scope after their definition and in everything below it."""
        kind = self._known(node)
        if not kind.endswith("_NODE"):
            raise _refused(f"{kind} where a query is expected", node)
        self._known(node["cte_map"])
        for entry in node["cte_map"]["map"]:
            self._known(entry)
            definition = entry["value"]
            self._known(definition)
            self._parts(definition, scope, without="query_node")
            body = definition["query_node"]
            if isinstance(body, dict) and body.get("cte_name", entry["key"]) != entry["key"]:
                raise _refused("a recursive query under another name", body)
            self.query(body, scope)
            scope = scope | {_folded(entry["key"])}
        if kind == "RECURSIVE_CTE_NODE":
            inner = scope | {_folded(node["cte_name"])}
            self._parts(node, scope, without="cte_map right")
            self._any(node["right"], inner)
        else:
            self._parts(node, scope, without="cte_map")

    def _any(self, value: Any, scope: _Scope) -> None:
        if isinstance(value, list):
            for element in value:
                self._any(element, scope)
        elif isinstance(value, dict):
            self._object(value, scope)

    def _object(self, node: _Node, scope: _Scope) -> None:
        kind = self._known(node)
        match kind:
            case "SELECT_NODE" | "SET_OPERATION_NODE" | "RECURSIVE_CTE_NODE":
                self.query(node, scope)
                return
            case "BASE_TABLE":
                self._relation(node, scope)
            case "TABLE_FUNCTION":
                function = node["function"]
                if not isinstance(function, dict) or function.get("class") != "FUNCTION":
                    raise _refused("this kind of table function", node)
                self._named(function, "function_name", TABLE_FUNCTIONS, "the table function")
                self._known(function)
                self._parts(function, scope)
                self._parts(node, scope, without="function")
                return
            case "FUNCTION" | "WINDOW":
                self._named(node, "function_name", FUNCTIONS, "the function")
            case "TYPE":
                self._named(node, "type_name", TYPES, "the type")
            case "COLUMN_REF":
                self._column(node)
            case "SHOW_REF":
                if node["query"] is None or node["show_type"] not in ("DESCRIBE", "SUMMARY") or node["table_name"]:
                    raise _refused("SHOW; DESCRIBE and SUMMARIZE of a relation or a query are answered", node)
            case "" if node.get("pivot_enum"):
                raise _refused("PIVOT over a type", node)
        self._parts(node, scope)

    def _parts(self, node: _Node, scope: _Scope, without: str = "") -> None:
        skipped = without.split()
        for field, value in node.items():
            if field not in skipped:
                self._any(value, scope)

    def _known(self, node: Any) -> str:
        """The kind of a node, "" for a part of one, after its fields were looked at."""
        if not isinstance(node, dict):
            raise _refused("an empty query", {})
        kind = node.get("class", node.get("type"))
        if not isinstance(kind, str):
            if frozenset(node) not in ANONYMOUS:
                raise _refused(f"a part with the fields {', '.join(sorted(node))}", node)
            return ""
        if kind == "SUBQUERY" and "class" not in node:
            kind = "TABLE SUBQUERY"
        if kind not in NODES:
            raise _refused(_in_words(kind), node)
        unknown = node.keys() - NODES[kind]
        if unknown:
            raise _refused(f"{_in_words(kind)} with {', '.join(sorted(unknown))}", node)
        return kind

    def _relation(self, node: _Node, scope: _Scope) -> None:
        name = node["table_name"]
        if node["catalog_name"] or node["schema_name"] or node["qualified_name"]["path"] != [name]:
            raise _refused(f"the qualified name {_path(node)}; write a relation's name alone", node)
        if node["at_clause"] is not None:
            raise _refused("AT; a question is about one snapshot, which its request names", node)
        folded = _folded(name)
        if folded in scope:
            return
        if folded not in RELATIONS:
            raise _refused(f"the relation {name!r}; there are {', '.join(sorted(RELATIONS))}", node)
        self.relations.add(folded)

    def _named(self, node: _Node, field: str, known: frozenset[str], what: str) -> None:
        name, path = node[field], node["qualified_name"]["path"]
        # `task.upper()` is a function of a column, and reads as one of a schema.
        column = [] if field == "type_name" or known is TABLE_FUNCTIONS else [node["schema"]][: bool(node["schema"])]
        if node["catalog"] or path != [*column, name] or _folded(node["schema"]) in _SCHEMAS:
            raise _refused(f"the qualified name {_path(node)}", node)
        if not isinstance(name, str) or _folded(name) not in known:
            raise _refused(f"{what} {name}", node)

    def _column(self, node: _Node) -> None:
        names = node["column_names"]
        if len(names) == 1 and _folded(names[0]) in SPECIAL_NAMES:
            raise _refused(f"{names[0]}, which is a function of DuckDB; name a column with its relation", node)


def _folded(name: str) -> str:
    """As DuckDB compares names: the letters of ASCII only."""
    return "".join(chr(ord(letter) + 32) if "A" <= letter <= "Z" else letter for letter in name)


def _path(node: _Node) -> str:
    return ".".join(map(str, node["qualified_name"]["path"]))


def _in_words(kind: str) -> str:
    return kind.removesuffix("_NODE").replace("_", " ")


def _refused(what: str, node: _Node) -> QueryRefusedError:
    place = node.get("query_location")
    where = f" (at character {place + 1})" if isinstance(place, int) and place < 2**32 else ""
    return QueryRefusedError(f"not allowed in a question: {what}{where}")
