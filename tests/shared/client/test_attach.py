"""`logitlake attach`: a plain DuckDB, told what is printed, answers as `logitlake sql` does, wherever the lake lies."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from tests.served import served
from tests.shared.conftest import older_duckdb, small_lake
from tests.teacher_service.api.conftest import teacher, tokens

from logitlake_schemas import layout
from logitlake_shared.catalog import Catalog, open_catalog, publish_catalog
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.store import TOKEN_VARIABLE, open_store
from logitlake_shared.web.lake_files import LakeFiles
from logitlake_shared.web.tokens import TokenStore

__all__ = ["small_lake", "teacher", "tokens"]

Command = Callable[..., Any]
Teacher = Callable[..., tuple[Any, str]]

# Of DuckDB's own and of `logitlake sql` alike.
QUESTIONS = (
    "SELECT cache, task, count(*) AS n, sum(len(response_ids))::INT AS tokens FROM samples GROUP BY ALL ORDER BY ALL",
    "SELECT sample_id, list_sum(label_logprob) AS logprob, topk_logprobs FROM samples ORDER BY sample_id",
    "SELECT cache, pair_id, chosen_ids FROM pairs ORDER BY pair_id",
    "SELECT image_sha256, octet_length(data) AS bytes FROM images ORDER BY ALL",
)
TIMEOUT_S = 60
NUM_FILES = 10
"""of the small lake: two of each unit"""


@pytest.fixture
def published(small_lake: Path) -> Path:
    """The small lake with a catalog."""
    publish_catalog(Lake.open(small_lake))
    return small_lake


def attach(lake: object, copy: Path) -> list[str]:
    """The command."""
    return ["logitlake", "attach", str(lake), "--to", str(copy)]


def answers(statements: str) -> list[Any]:
    """What a DuckDB that was told the statements, one after the other, says to the questions."""
    with duckdb.connect() as connection:
        for statement in statements.splitlines():
            connection.execute(statement)
        return [connection.sql(question).to_arrow_table().to_pylist() for question in QUESTIONS]


def expected(lake: Path) -> list[Any]:
    """What our own catalog says to them."""
    with open_catalog(lake) as catalog:
        return [catalog.query(question).to_pylist() for question in QUESTIONS]


def test_a_lake_on_the_disk_is_attached_where_it_lies(published: Path, run_command: Command) -> None:
    """Nothing is copied; the catalog's own tables are there; a name with a quote, or like `day=3`, is no trap."""
    done = run_command("logitlake", "attach", published)
    assert (done.code, answers(done.out)) == (0, expected(published))
    with duckdb.connect() as connection:
        connection.execute(done.out)  # all at once, as a shell would
        assert connection.sql("SELECT cache, rows FROM lake.caches ORDER BY cache").fetchall() == [
            ("main", 6),
            ("pairs", 2),
        ]
    quoted = published.rename(published.with_name("ada's lake"))
    assert answers(run_command("logitlake", "attach", quoted).out) == expected(quoted)
    (quoted.parent / "day=3").mkdir()
    partition = quoted.rename(quoted.parent / "day=3" / "task=x")
    statements = run_command("logitlake", "attach", partition).out
    assert answers(statements) == expected(partition)
    with duckdb.connect() as connection:
        connection.execute(statements)
        assert "day" not in connection.sql("FROM samples").columns


def test_a_catalog_that_somebody_opened_to_write_is_still_one(published: Path, run_command: Command) -> None:
    """With the log that their DuckDB left beside it, which is no catalog."""
    (published / f"{layout.catalog_path(1)}.wal").touch()
    done = run_command("logitlake", "attach", published)
    assert (done.code, answers(done.out)) == (0, expected(published))


def test_an_older_duckdb_takes_the_same_statements(published: Path, run_command: Command) -> None:
    """1.4, in a process without this package; that one reads every column but `topk_ids`."""
    older = older_duckdb()
    statements = run_command("logitlake", "attach", published).out
    program = (
        "import duckdb, sys\nconnection = duckdb.connect()\nconnection.execute(sys.argv[1])\n"
        "rows = connection.sql('SELECT * EXCLUDE (topk_ids) FROM samples').fetchall()\n"
        "print(duckdb.__version__, len(rows))"
    )
    # -S: none of the environment's own packages.
    command = [sys.executable, "-S", "-c", program, statements]
    environment = os.environ | {"PYTHONPATH": str(older)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    assert done.stdout.startswith("1.4.")
    assert done.stdout.split()[1] == "6"


def test_a_lake_over_http_is_copied_once_and_attached(
    published: Path, teacher: Teacher, tokens: TokenStore, tmp_path: Path, run_command: Command, monkeypatch: Any
) -> None:
    """With a token; what is there and whole is not fetched again, what is damaged is; then it needs no service."""
    text, _ = tokens.create("ada", "read")
    copy, url = tmp_path / "copy", f"{teacher()[1]}/v1/files"
    assert run_command(*attach(url, copy)).code == 2  # no token
    assert not copy.exists()
    monkeypatch.setenv(TOKEN_VARIABLE, text)
    first = run_command(*attach(url, copy))
    assert first.code == 0, first.err
    assert f"{NUM_FILES} files in {copy}, {NUM_FILES} fetched now" in first.err
    again = run_command(*attach(url, copy))
    assert "0 fetched now" in again.err
    assert again.out == first.out
    shard = next(copy.glob("caches/main/shards/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    shard.with_name(f"{shard.name}#123").write_bytes(b"of a writer that was killed")
    assert "1 fetched now" in run_command(*attach(url, copy)).err
    assert not list(copy.rglob("*#*"))
    assert answers(first.out) == expected(published)


def test_one_cache_alone(published: Path, tmp_path: Path, run_command: Command) -> None:
    """Its files are fetched and shown, and no other's."""
    copy = tmp_path / "copy"
    done = run_command("logitlake", "attach", published, "--cache", "pairs", "--to", copy)
    assert done.code == 0, done.err
    assert not (copy / "caches" / "main").exists()
    assert "samples" not in done.out
    with duckdb.connect() as connection:
        connection.execute(done.out)
        assert connection.sql("SELECT DISTINCT cache FROM pairs").fetchall() == [("pairs",)]
    assert "no cache 'nope'" in run_command("logitlake", "attach", published, "--cache", "nope").err


class _Stuck:
    """A lake's files, of which the service hands out `num` shards and then no more while the test looks."""

    def __init__(self, lake: Path, num: int) -> None:
        self._files, self._left = LakeFiles(open_store(lake), lambda *_: True), num
        self.is_stuck, self.go_on = threading.Event(), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET" and scope["path"].endswith(".parquet") and not self.go_on:
            self._left -= 1
            if self._left < 0:
                self.is_stuck.set()
                while (await receive())["type"] != "http.disconnect":
                    pass
                return
        await self._files(scope, receive, send)


def test_whoever_is_killed_goes_on_where_they_were(published: Path, tmp_path: Path, run_command: Command) -> None:
    """SIGKILL while shards are fetched: the lock is gone with the process, no catalog names what is not there."""
    stuck, copy = _Stuck(published, 4), tmp_path / "copy"
    with served(Starlette(routes=[Route("/v1/files/{path:path}", stuck)])) as url:
        address = f"{url}/v1/files"
        with subprocess.Popen(
            [sys.executable, "-c", "from logitlake_shared.cli import main; main()", *attach(address, copy)[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE},
        ) as process:
            assert stuck.is_stuck.wait(TIMEOUT_S)
            second = run_command(*attach(address, copy))
            assert "another process copies into it" in second.err
            process.send_signal(signal.SIGKILL)
            process.wait(TIMEOUT_S)
        assert not list(copy.glob("catalog/*"))
        stuck.go_on = True
        done = run_command(*attach(address, copy))
        assert done.code == 0, done.err
        fetched = int(done.err.split(" fetched now")[0].split()[-1])
        assert NUM_FILES - 4 <= fetched <= NUM_FILES
    assert answers(done.out) == expected(published)


def test_without_a_catalog_and_with_an_old_one_it_says_what_to_run(
    small_lake: Path, make_unit: Callable[..., UnitResult], tmp_path: Path, run_command: Command
) -> None:
    """None: an error, but a copy gets its own. One older than the snapshots: what it holds, and that there is more."""
    none = run_command("logitlake", "attach", small_lake)
    assert (none.code, none.out) == (2, "")
    assert "none was published; run `logitlake rebuild`" in none.err
    copied = run_command(*attach(small_lake, tmp_path / "copy"))
    assert (copied.code, answers(copied.out)) == (0, expected(small_lake))
    assert not (small_lake / "catalog").exists()
    lake = Lake.open(small_lake)
    publish_catalog(lake)
    before = expected(small_lake)
    lake.cache("main").publish_unit(make_unit(7))
    lake.cache("main").snapshot()
    lake.create_cache("newer", lake.cache("main").spec).publish_unit(make_unit(8))
    lake.cache("newer").snapshot()
    old = run_command("logitlake", "attach", small_lake)
    assert old.code == 0
    assert "cache 'main': snapshot 1 in catalog 1, 2 in the lake; `logitlake rebuild`" in old.err
    assert "cache 'newer': snapshot none in catalog 1, 1 in the lake" in old.err
    assert answers(old.out) == before
    assert "does not know cache 'newer'" in run_command("logitlake", "attach", small_lake, "--cache", "newer").err
    assert run_command("logitlake", "rebuild", small_lake).code == 0
    new = run_command("logitlake", "attach", small_lake)
    assert "in the lake" not in new.err
    assert answers(new.out) == expected(small_lake)


@pytest.mark.parametrize("cache", [None, "main"])
def test_a_token_of_some_caches_attaches_those(
    published: Path,
    teacher: Teacher,
    tokens: TokenStore,
    tmp_path: Path,
    run_command: Command,
    monkeypatch: pytest.MonkeyPatch,
    cache: str | None,
) -> None:
    """The catalog tells of every cache and is kept from it; its copy gets one that knows of nothing else."""
    monkeypatch.setenv(TOKEN_VARIABLE, tokens.create("ada", "read", ("main",))[0])
    copy, url = tmp_path / "copy", f"{teacher()[1]}/v1/files"
    only = () if cache is None else ("--cache", cache)
    done = run_command(*attach(url, copy), *only)
    assert done.code == 0, done.err
    assert "a catalog made here: 6 files" in done.err
    with duckdb.connect() as own, Catalog(Lake.open(published), caches=["main"]) as ours:
        own.execute(done.out)
        for question in (*QUESTIONS[:2], QUESTIONS[3]):
            assert own.sql(question).to_arrow_table().to_pylist() == ours.query(question).to_pylist()
        question = "SELECT DISTINCT cache FROM {}"
        assert own.sql(question.format("lake.shards")).fetchall() == own.sql(question.format("lake.caches")).fetchall()
        assert own.sql(question.format("lake.caches")).fetchall() == [("main",)]
    assert not any("pairs" in str(path) for path in copy.rglob("*"))
    foreign = run_command(*attach(url, tmp_path / "foreign"), "--cache", "pairs")
    assert (foreign.code, foreign.out) == (2, "")
    assert "no cache 'pairs'" in foreign.err
    assert not (tmp_path / "foreign").exists()


def test_a_file_that_is_gone_or_other_bytes_are_no_half_attach(
    published: Path, tmp_path: Path, run_command: Command
) -> None:
    """Said of the file; nothing is printed, and no catalog is left that names it."""
    (shard, *_) = published.glob("caches/main/shards/*.parquet")
    data, copy = shard.read_bytes(), tmp_path / "copy"
    shard.write_bytes(data[:-1] + b"x")
    wrong = run_command(*attach(published, copy))
    shard.unlink()
    gone = run_command("logitlake", "attach", published)
    for done in (wrong, gone):
        assert (done.code, done.out) == (2, "")
        assert shard.name in done.err
    assert not list(copy.glob("catalog/*"))


def test_a_catalog_writes_nowhere_but_where_shards_are(published: Path, tmp_path: Path, run_command: Command) -> None:
    """One of somebody else's that names a file outside of the folder is refused."""
    with duckdb.connect(published / layout.catalog_path(1)) as connection:
        connection.execute("UPDATE shards SET path = '../../outside.parquet' WHERE kind = 'pairs'")
    done = run_command("logitlake", "attach", published, "--to", tmp_path / "copy")
    assert done.code == 2
    assert "'../../outside.parquet', which is no file of cache 'pairs'" in done.err


def test_a_lock_that_leads_elsewhere_empties_nothing(published: Path, tmp_path: Path, run_command: Command) -> None:
    """The folder of a copy may be one that others write to, and `.lock` in it a link to a file of ours."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "ours").write_text("kept")
    (tmp_path / "copy" / ".lock").symlink_to(tmp_path / "ours")
    assert run_command("logitlake", "attach", published, "--to", tmp_path / "copy").code == 0
    assert (tmp_path / "ours").read_text() == "kept"


@pytest.mark.parametrize("table", ["about", "shards"])
def test_a_catalog_asks_nothing_of_this_machine(
    published: Path, tmp_path: Path, run_command: Command, table: str
) -> None:
    """A view in one of somebody else's could read any file here, and send it in the name of what is to be fetched."""
    (tmp_path / "secret").write_text("the secret")
    with duckdb.connect(published / layout.catalog_path(1)) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO old")
        column = "path" if table == "shards" else "catalog_version"
        connection.execute(
            f"CREATE VIEW {table} AS SELECT * REPLACE ({column} || (SELECT content FROM read_text("
            f"'{tmp_path / 'secret'}')) AS {column}) FROM old"
        )
    done = run_command("logitlake", "attach", published, "--to", tmp_path / "copy")
    assert (done.code, done.out) == (2, "")
    assert "no catalog of this release's version" in done.err
    assert "the secret" not in done.err
    assert not (tmp_path / "copy").exists()
    with open_catalog(published) as catalog:  # which makes one of the shards themselves
        assert catalog.query("SELECT count(*) FROM samples").column(0).to_pylist() == [6]


def test_what_cannot_be_attached_is_refused_before_anything_is_fetched(
    published: Path, teacher: Teacher, tmp_path: Path, run_command: Command
) -> None:
    """A name that DuckDB reads as something else, a lake as a target, no target."""
    comma = run_command("logitlake", "attach", published, "--to", tmp_path / "a,b")
    assert "DuckDB takes , in a path for something else" in comma.err
    assert not (tmp_path / "a,b").exists()
    assert "is a lake" in run_command("logitlake", "attach", published, "--to", published).err
    assert "--to FOLDER" in run_command("logitlake", "attach", f"{teacher()[1]}/v1/files").err
    (tmp_path / "file").write_text("")
    assert "cannot hold a copy" in run_command("logitlake", "attach", published, "--to", tmp_path / "file" / "x").err
