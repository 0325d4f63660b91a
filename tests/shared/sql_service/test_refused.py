"""What a stranger may not ask: nothing of it runs, and no file is touched."""

import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import duckdb
import pytest
from tests.shared.sql_service.conftest import VISIBLE
from tests.shared.sql_service.corpus import CUT, FILES, LARGE, MEMORY, PARSER, REFUSED, SCOPES, TIMEOUT
from tests.shared.sql_service.questions import QUESTIONS

from logitlake_shared.errors import QueryError, QueryRefusedError
from logitlake_shared.sql_service import SqlPool, SqlRequest
from logitlake_shared.sql_service.gate import Gate
from logitlake_shared.sql_service.grammar import RELATIONS


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    """The gate alone, in this process."""
    with duckdb.connect(":memory:") as connection:
        yield Gate(connection)


@pytest.mark.parametrize("sql", REFUSED, ids=lambda sql: ascii(sql[:70]))
def test_the_gate_refuses(gate: Gate, sql: str) -> None:
    """Each is refused by the gate, or is no question for the parser already."""
    with pytest.raises(QueryError) as refused:
        gate.judge(sql)
    if type(refused.value) is QueryError:
        assert "Error:" in str(refused.value) or "empty" in str(refused.value)


@pytest.mark.parametrize("sql", QUESTIONS, ids=lambda sql: ascii(sql[:70]))
def test_the_gate_lets_questions_through(gate: Gate, sql: str) -> None:
    """Whatever an analyst asks passes, and the gate knows which relations it reads."""
    assert gate.judge(sql) <= set(RELATIONS)


def test_the_corpus_is_large() -> None:
    """At least 120 hostile inputs, each once."""
    everything = [*REFUSED, *TIMEOUT, *MEMORY, *LARGE, *CUT, *PARSER]
    assert len(set(everything)) == len(everything)
    assert len(everything) >= 120


def test_the_relations_are_told(gate: Gate) -> None:
    """Names in the text count where they are in scope: a CTE hides a relation from there on."""
    assert gate.judge("SELECT 1") == set()
    assert gate.judge("SELECT * FROM TOKENS t JOIN samples USING (sample_id)") == {"tokens", "samples"}
    assert gate.judge("WITH tokens AS (SELECT 1) SELECT * FROM tokens") == set()
    assert gate.judge("WITH tokens AS (SELECT * FROM tokens) SELECT * FROM tokens") == {"tokens"}
    assert gate.judge("SELECT (SELECT max(k) FROM tokens), (WITH x AS (FROM pairs) FROM x LIMIT 1)") == {
        "tokens",
        "pairs",
    }


def test_a_refusal_says_what_and_where(gate: Gate) -> None:
    """The message names the part that is not allowed, its place, and what there is."""
    with pytest.raises(QueryRefusedError, match=r"the function getenv \(at character 8\)"):
        gate.judge("SELECT getenv('HOME')")
    with pytest.raises(
        QueryRefusedError, match=r"the relation 'late_rows'; there are caches, errors, .*\(at character 15\)"
    ):
        gate.judge("SELECT * FROM late_rows")
    with pytest.raises(QueryRefusedError, match="COPY QUERY"):
        gate.judge("WITH x AS (COPY (SELECT 1) TO 'a.csv') SELECT * FROM x")
    with pytest.raises(QueryRefusedError, match="a COPY statement is not answered"):
        gate.judge("COPY tokens TO 'a.csv'")


def test_names_are_compared_as_the_engine_does(gate: Gate) -> None:
    """Capitals of ASCII are small letters in a name, others are not: a CTE of such a name hides nothing."""
    gate.judge("WITH Mine AS (SELECT 1) SELECT * FROM mINE")
    kelvin = "\N{KELVIN SIGN}"
    with pytest.raises(QueryRefusedError):
        gate.judge(f'WITH "to{kelvin}ens_" AS (SELECT 1) SELECT * FROM tokens_')
    with pytest.raises(QueryError):
        gate.judge(f'WITH "to{kelvin}ens_" AS (SELECT 1) SELECT * FROM "toKens_"')


def test_no_mutation_reads_what_is_not_published() -> None:
    """Thousands of seeded mutations of texts about scopes: what the gate lets through never reads the table they want.

    The engine has that table here, and would answer.
    """
    draw = random.Random(20261126)
    pieces = ["late_rows", '"late_rows"', "LATE_ROWS", " UNION ALL ", "(", ")", ",", " tokens ", " x ", " AS ", "FROM "]
    before, after = (
        "WITH late_rows AS (SELECT 'q' AS x) ",
        " UNION ALL (WITH late_rows AS (SELECT 'q' AS x) FROM late_rows)",
    )
    seeds = [*SCOPES, "SELECT x FROM late_rows", f"{before}FROM late_rows", "SELECT (SELECT x FROM late_rows LIMIT 1)"]
    seeds += ["SELECT * FROM tokens t, LATERAL (SELECT x FROM late_rows) l", "WITH a AS (FROM late_rows) FROM a", after]
    seeds = [seed for seed in seeds if "RECURSIVE" not in seed]
    ran = 0
    with duckdb.connect(":memory:") as engine:
        engine.execute("CREATE TABLE late_rows AS SELECT 'canary' AS x")
        engine.execute("CREATE TABLE tokens AS SELECT 'a' AS x, 1 AS k")
        gate = Gate(engine)
        for _ in range(6000):
            words = re.findall(r"\s+|\w+|'[^']*'|.", draw.choice(seeds))
            for _ in range(draw.choice((1, 2, 3))):
                place = draw.randrange(len(words) + 1)
                match draw.randrange(5):
                    case 0:
                        words.insert(place, draw.choice(pieces))
                    case 1:
                        del words[place : place + 1]
                    case 2:
                        words[place:place] = ["(", draw.choice(seeds), ")"]
                    case 3:
                        words = [before, *words]
                    case _:
                        words = [*words, after]
            sql = "".join(words)
            with suppress(QueryError):
                gate.judge(sql)
                with suppress(duckdb.Error):
                    ran += 1
                    assert "canary" not in str(engine.execute(sql).fetchmany(100)), sql
    assert ran > 200


@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
def test_nothing_of_it_runs_in_a_pool(pool: SqlPool) -> None:
    """Through a pool they are refused as well, no file is touched, and no message names a place of this machine."""
    asked = [*FILES, *REFUSED[len(FILES) :: 5]]

    def ask(sql: str) -> str:
        try:
            pool.run(SqlRequest(sql, VISIBLE)).read_all()
        except QueryError as error:
            return f"{type(error).__name__}: {error}"
        return "answered"

    with ThreadPoolExecutor(4) as threads:
        answers = dict(zip(asked, threads.map(ask, asked), strict=True))
    assert not {sql for sql, said in answers.items() if not said.startswith(("QueryRefusedError", "QueryError"))}
    assert not [said for said in answers.values() if "site-packages" in said or str(pool._lake) in said]
